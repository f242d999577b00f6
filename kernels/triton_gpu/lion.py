"""The Lion kernels: encode the update, apply a vote, or take the whole step; one launch for all tensors of a list."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix, Number
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, FLAGS, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.lion_lists import _apply_all_votes_kernel, _encode_updates_kernel, _step_all_kernel
from lioncub.kernels.triton_gpu.lion_tiles import apply_votes_tile, encode_tile, step_tile
from lioncub.kernels.triton_gpu.random_rows import ROUNDING_ARGUMENTS, numbers_of, rounding_arguments, stream_number
from lioncub.kernels.triton_gpu.rows import tile_rows
from lioncub.kernels.triton_gpu.tables import is_shut, only_one, pointer_or, table_of

UNUSED = Mix(0.0, 0.0)


@triton.jit(do_not_specialize=["parity"], do_not_specialize_on_alignment=FLAGS)
def _encode_update_kernel(
    exp_avg_ptr,
    grad_ptr,
    out_ptr,
    status_ptr,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    parity,
    n_elements,
    ADVANCE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    numbers = (beta1, beta1_new, beta2, beta2_new, parity)
    rows = tile_rows(BLOCK_SIZE)
    encode_tile(exp_avg_ptr, grad_ptr, out_ptr, status_ptr, numbers, rows, n_elements, ADVANCE, HAS_STATUS)


@triton.jit(do_not_specialize=[*ROUNDING_ARGUMENTS, "tensor"], do_not_specialize_on_alignment=FLAGS)
def _apply_votes_kernel(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    gate_ptr,
    lr,
    decay,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    tensor,
    n_elements,
    ADVANCE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if is_shut(gate_ptr, HAS_GATE):
        return
    numbers = (lr, decay, beta2, beta2_new)
    streams = ((seed_low, seed_high, rounding_step, tensor), momentum_worker)
    rows = tile_rows(BLOCK_SIZE)
    apply_votes_tile(
        param_ptr, packed_ptr, grad_ptr, exp_avg_ptr, numbers, streams, rows, n_elements, ADVANCE, ROUNDING
    )


@triton.jit(do_not_specialize=[*ROUNDING_ARGUMENTS, "tensor"], do_not_specialize_on_alignment=FLAGS)
def _step_lion_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    gate_ptr,
    lr,
    decay,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    tensor,
    n_elements,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    if is_shut(gate_ptr, HAS_GATE):
        return
    numbers = (lr, decay, beta1, beta1_new, beta2, beta2_new)
    streams = ((seed_low, seed_high, rounding_step, tensor), momentum_worker)
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    step_tile(param_ptr, grad_ptr, exp_avg_ptr, numbers, streams, start, n_elements, ROUNDING, BLOCK_SIZE)


def lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    parity: int | Tensor,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """See `lioncub.kernels.reference.lion_encode`."""
    _encode(exp_avg, grad, beta1, None, parity, out, status)


def lion_encode_(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    beta2: Mix,
    parity: int | Tensor,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """See `lioncub.kernels.reference.lion_encode_`."""
    _encode(exp_avg, grad, beta1, beta2, parity, out, status)


def apply_votes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    lr: Number,
    decay: Number,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
    gate: Tensor | None = None,
    rounding: Streams | None = None,
) -> None:
    """See `lioncub.kernels.reference.apply_votes_`; a parameter stays as it is where int32[n] ``gate`` is zero."""
    advance = grad is not None and exp_avg is not None and beta2 is not None
    # never read unless the momentum advances
    g, m = (param, param) if grad is None or exp_avg is None else (grad, exp_avg)
    how, kind = rounding_arguments(rounding)
    numbers, flags = (lr, decay, *(beta2 or UNUSED), *how), (advance, gate is not None, kind)
    i = only_one(param)
    with launching_on(param[0]):
        threads = options(param[0].device, elementwise_threads(*param, *g, *m))
        if i is not None:
            n, gate, tensor = param[i].numel(), None if gate is None else gate[i : i + 1], stream_number(rounding, i)
            tensors = (param[i], packed[i], g[i], m[i], pointer_or(gate, packed[i]))
            _apply_votes_kernel[tiles(n)](*tensors, *numbers, tensor, n, *flags, BLOCK_SIZE, **threads)
        elif table := table_of(param, packed, g, m, numbers=numbers_of(rounding)):
            rows, owners, kinds = table
            _apply_all_votes_kernel[table.grid](
                rows, owners, pointer_or(gate, owners), *numbers, kinds, *flags, BLOCK_SIZE, **threads
            )


def lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: Number,
    decay: Number,
    beta1: Mix,
    beta2: Mix,
    gate: Tensor | None = None,
    rounding: Streams | None = None,
) -> None:
    """See `lioncub.kernels.reference.lion_step_`; a parameter stays as it is where int32[n] ``gate`` is zero."""
    how, kind = rounding_arguments(rounding)
    numbers, flags = (lr, decay, *beta1, *beta2, *how), (gate is not None, kind)
    i = only_one(param)
    with launching_on(param[0]):
        threads = options(param[0].device, elementwise_threads(*param, *grad, *exp_avg))
        if i is not None:
            n, gate, tensor = param[i].numel(), None if gate is None else gate[i : i + 1], stream_number(rounding, i)
            tensors = (param[i], grad[i], exp_avg[i], pointer_or(gate, param[i]))
            _step_lion_kernel[tiles(n)](*tensors, *numbers, tensor, n, *flags, BLOCK_SIZE, **threads)
        elif table := table_of(param, grad, exp_avg, numbers=numbers_of(rounding)):
            rows, owners, kinds = table
            _step_all_kernel[table.grid](
                rows, owners, pointer_or(gate, owners), *numbers, kinds, *flags, BLOCK_SIZE, **threads
            )


def _encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    beta2: Mix | None,
    parity: int | Tensor,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    numbers, flags = (*beta1, *(beta2 or UNUSED), parity), (beta2 is not None, status is not None)
    i = only_one(grad)
    with launching_on(grad[0]):
        threads = options(grad[0].device)
        if i is not None:
            n, status = grad[i].numel(), None if status is None else status[i : i + 1]
            _encode_update_kernel[tiles(n)](
                exp_avg[i], grad[i], out[i], pointer_or(status, out[i]), *numbers, n, *flags, BLOCK_SIZE, **threads
            )
        elif table := table_of(exp_avg, grad, out):
            rows, owners, kinds = table
            _encode_updates_kernel[table.grid](
                rows, owners, pointer_or(status, owners), *numbers, kinds, *flags, BLOCK_SIZE, **threads
            )
