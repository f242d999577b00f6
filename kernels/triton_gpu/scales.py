"""block_scale and lion_block_scale: norms of blocks, deterministic, summed in fp64 as the reference does.

A block of at most one tile is finished by the tile that holds it. A longer one leaves a partial norm per chunk of
tiles, and a second kernel combines them in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.scalars import Mix
from lioncub.kernels.triton_gpu.arithmetic import mix
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, ROW_THREADS, launching_on, options, tiles
from lioncub.kernels.triton_gpu.rows import load_elements, value_of
from lioncub.kernels.triton_gpu.tables import form_of, kind_at, only_one, pointer_at, row_at, table_of, tile_of

_TILE = 8 * ROW_THREADS
_TILES_PER_CHUNK = 16


@triton.jit
def _scale_blocks_kernel(
    x_ptr,
    grad_ptr,
    scale_ptr,
    beta1,
    beta1_new,
    n_elements,
    NORM: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    blocks = tl.program_id(0).to(tl.int64) * (BLOCK_SIZE // SCALE_BLOCK) + tl.arange(0, BLOCK_SIZE // SCALE_BLOCK)
    offsets = blocks[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
    x = load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE)
    norm = reduce_terms(terms_of(x, NORM), 1, NORM)
    filled = tl.minimum(n_elements - blocks * SCALE_BLOCK, SCALE_BLOCK)
    tl.store(scale_ptr + blocks, finish_norm(norm, filled, NORM), mask=blocks * SCALE_BLOCK < n_elements)


@triton.jit(do_not_specialize=["n_tiles"])
def _reduce_chunks_kernel(
    x_ptr,
    grad_ptr,
    partial_ptr,
    beta1,
    beta1_new,
    n_elements,
    n_tiles,
    NORM: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    total = no_terms(BLOCK_SIZE, NORM)
    # a number that the compiler knew would be unrolled to as many registers
    for tile in tl.range(0, n_tiles, loop_unroll_factor=2):
        offsets = (chunk * n_tiles + tile) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        x = load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE)
        total = combine(total, terms_of(x, NORM), NORM)
    tl.store(partial_ptr + chunk, reduce_terms(total, 0, NORM))


@triton.jit
def _combine_chunks_kernel(
    partial_ptr,
    scale_ptr,
    n_elements,
    n_chunks,
    chunks_per_scale,
    elements_per_scale,
    NORM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    first = block * chunks_per_scale
    last = tl.minimum(first + chunks_per_scale, n_chunks)
    total = no_terms(BLOCK_SIZE, NORM)
    for start in range(first, last, BLOCK_SIZE):
        chunks = start + tl.arange(0, BLOCK_SIZE)
        total = combine(total, tl.load(partial_ptr + chunks, mask=chunks < last, other=0), NORM)
    filled = tl.minimum(n_elements - block * elements_per_scale, elements_per_scale)
    tl.store(scale_ptr + block, finish_norm(reduce_terms(total, 0, NORM), filled, NORM))


@triton.jit
def _scale_updates_kernel(
    rows_ptr,
    owners_ptr,
    partial_ptr,
    beta1,
    beta1_new,
    KINDS: tl.constexpr,
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
                _scale_row(row_ptr, partial_ptr, numbers, start, None, kind_at(KINDS, k), NORM, SCALE_BLOCK, BLOCK_SIZE)
            else:
                _scale_row(
                    row_ptr, partial_ptr, numbers, start, n_elements, kind_at(KINDS, k), NORM, SCALE_BLOCK, BLOCK_SIZE
                )


@triton.jit
def _scale_row(
    row_ptr,
    partial_ptr,
    numbers,
    start,
    n_elements,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The scales of the tile's blocks; where blocks are larger, or there is one, what the tile adds to its block."""
    beta1, beta1_new = numbers
    exp_avg_ptr, grad_ptr = pointer_at(row_ptr, 0, KIND, n_elements), pointer_at(row_ptr, 1, KIND, n_elements)
    if SCALE_BLOCK == 0:
        offsets = start + tl.arange(0, BLOCK_SIZE)
        x = load_values(exp_avg_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, True)
        tl.store(partial_ptr + tl.program_id(0), reduce_terms(terms_of(x, NORM), 0, NORM))
    else:
        blocks = start // SCALE_BLOCK + tl.arange(0, BLOCK_SIZE // SCALE_BLOCK)
        offsets = blocks[:, None] * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)[None, :]
        x = load_values(exp_avg_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, True)
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
    """What the norm combines: fp64 x squared or |x|; for "linf" the bits of |x|, ordered like it, NaN the largest."""
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


def block_scale(x: Tensor, norm: str, block: int, scale: Tensor) -> None:
    """See `lioncub.kernels.reference.block_scale`."""
    _scale(x, None, Mix(0.0, 0.0), norm, block, scale)


def lion_block_scale(
    exp_avg: Sequence[Tensor], grad: Sequence[Tensor], beta1: Mix, norm: str, block: int, scale: Sequence[Tensor]
) -> None:
    """See `lioncub.kernels.reference.lion_block_scale`."""
    i = only_one(grad)
    if i is not None:
        _scale(exp_avg[i], grad[i], beta1, norm, block, scale[i])
        return
    launch = options(grad[0].device)
    with launching_on(grad[0]):
        table = table_of(exp_avg, grad, scale)
        if table is None:
            return
        rows, owners, kinds = table
        within = 0 < block <= BLOCK_SIZE
        terms = torch.int32 if norm == "linf" else torch.float64
        partial = owners if within else torch.empty(owners.numel(), dtype=terms, device=owners.device)
        _scale_updates_kernel[table.grid](
            rows, owners, partial, *beta1, kinds, norm, block if within else 0, BLOCK_SIZE, **launch
        )
        if not within:
            most = max(s.numel() for s in scale)
            _combine_tiles_kernel[(len(grad) * most,)](rows, partial, block, most, norm, _TILE, BLOCK_SIZE, **launch)


def _scale(x: Tensor, grad: Tensor | None, beta1: Mix, norm: str, block: int, scale: Tensor) -> None:
    n = x.numel()
    is_update = grad is not None
    grad = x if grad is None else grad
    launch = options(x.device)
    with launching_on(x):
        if block and block <= _TILE:
            _scale_blocks_kernel[tiles(n, _TILE)](x, grad, scale, *beta1, n, norm, is_update, block, _TILE, **launch)
            return
        chunk_tiles = min(block // _TILE or _TILES_PER_CHUNK, _TILES_PER_CHUNK)
        chunk = chunk_tiles * _TILE
        n_chunks = triton.cdiv(n, chunk)
        partial = torch.empty(n_chunks, dtype=torch.int32 if norm == "linf" else torch.float64, device=x.device)
        _reduce_chunks_kernel[(n_chunks,)](x, grad, partial, *beta1, n, chunk_tiles, norm, is_update, _TILE, **launch)
        per_scale = block // chunk or n_chunks
        _combine_chunks_kernel[(scale.numel(),)](
            partial, scale, n, n_chunks, per_scale, block or n, norm, _TILE, **launch
        )
