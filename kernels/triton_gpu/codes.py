"""apply_codes_: a step by codes of several bits; one launch for all tensors of a list."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix, Number
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, FLAGS, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.lion_tiles import move_tile
from lioncub.kernels.triton_gpu.random_rows import ROUNDING_ARGUMENTS, numbers_of, rounding_arguments, stream_number
from lioncub.kernels.triton_gpu.rows import ROW, load, load_codes, rows_from, tile_rows, value_of
from lioncub.kernels.triton_gpu.tables import (
    form_of,
    is_shut,
    kind_at,
    only_one,
    pointer_at,
    pointer_or,
    stream_of,
    table_of,
    tile_of,
)

_UNUSED = Mix(0.0, 0.0)


@triton.jit(do_not_specialize=["step", "offset", *ROUNDING_ARGUMENTS, "tensor"], do_not_specialize_on_alignment=FLAGS)
def _apply_codes_kernel(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    gate_ptr,
    step,
    offset,
    rate,
    decay,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    tensor,
    n_elements,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if is_shut(gate_ptr, HAS_GATE):
        return
    numbers = (step, offset, rate, decay, beta2, beta2_new)
    streams = ((seed_low, seed_high, rounding_step, tensor), momentum_worker)
    rows = tile_rows(BLOCK_SIZE)
    apply_codes_tile(
        param_ptr, packed_ptr, grad_ptr, exp_avg_ptr, numbers, streams, rows, n_elements, BITS, ADVANCE, ROUNDING
    )


@triton.jit(do_not_specialize=["step", "offset", *ROUNDING_ARGUMENTS], do_not_specialize_on_alignment=FLAGS)
def _apply_all_codes_kernel(
    rows_ptr,
    owners_ptr,
    gate_ptr,
    step,
    offset,
    rate,
    decay,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    KINDS: tl.constexpr,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 4, BLOCK_SIZE)
    if is_shut(gate_ptr + tensor, HAS_GATE):
        return
    kind, is_wide = form_of(row_ptr, start, n_elements, 4, BLOCK_SIZE)
    numbers = (step, offset, rate, decay, beta2, beta2_new)
    streams = (stream_of(row_ptr, seed_low, seed_high, rounding_step, 4), momentum_worker)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _apply_codes(
                    row_ptr, numbers, streams, start, None, kind_at(KINDS, k), BITS, ADVANCE, ROUNDING, BLOCK_SIZE
                )
            else:
                _apply_codes(
                    row_ptr, numbers, streams, start, n_elements, kind_at(KINDS, k), BITS, ADVANCE, ROUNDING, BLOCK_SIZE
                )


@triton.jit
def _apply_codes(
    row_ptr,
    numbers,
    streams,
    start,
    n_elements,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    apply_codes_tile(
        pointer_at(row_ptr, 0, KIND, n_elements),
        pointer_at(row_ptr, 1, KIND, n_elements),
        pointer_at(row_ptr, 2, KIND, n_elements),
        pointer_at(row_ptr, 3, KIND, n_elements),
        numbers,
        streams,
        rows_from(start, BLOCK_SIZE),
        n_elements,
        BITS,
        ADVANCE,
        ROUNDING,
    )


@triton.jit
def apply_codes_tile(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    numbers,
    streams,
    rows,
    n_elements,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Decay, and move by codes' values; with ADVANCE the momentum moves on."""
    step, offset, rate, decay, beta2, beta2_new = numbers
    values = load_wide_codes(packed_ptr, rows, n_elements, BITS) * step - offset
    move = values.to(tl.float32) * value_of(rate)
    numbers = (decay, beta2, beta2_new)
    move_tile(param_ptr, grad_ptr, exp_avg_ptr, move, numbers, streams, rows, n_elements, ADVANCE, ROUNDING)


@triton.jit
def load_wide_codes(packed_ptr, rows, n_elements, BITS: tl.constexpr):
    """int32[rows, 8] codes of up to 16 bits; all bytes up to the last element's exist."""
    if BITS == 16:
        # a row's bytes all exist if its first code does
        offsets = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
        packed = load(packed_ptr + offsets, rows[:, None] * ROW, n_elements).to(tl.int32)
        # bytes do not overlap, so their sum is their union
        codes = tl.sum(tl.reshape(packed, (rows.shape[0], ROW, 2)) << (tl.arange(0, 2) * 8)[None, None, :], 2)
    else:
        codes = load_codes(packed_ptr, rows, n_elements, BITS)
    return codes


def apply_codes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    bits: int,
    step: int,
    offset: int,
    rate: Number,
    decay: Number,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
    gate: Tensor | None = None,
    rounding: Streams | None = None,
) -> None:
    """See `lioncub.kernels.reference.apply_codes_`; a parameter stays as it is where int32[n] ``gate`` is zero."""
    advance = grad is not None and exp_avg is not None and beta2 is not None
    # never read unless the momentum advances
    g, m = (param, param) if grad is None or exp_avg is None else (grad, exp_avg)
    how, kind = rounding_arguments(rounding)
    numbers = (step, offset, rate, decay, *(beta2 or _UNUSED), *how)
    flags = (bits, advance, gate is not None, kind)
    i = only_one(param)
    with launching_on(param[0]):
        threads = options(param[0].device, elementwise_threads(*param, *g, *m))
        if i is not None:
            n, gate, tensor = param[i].numel(), None if gate is None else gate[i : i + 1], stream_number(rounding, i)
            tensors = (param[i], packed[i], g[i], m[i], pointer_or(gate, packed[i]))
            _apply_codes_kernel[tiles(n)](*tensors, *numbers, tensor, n, *flags, BLOCK_SIZE, **threads)
        elif table := table_of(param, packed, g, m, numbers=numbers_of(rounding)):
            rows, owners, kinds = table
            _apply_all_codes_kernel[table.grid](
                rows, owners, pointer_or(gate, owners), *numbers, kinds, *flags, BLOCK_SIZE, **threads
            )
