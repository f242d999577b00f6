"""count_votes and majority_of_counts: bit planes stored, and loaded, summed and compared in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.layout import counter_planes
from lioncub.kernels.triton_gpu.launch import launching_on, options, tiles
from lioncub.kernels.triton_gpu.planes import (
    WORDS_PER_TILE,
    add_planes,
    count_rows,
    in_units,
    no_planes,
    store_majority,
)


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


def count_votes(packed: Tensor, out: Tensor) -> None:
    """See `lioncub.kernels.reference.count_votes`; whole words where addresses allow, else bytes."""
    (packed, out), unit = in_units(packed, out)
    n_workers, n_words = packed.shape
    with launching_on(out):
        _count_votes_kernel[tiles(n_words, WORDS_PER_TILE)](
            packed,
            out,
            packed.stride(0) // unit,
            out.stride(0) // unit,
            n_workers,
            n_words // unit,
            out.shape[0],
            unit,
            WORDS_PER_TILE,
            **options(out.device),
        )


def majority_of_counts(planes: Tensor, voters: int, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """See `lioncub.kernels.reference.majority_of_counts`; whole words where addresses allow, else bytes."""
    (planes, out), unit = in_units(planes, out)
    groups, group_planes, n_words = planes.shape
    with launching_on(out):
        _sum_counts_kernel[tiles(n_words, WORDS_PER_TILE)](
            planes,
            out,
            out if counts is None else counts,
            *(stride // unit for stride in planes.stride()[:2]),
            parity,
            groups,
            voters,
            n_words // unit,
            group_planes,
            counter_planes(groups * (2**group_planes - 1)),
            counts is not None,
            unit,
            WORDS_PER_TILE,
            **options(out.device),
        )
