"""majority_vote, count_votes and majority_of_counts: counts in bit planes in the L1 cache, block by block."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from lioncub.kernels.layout import counter_planes
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import run_sliced
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.numba_cpu.planes import (
    BLOCK,
    ROW,
    add_planes,
    add_two,
    count_unanimous,
    count_voters,
    decide,
    fill,
    in_chunks,
)
from lioncub.kernels.numba_cpu.signs import parity_word


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of each column of packed[N, B]; counts[2] += (ties, unanimous codes), pads included."""

    def vote(packed: Tensor, words: int, out: Tensor, pads: int) -> list[tuple[int, int]]:
        source = (packed.data_ptr(), packed.stride(0), packed.shape[0])
        # pad codes are unanimous
        how = (out.data_ptr(), parity, counts is not None)
        return [*run_sliced(_vote_kernel, words, *source, *how, unit=64), (0, -8 * pads)]

    in_chunks(vote, packed, out, counts)


def count_votes(packed: Tensor, out: Tensor) -> None:
    """out[P, B] = bit planes of the number of ones in each code of packed[N, B]."""

    def count(packed: Tensor, words: int, out: Tensor, pads: int) -> None:
        source, target = (packed.data_ptr(), packed.stride(0), packed.shape[0]), (out.data_ptr(), out.stride(0))
        run_sliced(_count_kernel, words, *source, *target, unit=64)

    in_chunks(count, packed, out)


def majority_of_counts(planes: Tensor, voters: int, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of the counts in planes[G, P, B], summed over G; counts as in majority_vote."""
    groups, group_planes = planes.shape[:2]
    levels = counter_planes(groups * (2**group_planes - 1))

    def vote(planes: Tensor, words: int, out: Tensor, pads: int) -> list[tuple[int, int]]:
        source = (planes.data_ptr(), *planes.stride()[:2], groups, group_planes, levels, voters)
        how = (out.data_ptr(), parity, counts is not None)
        return [*run_sliced(_sum_kernel, words, *source, *how, unit=64), (0, -8 * pads)]

    in_chunks(vote, planes, out, counts)


@kernel
def _vote_kernel(
    first: int, last: int, packed_ptr: int, stride: int, workers: int, out_ptr: int, parity: int, counting: bool
) -> tuple[int, int]:
    levels = _levels_of(workers)
    # as addresses, since arrays that own memory are counted by atomic operations whenever they are passed on
    memory = np.zeros((max(levels, 4) + 4 + 3) * BLOCK, np.uint64)
    planes = memory.ctypes.data
    group = planes + max(levels, 4) * ROW
    spare = group + 4 * ROW
    undecided = parity_word(parity)
    ties, unanimous = 0, 0
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        count_voters(packed_ptr + 8 * start, stride, workers, levels, n, planes, group, spare)
        ties += decide(planes, workers, levels, n, undecided, out_ptr + 8 * start, spare, counting)
        if counting:
            unanimous += count_unanimous(planes, workers, levels, n, spare)
    return ties, unanimous


@kernel
def _count_kernel(
    first: int, last: int, packed_ptr: int, stride: int, workers: int, out_ptr: int, out_stride: int
) -> None:
    levels = _levels_of(workers)
    memory = np.zeros((max(levels, 4) + 4 + 3) * BLOCK, np.uint64)
    planes = memory.ctypes.data
    group = planes + max(levels, 4) * ROW
    spare = group + 4 * ROW
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        count_voters(packed_ptr + 8 * start, stride, workers, levels, n, planes, group, spare)
        for level in range(levels):
            _copy(planes + level * ROW, out_ptr + level * out_stride + 8 * start, n)


@kernel
def _sum_kernel(
    first: int,
    last: int,
    planes_ptr: int,
    group_stride: int,
    plane_stride: int,
    groups: int,
    group_planes: int,
    levels: int,
    voters: int,
    out_ptr: int,
    parity: int,
    counting: bool,
) -> tuple[int, int]:
    memory = np.zeros((max(levels, 5) + 5 + 3) * BLOCK, np.uint64)
    planes = memory.ctypes.data
    pair = planes + max(levels, 5) * ROW
    spare = pair + 5 * ROW
    undecided = parity_word(parity)
    ties, unanimous = 0, 0
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        source = planes_ptr + 8 * start
        _add_groups(source, group_stride, plane_stride, groups, group_planes, levels, n, planes, pair, spare)
        ties += decide(planes, voters, levels, n, undecided, out_ptr + 8 * start, spare, counting)
        if counting:
            unanimous += count_unanimous(planes, voters, levels, n, spare)
    return ties, unanimous


@device_function
def _levels_of(workers: int) -> int:
    """Return planes of a count up to ``workers``."""
    levels = 0
    while workers >> levels:
        levels += 1
    return levels


@device_function
def _add_groups(
    source: int,
    group_stride: int,
    plane_stride: int,
    groups: int,
    group_planes: int,
    levels: int,
    n: int,
    planes: int,
    pair: int,
    spare: int,
) -> None:
    """Set planes to the sum of all groups' counts, two groups at a time where they have few planes."""
    zeros = spare + 2 * ROW
    few = group_planes <= 4
    fill(zeros, np.uint64(0), n)
    for level in range(5 if few else 0, levels):
        fill(planes + level * ROW, np.uint64(0), n)
    for group in range(0, groups, 2 if few else 1):
        one = source + group * group_stride
        if few:
            other, other_stride = (one + group_stride, plane_stride) if group + 1 < groups else (zeros, 0)
            add_two(one, plane_stride, other, other_stride, group_planes, n, zeros, pair if group else planes)
        if group or not few:
            others, stride, n_others = (pair, ROW, 5) if few else (one, plane_stride, group_planes)
            add_planes(planes, levels, others, stride, n_others, n, zeros, spare)


@device_function
def _copy(source_ptr: int, target_ptr: int, n: int) -> None:
    source, target = array_at(source_ptr, 0, n, WORDS), array_at(target_ptr, 0, n, WORDS)
    for j in range(n):
        target[j] = source[j]
