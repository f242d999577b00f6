"""The Lion kernels: encode the update, apply a vote, or take the whole step; one launch per tensor."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.scalars import Mix
from lioncub.kernels.triton_gpu.arithmetic import is_finite, is_up, mix
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.rows import (
    element_offsets,
    flag_rows,
    load_codes,
    load_elements,
    load_rows,
    parity_bits,
    store_codes,
    store_elements,
    store_rows,
    tile_rows,
)


@triton.jit(do_not_specialize=["parity"])
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
    rows = tile_rows(BLOCK_SIZE)
    m = load_rows(exp_avg_ptr, rows, n_elements)
    g = load_rows(grad_ptr, rows, n_elements)
    update = mix(beta1, beta1_new, m, g)
    finite = is_finite(update)
    if ADVANCE:
        store_rows(exp_avg_ptr, rows, n_elements, tl.where(finite, mix(beta2, beta2_new, m, g), m))
    store_codes(out_ptr, rows, n_elements, is_up(update, parity_bits(parity)).to(tl.int32), 1)
    if HAS_STATUS:
        flag_rows(status_ptr, ~finite)


@triton.jit
def _apply_votes_kernel(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    lr,
    decay,
    beta2,
    beta2_new,
    n_elements,
    ADVANCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tile_rows(BLOCK_SIZE)
    codes = load_codes(packed_ptr, rows, n_elements, 1)
    offsets = element_offsets(rows)
    x = load_elements(param_ptr, offsets, n_elements)
    if ADVANCE:
        m = load_elements(exp_avg_ptr, offsets, n_elements)
        g = load_elements(grad_ptr, offsets, n_elements)
        store_elements(exp_avg_ptr, offsets, n_elements, mix(beta2, beta2_new, m, g))
    store_elements(param_ptr, offsets, n_elements, x * decay - tl.where(codes != 0, lr, -lr))


@triton.jit
def _step_lion_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    lr,
    decay,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    n_elements,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    x = load_elements(param_ptr, offsets, n_elements)
    g = load_elements(grad_ptr, offsets, n_elements)
    m = load_elements(exp_avg_ptr, offsets, n_elements)
    update = mix(beta1, beta1_new, m, g)
    step = tl.where(update > 0, lr, tl.where(update < 0, -lr, 0.0))
    store_elements(param_ptr, offsets, n_elements, x * decay - step)
    store_elements(exp_avg_ptr, offsets, n_elements, mix(beta2, beta2_new, m, g))


def lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    parity: int,
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
    parity: int,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """See `lioncub.kernels.reference.lion_encode_`."""
    _encode(exp_avg, grad, beta1, beta2, parity, out, status)


def apply_votes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    lr: float,
    decay: float,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
) -> None:
    """See `lioncub.kernels.reference.apply_votes_`."""
    advance = grad is not None and exp_avg is not None and beta2 is not None
    for i, x in enumerate(param):
        if not x.numel():
            continue
        g = m = x
        if grad is not None and exp_avg is not None:
            g, m = grad[i], exp_avg[i]
        with launching_on(x):
            _apply_votes_kernel[tiles(x.numel())](
                x,
                packed[i],
                g,
                m,
                lr,
                decay,
                *(beta2 or _UNUSED),
                x.numel(),
                advance,
                BLOCK_SIZE,
                **options(x.device, elementwise_threads(x, g, m)),
            )


def lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: float,
    decay: float,
    beta1: Mix,
    beta2: Mix,
) -> None:
    """See `lioncub.kernels.reference.lion_step_`."""
    for x, g, m in zip(param, grad, exp_avg, strict=True):
        if x.numel():
            with launching_on(x):
                _step_lion_kernel[tiles(x.numel())](
                    x,
                    g,
                    m,
                    lr,
                    decay,
                    *beta1,
                    *beta2,
                    x.numel(),
                    BLOCK_SIZE,
                    **options(x.device, elementwise_threads(x, g, m)),
                )


_UNUSED = Mix(0.0, 0.0)


def _encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    beta2: Mix | None,
    parity: int,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    for i, (m, g, packed) in enumerate(zip(exp_avg, grad, out, strict=True)):
        if not g.numel():
            continue
        flag = packed if status is None else status[i : i + 1]
        with launching_on(g):
            _encode_update_kernel[tiles(g.numel())](
                m,
                g,
                packed,
                flag,
                *beta1,
                *(beta2 or _UNUSED),
                parity,
                g.numel(),
                beta2 is not None,
                status is not None,
                BLOCK_SIZE,
                **options(g.device),
            )
