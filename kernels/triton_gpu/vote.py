"""majority_vote on packed words: bit-sliced counters, 32 votes per instruction."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.launch import ROW_THREADS, launching_on, options, tiles

# 128 bits per thread
_WORDS_PER_TILE = 4 * ROW_THREADS


@triton.jit(do_not_specialize=["parity", "n_workers"])
def _vote_majority_kernel(
    packed_ptr,
    out_ptr,
    counts_ptr,
    row_stride,
    parity,
    n_workers,
    n_words,
    PLANES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_words
    planes = count_votes(packed_ptr + offsets, row_stride, n_workers, mask, PLANES)
    more, tied = compare_planes(planes, n_workers // 2, PLANES)
    tied = tied & ((n_workers & 1) - 1)
    # bit j of a word is element j's, so a parity word serves every word
    parity_word = 0x55555555 ^ (parity - 1)
    tl.store(out_ptr + offsets, (more | (tied & parity_word)).to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_COUNTS:
        _, all_up = compare_planes(planes, n_workers, PLANES)
        _, all_down = compare_planes(planes, 0, PLANES)
        code_bits: tl.constexpr = 0xFF if out_ptr.dtype.element_ty.primitive_bitwidth == 8 else -1
        valid = tl.where(mask, code_bits, 0)
        tl.atomic_add(counts_ptr, tl.sum(count_bits(tied & valid)).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.sum(count_bits((all_up | all_down) & valid)).to(tl.int64))


@triton.jit
def count_votes(word_ptrs, row_stride, n_workers, mask, PLANES: tl.constexpr):
    """int32 bit planes of the number of ones at each bit: bit k of the count stands in plane k."""
    zero = tl.zeros(mask.shape, tl.int32)
    planes = (zero,) * PLANES
    for _ in tl.range(0, n_workers, loop_unroll_factor=4):
        planes = add_bits(planes, tl.load(word_ptrs, mask=mask, other=0).to(tl.int32), PLANES)
        word_ptrs += row_stride
    return planes


@triton.jit
def add_bits(planes, carry, PLANES: tl.constexpr):
    """Add one bit to each counter: a ripple of half adders."""
    sums = planes[:0]
    for k in tl.static_range(PLANES):
        sums += (planes[k] ^ carry,)
        carry = planes[k] & carry
    return sums


@triton.jit
def compare_planes(planes, number, PLANES: tl.constexpr):
    """Words whose bits say count > number, and count == number."""
    more = planes[0] ^ planes[0]
    equal = ~more
    for k in tl.static_range(PLANES - 1, -1, -1):
        wanted = -((number >> k) & 1)
        more = more | (equal & planes[k] & ~wanted)
        equal = equal & ~(planes[k] ^ wanted)
    return more, equal


@triton.jit
def count_bits(word):
    """int32 number of ones in each int32 word."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """See `lioncub.kernels.reference.majority_vote`; whole words where addresses allow, else bytes."""
    n_workers, n_bytes = packed.shape
    if not n_bytes:
        return
    if all(step % 4 == 0 for step in (n_bytes, packed.stride(0), packed.data_ptr(), out.data_ptr())):
        packed, out = packed.view(torch.int32), out.view(torch.int32)
    n_words = out.numel()
    with launching_on(out):
        _vote_majority_kernel[tiles(n_words, _WORDS_PER_TILE)](
            packed,
            out,
            out if counts is None else counts,
            packed.stride(0),
            parity,
            n_workers,
            n_words,
            n_workers.bit_length(),
            counts is not None,
            _WORDS_PER_TILE,
            **options(out.device),
        )
