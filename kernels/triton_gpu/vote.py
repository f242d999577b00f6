"""Votes on packed words: bit planes of counts, 32 codes at a time, added and compared without unpacking them.

Bit k of the count of each code is in plane k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.layout import counter_planes
from lioncub.kernels.triton_gpu.launch import ROW_THREADS, run
from lioncub.kernels.triton_gpu.rows import parity_of

# 128 bits per thread
WORDS_PER_TILE = 4 * ROW_THREADS


def in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return views of uint8 tensors as int32, where the addresses, rows and strides of all allow, else the tensors."""
    return in_units(*tensors)[0]


def in_units(*tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """`in_words`, and how many words a kernel may take at a time: 4, where all is aligned to 128 bits, or 1.

    A kernel that is given sizes and strides in units knows that they are multiples of it, whatever they are.
    """
    unit = _unit(*tensors)
    return tuple(t.view(torch.int32) for t in tensors) if unit >= 4 else tensors, 4 if unit == 16 else 1


def _unit(*tensors: Tensor) -> int:
    """Return the most bytes, of 16, 4 and 1, that divide the addresses, rows and strides of all tensors."""
    places = [place for t in tensors for place in (t.data_ptr(), t.shape[-1], *t.stride()[:-1])]
    return next((unit for unit in (16, 4) if not any(place % unit for place in places)), 1)


@triton.jit
def count_rows(words_ptr, offsets, row_stride, n_rows, mask, PLANES: tl.constexpr):
    """int32 planes of the number of ones at each bit of ``n_rows`` words, ``row_stride`` apart.

    The pointer that the loop advances is a scalar: triton 3.6 and 3.7 keep a tensor of pointers in another layout than
    what is loaded, and exchange the planes through shared memory.
    """
    planes = no_planes(mask, PLANES)
    for _ in tl.range(0, n_rows, loop_unroll_factor=4):
        planes = add_bits(planes, tl.load(words_ptr + offsets, mask=mask, other=0).to(tl.int32), PLANES)
        words_ptr += row_stride
    return planes


@triton.jit
def no_planes(mask, PLANES: tl.constexpr):
    """int32 planes of zeros."""
    return (tl.zeros(mask.shape, tl.int32),) * PLANES


@triton.jit
def add_bits(planes, carry, PLANES: tl.constexpr):
    """Add one bit to each counter: a ripple of half adders."""
    sums = planes[:0]
    for k in tl.static_range(PLANES):
        sums += (planes[k] ^ carry,)
        carry = planes[k] & carry
    return sums


@triton.jit
def add_planes(planes, words_ptr, offsets, plane_stride, mask, PLANES: tl.constexpr, ADDED: tl.constexpr):
    """Add counts of ADDED planes, ``plane_stride`` apart: a ripple of full adders."""
    sums = planes[:0]
    carry = tl.zeros(mask.shape, tl.int32)
    for k in tl.static_range(PLANES):
        if k < ADDED:
            added = tl.load(words_ptr + offsets, mask=mask, other=0).to(tl.int32)
            words_ptr += plane_stride
            odd = planes[k] ^ added
            sums += (odd ^ carry,)
            carry = (planes[k] & added) | (odd & carry)
        else:
            sums += (planes[k] ^ carry,)
            carry = planes[k] & carry
    return sums


@triton.jit
def compare_planes(planes, number, PLANES: tl.constexpr):
    """Return words whose bits say count > number, and count == number."""
    more = planes[0] ^ planes[0]
    equal = ~more
    for k in tl.static_range(PLANES - 1, -1, -1):
        wanted = -((number >> k) & 1)
        more = more | (equal & planes[k] & ~wanted)
        equal = equal & ~(planes[k] ^ wanted)
    return more, equal


@triton.jit
def store_majority(
    out_ptr, counts_ptr, offsets, mask, planes, n_workers, parity, PLANES: tl.constexpr, HAS_COUNTS: tl.constexpr
):
    """Store the majority of counts of ``n_workers``, and add the numbers of ties and of unanimous codes to counts."""
    more, tied = compare_planes(planes, n_workers // 2, PLANES)
    tied = tied & ((n_workers & 1) - 1)
    # bit j of a word is element j's, so a parity word serves every word
    parity_word = 0x55555555 ^ (parity_of(parity) - 1)
    tl.store(out_ptr + offsets, (more | (tied & parity_word)).to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_COUNTS:
        _, all_up = compare_planes(planes, n_workers, PLANES)
        _, all_down = compare_planes(planes, 0, PLANES)
        code_bits: tl.constexpr = 0xFF if out_ptr.dtype.element_ty.primitive_bitwidth == 8 else -1
        valid = tl.where(mask, code_bits, 0)
        tl.atomic_add(counts_ptr, tl.sum(count_bits(tied & valid)).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.sum(count_bits((all_up | all_down) & valid)).to(tl.int64))


@triton.jit
def count_bits(word):
    """int32 number of ones in each int32 word."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit(do_not_specialize=["row_units", "parity", "n_workers", "n_units"])
def _vote_majority_kernel(
    packed_ptr,
    out_ptr,
    counts_ptr,
    row_units,
    parity,
    n_workers,
    n_units,
    PLANES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_units.to(tl.int64) * UNIT
    planes = count_rows(packed_ptr, offsets, row_units.to(tl.int64) * UNIT, n_workers, mask, PLANES)
    store_majority(out_ptr, counts_ptr, offsets, mask, planes, n_workers, parity, PLANES, HAS_COUNTS)


@triton.jit(do_not_specialize=["row_units", "plane_units", "n_workers", "n_units"])
def _count_votes_kernel(
    packed_ptr,
    out_ptr,
    row_units,
    plane_units,
    n_workers,
    n_units,
    PLANES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_units.to(tl.int64) * UNIT
    planes = count_rows(packed_ptr, offsets, row_units.to(tl.int64) * UNIT, n_workers, mask, PLANES)
    for k in tl.static_range(PLANES):
        tl.store(out_ptr + offsets, planes[k].to(out_ptr.dtype.element_ty), mask=mask)
        out_ptr += plane_units.to(tl.int64) * UNIT


@triton.jit(do_not_specialize=["group_units", "plane_units", "parity", "n_groups", "n_workers", "n_units"])
def _sum_counts_kernel(
    planes_ptr,
    out_ptr,
    counts_ptr,
    group_units,
    plane_units,
    parity,
    n_groups,
    n_workers,
    n_units,
    GROUP_PLANES: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_units.to(tl.int64) * UNIT
    planes = no_planes(mask, PLANES)
    for _ in tl.range(0, n_groups, loop_unroll_factor=2):
        planes = add_planes(planes, planes_ptr, offsets, plane_units.to(tl.int64) * UNIT, mask, PLANES, GROUP_PLANES)
        planes_ptr += group_units.to(tl.int64) * UNIT
    store_majority(out_ptr, counts_ptr, offsets, mask, planes, n_workers, parity, PLANES, HAS_COUNTS)


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """See `lioncub.kernels.reference.majority_vote`; whole words where addresses allow, else bytes."""
    (packed, out), unit = in_units(packed, out)
    n_workers, n_words = packed.shape
    pointers, numbers = (packed, out, out if counts is None else counts), (packed.stride(0) // unit, parity, n_workers)
    constants = (n_workers.bit_length(), counts is not None, unit)
    run(_vote_majority_kernel, n_words, WORDS_PER_TILE, out.device, *pointers, *numbers, n_words // unit, *constants)


def count_votes(packed: Tensor, out: Tensor) -> None:
    """See `lioncub.kernels.reference.count_votes`; whole words where addresses allow, else bytes."""
    (packed, out), unit = in_units(packed, out)
    n_workers, n_words = packed.shape
    numbers = (packed.stride(0) // unit, out.stride(0) // unit, n_workers, n_words // unit)
    run(_count_votes_kernel, n_words, WORDS_PER_TILE, out.device, packed, out, *numbers, out.shape[0], unit)


def majority_of_counts(planes: Tensor, voters: int, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """See `lioncub.kernels.reference.majority_of_counts`; whole words where addresses allow, else bytes."""
    (planes, out), unit = in_units(planes, out)
    groups, group_planes, n_words = planes.shape
    pointers, strides = (planes, out, out if counts is None else counts), [s // unit for s in planes.stride()[:2]]
    numbers = (*strides, parity, groups, voters, n_words // unit)
    constants = (group_planes, counter_planes(groups * (2**group_planes - 1)), counts is not None, unit)
    run(_sum_counts_kernel, n_words, WORDS_PER_TILE, out.device, *pointers, *numbers, *constants)
