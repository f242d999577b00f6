"""block_scale and lion_block_scale: norms of blocks, deterministic, summed in fp64 as the reference does.

A block of at most one tile is finished by the tile that holds it. A longer one leaves a partial norm per tile, and a
second kernel combines them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lioncub.kernels.lists import TensorList
from lioncub.kernels.scalars import Mix
from lioncub.kernels.triton_gpu.arithmetic import mix
from lioncub.kernels.triton_gpu.launch import (
    BLOCK_SIZE,
    ROW_THREADS,
    form_of,
    kind_at,
    pointer_at,
    row_at,
    run,
    table_of,
    tile_of,
)
from lioncub.kernels.triton_gpu.rows import load_elements, value_of

# partial norms that are combined at a time
_TILE = 8 * ROW_THREADS


@triton.jit
def _scale_blocks_kernel(
    rows_ptr,
    owners_ptr,
    partial_ptr,
    beta1,
    beta1_new,
    KINDS: tl.constexpr,
    HAS_PARTIAL: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    _, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 3, BLOCK_SIZE)
    kind, is_wide = form_of(row_ptr, start, n_elements, 3, BLOCK_SIZE)
    numbers = (beta1, beta1_new)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _scale_tile(
                    row_ptr,
                    partial_ptr,
                    numbers,
                    start,
                    None,
                    kind_at(KINDS, k),
                    IS_UPDATE,
                    NORM,
                    SCALE_BLOCK,
                    BLOCK_SIZE,
                )
            else:
                _scale_tile(
                    row_ptr,
                    partial_ptr,
                    numbers,
                    start,
                    n_elements,
                    kind_at(KINDS, k),
                    IS_UPDATE,
                    NORM,
                    SCALE_BLOCK,
                    BLOCK_SIZE,
                )


@triton.jit
def _scale_tile(
    row_ptr,
    partial_ptr,
    numbers,
    start,
    n_elements,
    KIND: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    NORM: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Return the scales of the tile's blocks or, where a block is larger, what the tile adds to it."""
    beta1, beta1_new = numbers
    x_ptr, grad_ptr = pointer_at(row_ptr, 0, KIND, n_elements), pointer_at(row_ptr, 1, KIND, n_elements)
    if SCALE_BLOCK == 0:
        offsets = start + tl.arange(0, BLOCK_SIZE)
        x = load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE)
        tl.store(partial_ptr + tl.program_id(0), reduce_terms(terms_of(x, NORM), 0, NORM))
    else:
        blocks = start // SCALE_BLOCK + tl.arange(0, BLOCK_SIZE // SCALE_BLOCK)
        offsets = blocks[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
        x = load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE)
        norm = reduce_terms(terms_of(x, NORM), 1, NORM)
        scale_ptr = pointer_at(row_ptr, 2, KIND, n_elements)
        if n_elements is None:
            tl.store(scale_ptr + blocks, finish_norm(norm, tl.full((), SCALE_BLOCK, tl.int64), NORM))
        else:
            filled = tl.minimum(n_elements - blocks * SCALE_BLOCK, SCALE_BLOCK)
            tl.store(scale_ptr + blocks, finish_norm(norm, filled, NORM), mask=blocks * SCALE_BLOCK < n_elements)


@triton.jit(do_not_specialize=["most_scales"])
def _combine_tiles_kernel(
    rows_ptr,
    partial_ptr,
    elements_per_scale,
    most_scales,
    NORM: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # tensors and their scales share the first dimension of the grid, the only one that may have over 65,535 programs
    row_ptr = row_at(rows_ptr, tl.program_id(0) // most_scales, 3)
    block = (tl.program_id(0) % most_scales).to(tl.int64)
    n_elements = tl.load(row_ptr + 3)
    size = n_elements if elements_per_scale == 0 else elements_per_scale.to(tl.int64)
    if block * size >= n_elements:
        return
    filled = tl.minimum(n_elements - block * size, size)
    first = tl.load(row_ptr + 4) + block * (size // BLOCK_SIZE)
    last = first + tl.cdiv(filled, BLOCK_SIZE)
    total = no_terms(TILES, NORM)
    for start in range(first, last, TILES):
        tiles = start + tl.arange(0, TILES)
        total = combine(total, tl.load(partial_ptr + tiles, mask=tiles < last, other=0), NORM)
    scale_ptr = tl.load(row_ptr + 2).to(tl.pointer_type(tl.float32))
    tl.store(scale_ptr + block, finish_norm(reduce_terms(total, 0, NORM), filled, NORM))


@triton.jit
def load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE: tl.constexpr):
    """fp32 values of x, or of Lion's update where x is the momentum; 0 past the end."""
    x = load_elements(x_ptr, offsets, n_elements)
    if IS_UPDATE:
        x = mix(value_of(beta1), value_of(beta1_new), x, load_elements(grad_ptr, offsets, n_elements))
    return x


@triton.jit
def terms_of(x, NORM: tl.constexpr):
    """Return what the norm combines: fp64 x squared or |x|; for "linf" the bits of |x|, NaN the largest."""
    if NORM == "linf":
        terms = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    elif NORM == "l1":
        terms = tl.abs(x).to(tl.float64)
    else:
        terms = x.to(tl.float64) * x.to(tl.float64)
    return terms


@triton.jit
def no_terms(BLOCK_SIZE: tl.constexpr, NORM: tl.constexpr):
    return tl.zeros((BLOCK_SIZE,), tl.int32 if NORM == "linf" else tl.float64)


@triton.jit
def combine(a, b, NORM: tl.constexpr):
    return tl.maximum(a, b) if NORM == "linf" else a + b


@triton.jit
def reduce_terms(terms, axis: tl.constexpr, NORM: tl.constexpr):
    return tl.max(terms, axis) if NORM == "linf" else tl.sum(terms, axis)


@triton.jit
def finish_norm(norm, filled, NORM: tl.constexpr):
    """fp32 scale from the combined terms of ``filled`` elements."""
    if NORM == "linf":
        scale = norm.to(tl.float32, bitcast=True)
    elif NORM == "l1":
        scale = (norm / filled.to(tl.float64)).to(tl.float32)
    else:
        scale = tl.sqrt(norm / filled.to(tl.float64)).to(tl.float32)
    return scale


def lion_block_scale(
    exp_avg: TensorList, grad: TensorList | None, beta1: Mix, norm: str, block: int, scale: TensorList
) -> None:
    """See `lioncub.kernels.reference.lion_block_scale`; scales of empty tensors are not written."""
    table = table_of(exp_avg, grad, scale)
    if table is None:
        return
    rows, owners, _ = table
    within = 0 < block <= BLOCK_SIZE
    partial = None
    if not within:
        terms = torch.int32 if norm == "linf" else torch.float64
        partial = torch.empty(owners.numel(), dtype=terms, device=owners.device)
    flags = (grad is not None, norm, block if within else 0)
    table.launch(_scale_blocks_kernel, partial, beta1, *flags, threads=ROW_THREADS)
    if partial is not None:
        most = max(scale.sizes)
        n = len(rows) * most * BLOCK_SIZE
        run(_combine_tiles_kernel, n, BLOCK_SIZE, rows.device, rows, partial, block, most, norm, _TILE)
