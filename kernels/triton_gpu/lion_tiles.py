"""What the Lion kernels do to one tile of one tensor; ``n_elements`` is None where all of the tile exists."""

import triton
import triton.language as tl

from lioncub.kernels.triton_gpu.arithmetic import is_finite, mix
from lioncub.kernels.triton_gpu.random_rows import NEAREST, PARAM_AND_MOMENTUM, PARAM_STREAM, store_rounded
from lioncub.kernels.triton_gpu.rows import (
    element_offsets,
    flag_rows,
    load_codes,
    load_elements,
    load_rows,
    rows_from,
    store_rows,
    store_signs,
    value_of,
)

_NEAREST, _MOMENTUM_TOO = tl.constexpr(NEAREST), tl.constexpr(PARAM_AND_MOMENTUM)


@triton.jit
def encode_tile(
    exp_avg_ptr,
    grad_ptr,
    out_ptr,
    status_ptr,
    numbers,
    rows,
    n_elements,
    ADVANCE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
):
    """Pack the signs of the updates; with ADVANCE the momentum of finite ones moves on."""
    beta1, beta1_new, beta2, beta2_new, parity = numbers
    m = load_rows(exp_avg_ptr, rows, n_elements)
    g = load_rows(grad_ptr, rows, n_elements)
    update = mix(value_of(beta1), value_of(beta1_new), m, g)
    if ADVANCE:
        moved = tl.where(is_finite(update), mix(value_of(beta2), value_of(beta2_new), m, g), m)
        store_rows(exp_avg_ptr, rows, n_elements, moved)
    store_signs(out_ptr, rows, n_elements, update, parity)
    if HAS_STATUS:
        flag_rows(status_ptr, update)


@triton.jit
def apply_votes_tile(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    numbers,
    streams,
    rows,
    n_elements,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """Decay, and move by the voted codes; with ADVANCE the momentum moves on."""
    lr, decay, beta2, beta2_new = numbers
    rate = value_of(lr)
    move = tl.where(load_codes(packed_ptr, rows, n_elements, 1) != 0, rate, -rate)
    numbers = (decay, beta2, beta2_new)
    move_tile(param_ptr, grad_ptr, exp_avg_ptr, move, numbers, streams, rows, n_elements, ADVANCE, ROUNDING)


@triton.jit
def move_tile(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    move,
    numbers,
    streams,
    rows,
    n_elements,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """x*decay - move for fp32 ``move`` [rows, 8]; with ADVANCE the momentum moves on.

    ``streams`` are (seed_low, seed_high, step, tensor) and the worker of momentum, for a ROUNDING that is not NEAREST.
    """
    decay, beta2, beta2_new = numbers
    stream, worker = streams
    offsets = element_offsets(rows)
    x = load_elements(param_ptr, offsets, n_elements)
    if ADVANCE:
        m = load_elements(exp_avg_ptr, offsets, n_elements)
        g = load_elements(grad_ptr, offsets, n_elements)
        moved = mix(value_of(beta2), value_of(beta2_new), m, g)
        store_rounded(exp_avg_ptr, offsets, n_elements, moved, rows, stream, worker, ROUNDING == _MOMENTUM_TOO)
    moved = x * value_of(decay) - move
    store_rounded(param_ptr, offsets, n_elements, moved, rows, stream, PARAM_STREAM, ROUNDING != _NEAREST)


@triton.jit
def step_tile(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    numbers,
    streams,
    start,
    n_elements,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The whole Lion step of the tile that begins at element ``start``; ``streams`` as in `move_tile`."""
    lr, decay, beta1, beta1_new, beta2, beta2_new = numbers
    stream, worker = streams
    offsets = start + tl.arange(0, BLOCK_SIZE)
    rows = rows_from(start, BLOCK_SIZE)
    x = load_elements(param_ptr, offsets, n_elements)
    g = load_elements(grad_ptr, offsets, n_elements)
    m = load_elements(exp_avg_ptr, offsets, n_elements)
    update = mix(value_of(beta1), value_of(beta1_new), m, g)
    rate = value_of(lr)
    step = tl.where(update > 0, rate, tl.where(update < 0, -rate, 0.0))
    moved = x * value_of(decay) - step
    store_rounded(param_ptr, offsets, n_elements, moved, rows, stream, PARAM_STREAM, ROUNDING != _NEAREST)
    moved = mix(value_of(beta2), value_of(beta2_new), m, g)
    store_rounded(exp_avg_ptr, offsets, n_elements, moved, rows, stream, worker, ROUNDING == _MOMENTUM_TOO)
