"""lion_apply_ and lion_step_: one launch for all tensors of a list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.lists import TensorList
from lioncub.kernels.rounding import PARAM_WORKER, Streams
from lioncub.kernels.scalars import NO_MIX, Mix, Number
from lioncub.kernels.triton_gpu.arithmetic import mix
from lioncub.kernels.triton_gpu.launch import (
    FLAGS,
    STREAM_ARGUMENTS,
    elementwise_threads,
    form_of,
    is_inactive,
    kind_at,
    pointer_at,
    stream_of,
    stream_words,
    table_of,
    tile_of,
)
from lioncub.kernels.triton_gpu.rows import (
    element_offsets,
    load_codes,
    load_current,
    load_elements,
    rows_from,
    store_master,
    store_rounded,
    value_of,
)

# how a kernel rounds: everything to nearest, parameters stochastically, or momentum too
NEAREST, PARAM, PARAM_AND_MOMENTUM = 0, 1, 2
_NEAREST, _MOMENTUM_TOO = tl.constexpr(NEAREST), tl.constexpr(PARAM_AND_MOMENTUM)
_PARAM_STREAM = tl.constexpr(PARAM_WORKER)


@triton.jit(do_not_specialize=["step", "offset", *STREAM_ARGUMENTS], do_not_specialize_on_alignment=FLAGS)
def _apply_codes_kernel(
    rows_ptr,
    owners_ptr,
    active_ptr,
    step,
    offset,
    rate,
    decay,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    stream_step,
    worker,
    KINDS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 5, BLOCK_SIZE)
    if is_inactive(active_ptr + tensor, HAS_FLAGS):
        return
    kind, is_wide = form_of(row_ptr, start, n_elements, 5, BLOCK_SIZE)
    numbers = (step, offset, rate, decay, beta2, beta2_new)
    streams, rows = (stream_of(row_ptr, seed_low, seed_high, stream_step, 5), worker), rows_from(start, BLOCK_SIZE)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _apply_tile(
                    row_ptr, numbers, streams, rows, None, kind_at(KINDS, k), BITS, ADVANCE, ROUNDING, HAS_MASTERS
                )
            else:
                _apply_tile(
                    row_ptr, numbers, streams, rows, n_elements, kind_at(KINDS, k), BITS, ADVANCE, ROUNDING, HAS_MASTERS
                )


@triton.jit
def _apply_tile(
    row_ptr,
    numbers,
    streams,
    rows,
    n_elements,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
):
    """Decay, and move by the codes' values; with ADVANCE the momentum moves on, with HAS_MASTERS they move.

    ``streams`` are (seed_low, seed_high, step, key) and the worker of momentum; ``n_elements`` is None where all
    of the tile exists.
    """
    step, offset, rate, decay, beta2, beta2_new = numbers
    stream, worker = streams
    param_ptr, master_ptr = pointer_at(row_ptr, 0, KIND, n_elements), pointer_at(row_ptr, 4, KIND, n_elements)
    codes = load_codes(pointer_at(row_ptr, 1, KIND, n_elements), rows, n_elements, BITS)
    move = (codes * step - offset).to(tl.float32) * value_of(rate)
    offsets = element_offsets(rows)
    x = load_current(param_ptr, master_ptr, offsets, n_elements, HAS_MASTERS)
    if ADVANCE:
        exp_avg_ptr = pointer_at(row_ptr, 3, KIND, n_elements)
        m = load_elements(exp_avg_ptr, offsets, n_elements)
        g = load_elements(pointer_at(row_ptr, 2, KIND, n_elements), offsets, n_elements)
        moved = mix(value_of(beta2), value_of(beta2_new), m, g)
        store_rounded(exp_avg_ptr, offsets, n_elements, moved, rows, stream, worker, ROUNDING == _MOMENTUM_TOO)
    moved = x * value_of(decay) - move
    store_master(param_ptr, master_ptr, offsets, n_elements, moved, HAS_MASTERS)
    store_rounded(param_ptr, offsets, n_elements, moved, rows, stream, _PARAM_STREAM, ROUNDING != _NEAREST)


@triton.jit(do_not_specialize=STREAM_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _step_lion_kernel(
    rows_ptr,
    owners_ptr,
    active_ptr,
    lr,
    decay,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    stream_step,
    worker,
    KINDS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 4, BLOCK_SIZE)
    if is_inactive(active_ptr + tensor, HAS_FLAGS):
        return
    kind, is_wide = form_of(row_ptr, start, n_elements, 4, BLOCK_SIZE)
    numbers = (lr, decay, beta1, beta1_new, beta2, beta2_new)
    streams = (stream_of(row_ptr, seed_low, seed_high, stream_step, 4), worker)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _step_tile(row_ptr, numbers, streams, start, None, kind_at(KINDS, k), ROUNDING, HAS_MASTERS, BLOCK_SIZE)
            else:
                _step_tile(
                    row_ptr, numbers, streams, start, n_elements, kind_at(KINDS, k), ROUNDING, HAS_MASTERS, BLOCK_SIZE
                )


@triton.jit
def _step_tile(
    row_ptr,
    numbers,
    streams,
    start,
    n_elements,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    HAS_MASTERS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Take the Lion step of the tile that begins at element ``start``; ``streams`` as in `_apply_tile`."""
    lr, decay, beta1, beta1_new, beta2, beta2_new = numbers
    stream, worker = streams
    param_ptr, exp_avg_ptr = pointer_at(row_ptr, 0, KIND, n_elements), pointer_at(row_ptr, 2, KIND, n_elements)
    master_ptr = pointer_at(row_ptr, 3, KIND, n_elements)
    offsets = start + tl.arange(0, BLOCK_SIZE)
    rows = rows_from(start, BLOCK_SIZE)
    x = load_current(param_ptr, master_ptr, offsets, n_elements, HAS_MASTERS)
    g = load_elements(pointer_at(row_ptr, 1, KIND, n_elements), offsets, n_elements)
    m = load_elements(exp_avg_ptr, offsets, n_elements)
    update = mix(value_of(beta1), value_of(beta1_new), m, g)
    rate = value_of(lr)
    step = tl.where(update > 0, rate, tl.where(update < 0, -rate, 0.0))
    moved = x * value_of(decay) - step
    store_master(param_ptr, master_ptr, offsets, n_elements, moved, HAS_MASTERS)
    store_rounded(param_ptr, offsets, n_elements, moved, rows, stream, _PARAM_STREAM, ROUNDING != _NEAREST)
    moved = mix(value_of(beta2), value_of(beta2_new), m, g)
    store_rounded(exp_avg_ptr, offsets, n_elements, moved, rows, stream, worker, ROUNDING == _MOMENTUM_TOO)


def lion_apply_(
    param: TensorList,
    packed: TensorList,
    bits: int,
    step: int,
    offset: int,
    rate: Number,
    decay: Number,
    grad: TensorList | None,
    exp_avg: TensorList | None,
    beta2: Mix | None,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: TensorList | None = None,
) -> None:
    """See `lioncub.kernels.reference.lion_apply_`."""
    if table := table_of(param, packed, grad, exp_avg, master, streams=rounding):
        numbers = (step, offset, rate, decay, *(beta2 or NO_MIX), *stream_words(rounding))
        flags = (bits, beta2 is not None, _rounding_of(rounding), master is not None)
        threads = _threads(param, grad, exp_avg, master)
        table.launch(_apply_codes_kernel, active, numbers, *flags, threads=threads)


def lion_step_(
    param: TensorList,
    grad: TensorList,
    exp_avg: TensorList,
    lr: Number,
    decay: Number,
    beta1: Mix,
    beta2: Mix,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: TensorList | None = None,
) -> None:
    """See `lioncub.kernels.reference.lion_step_`."""
    if table := table_of(param, grad, exp_avg, master, streams=rounding):
        numbers, flags = (
            (lr, decay, *beta1, *beta2, *stream_words(rounding)),
            (_rounding_of(rounding), master is not None),
        )
        threads = _threads(param, grad, exp_avg, master)
        table.launch(_step_lion_kernel, active, numbers, *flags, threads=threads)


def _threads(*lists: TensorList | None) -> int:
    return elementwise_threads(*[dtype for each in lists if each is not None for dtype in each.dtypes])


def _rounding_of(rounding: Streams | None) -> int:
    if rounding is None:
        return NEAREST
    return PARAM if rounding.worker is None else PARAM_AND_MOMENTUM
