"""apply_codes_: a step by codes of several bits; one launch per tensor."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.scalars import Mix
from lioncub.kernels.triton_gpu.arithmetic import mix
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.rows import (
    ROW,
    element_offsets,
    load_codes,
    load_elements,
    store_elements,
    tile_rows,
)

_UNUSED = Mix(0.0, 0.0)


@triton.jit(do_not_specialize=["step", "offset"])
def _apply_codes_kernel(
    param_ptr,
    packed_ptr,
    grad_ptr,
    exp_avg_ptr,
    step,
    offset,
    rate,
    decay,
    beta2,
    beta2_new,
    n_elements,
    BITS: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tile_rows(BLOCK_SIZE)
    move = (load_wide_codes(packed_ptr, rows, n_elements, BITS) * step - offset).to(tl.float32) * rate
    offsets = element_offsets(rows)
    x = load_elements(param_ptr, offsets, n_elements)
    if ADVANCE:
        m = load_elements(exp_avg_ptr, offsets, n_elements)
        g = load_elements(grad_ptr, offsets, n_elements)
        store_elements(exp_avg_ptr, offsets, n_elements, mix(beta2, beta2_new, m, g))
    store_elements(param_ptr, offsets, n_elements, x * decay - move)


@triton.jit
def load_wide_codes(packed_ptr, rows, n_elements, BITS: tl.constexpr):
    """int32[rows, 8] codes of up to 16 bits; all bytes up to the last element's exist."""
    if BITS == 16:
        offsets = rows[:, None] * 16 + tl.arange(0, 16)[None, :]
        packed = tl.load(packed_ptr + offsets, mask=offsets // 2 < n_elements, other=0).to(tl.int32)
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
    rate: float,
    decay: float,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
) -> None:
    """See `lioncub.kernels.reference.apply_codes_`."""
    advance = grad is not None and exp_avg is not None and beta2 is not None
    for i, x in enumerate(param):
        if not x.numel():
            continue
        g = m = x
        if grad is not None and exp_avg is not None:
            g, m = grad[i], exp_avg[i]
        with launching_on(x):
            _apply_codes_kernel[tiles(x.numel())](
                x,
                packed[i],
                g,
                m,
                step,
                offset,
                rate,
                decay,
                *(beta2 or _UNUSED),
                x.numel(),
                bits,
                advance,
                BLOCK_SIZE,
                **options(x.device, elementwise_threads(x, g, m)),
            )
