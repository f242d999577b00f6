"""block_scale and lion_block_scale: norms of blocks, deterministic, summed in fp64 as the reference does.

A block of at most one tile is finished by the tile that holds it. A longer one leaves a partial norm per chunk of
tiles, and a second kernel combines them in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.scalars import Mix
from lioncub.kernels.triton_gpu.arithmetic import mix, widen
from lioncub.kernels.triton_gpu.launch import ROW_THREADS, launching_on, options, tiles

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
def load_values(x_ptr, grad_ptr, beta1, beta1_new, offsets, n_elements, IS_UPDATE: tl.constexpr):
    """fp32 values of x, or of Lion's update where x is the momentum; 0 past the end."""
    mask = offsets < n_elements
    x = widen(tl.load(x_ptr + offsets, mask=mask, other=0))
    if IS_UPDATE:
        x = mix(beta1, beta1_new, x, widen(tl.load(grad_ptr + offsets, mask=mask, other=0)))
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


def lion_block_scale(exp_avg: Tensor, grad: Tensor, beta1: Mix, norm: str, block: int, scale: Tensor) -> None:
    """See `lioncub.kernels.reference.lion_block_scale`."""
    _scale(exp_avg, grad, beta1, norm, block, scale)


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
