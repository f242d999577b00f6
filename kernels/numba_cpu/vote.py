"""majority_vote in Numba: a bit-sliced counter of carry-save adders, on blocks of words in the L1 cache.

Plane k holds bit k of the number of ones of every code. Voters are added two at a time into plane 0, whose carries,
of weight 2, are again added two at a time into plane 1, and so on: N - 1 full adders of five operations for N
voters (Harley and Seal's counter; Knuth, The Art of Computer Programming 7.1.3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.bits import count_ones
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.numba_cpu.signs import parity_word
from lioncub.kernels.numba_cpu.threads import MIN_SLICE, run_slices, slices

# words of a row per block: with 8 voters the planes and waiting carries take 16 KiB
_BLOCK = 256


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of each column of packed[N, B]; counts[2] += (ties, unanimous codes), pads included."""
    words, tail = divmod(out.numel(), 8)
    if words:
        _vote(packed, words, parity, out, counts, 0)
    if tail:
        # the last bytes are voted on in words of their own, whose pad codes are unanimous but not counted
        padded = torch.zeros(packed.shape[0], 8, dtype=torch.uint8)
        padded[:, :tail] = packed[:, 8 * words :]
        voted = torch.empty(8, dtype=torch.uint8)
        _vote(padded, 1, parity, voted, counts, 64 - 8 * tail)
        out[8 * words :] = voted[:tail]


def _vote(packed: Tensor, words: int, parity: int, out: Tensor, counts: Tensor | None, pads: int) -> None:
    parts = slices(words, 1, MIN_SLICE // 64)
    workers, stride = packed.shape[0], packed.stride(0)
    counted = run_slices(
        _vote_kernel, parts, packed.data_ptr(), stride, workers, out.data_ptr(), parity, counts is not None
    )
    if counts is not None:
        ties, unanimous = (sum(part) for part in zip(*counted, strict=True))
        counts += torch.tensor([ties, unanimous - pads])


@kernel
def _vote_kernel(
    first: int, last: int, packed_ptr: int, stride: int, workers: int, out_ptr: int, parity: int, counting: bool
) -> tuple[int, int]:
    levels = 0
    while workers >> levels:
        levels += 1
    planes = np.empty((levels, _BLOCK), np.uint64)
    waiting = np.empty((levels + 1, _BLOCK), np.uint64)
    spare = np.zeros((3, _BLOCK), np.uint64)
    undecided = parity_word(parity)
    ties, unanimous = 0, 0
    for start in range(first, last, _BLOCK):
        n = min(_BLOCK, last - start)
        _count_voters(packed_ptr, stride, workers, levels, start, n, planes, waiting, spare)
        out = array_at(out_ptr, start, n, WORDS)
        ties += _decide(planes, workers, levels, n, undecided, out, spare[0], spare[1], counting)
        if counting:
            unanimous += _count_unanimous(planes, workers, levels, n, spare[0], spare[1])
    return ties, unanimous


@device_function
def _count_voters(
    packed_ptr: int, stride: int, workers: int, levels: int, start: int, n: int, planes: Any, waiting: Any, spare: Any
) -> None:
    """planes = number of ones among the voters' words [start, start + n), bit-sliced."""
    occupied = np.zeros(levels + 1, np.bool_)
    planes[:, :n] = 0
    zeros = spare[2]
    for worker in range(0, workers - 1, 2):
        one = array_at(packed_ptr + worker * stride, start, n, WORDS)
        other = array_at(packed_ptr + (worker + 1) * stride, start, n, WORDS)
        _add(planes[0], one, other, _free(1, occupied, waiting, spare), n)
        _carry(1, occupied, planes, waiting, spare, n)
    if workers & 1:
        one = array_at(packed_ptr + (workers - 1) * stride, start, n, WORDS)
        _add(planes[0], one, zeros, _free(1, occupied, waiting, spare), n)
        _carry(1, occupied, planes, waiting, spare, n)
    for level in range(1, levels):
        if occupied[level]:
            spare[level & 1, :n] = 0
            _carry(level, occupied, planes, waiting, spare, n)


@device_function
def _free(level: int, occupied: Any, waiting: Any, spare: Any) -> Any:
    """Where a carry into ``level`` goes: to wait for a second one, or to be added with the one that waits."""
    return spare[level & 1] if occupied[level] else waiting[level]


@device_function
def _carry(level: int, occupied: Any, planes: Any, waiting: Any, spare: Any, n: int) -> None:
    """Account for a carry that was put at `_free` (level): add pairs of carries for as long as there are two."""
    while occupied[level]:
        _add(planes[level], waiting[level], spare[level & 1], _free(level + 1, occupied, waiting, spare), n)
        occupied[level] = False
        level += 1
    occupied[level] = True


@device_function
def _add(plane: Any, one: Any, other: Any, carry: Any, n: int) -> None:
    """Full adders: plane + one + other = plane + 2*carry."""
    for j in range(n):
        odd = plane[j] ^ one[j]
        carry[j] = (plane[j] & one[j]) | (odd & other[j])
        plane[j] = odd ^ other[j]


@device_function
def _decide(
    planes: Any,
    workers: int,
    levels: int,
    n: int,
    undecided: np.uint64,
    out: Any,
    more: Any,
    equal: Any,
    counting: bool,
) -> int:
    """out = 1 where the count exceeds half of ``workers``, the parity bit where it is half; the number of ties."""
    half = workers >> 1
    more[:n] = 0
    equal[:n] = ~np.uint64(0)
    for k in range(levels):
        level = levels - 1 - k
        _compare(planes[level], (half >> level) & 1, more, equal, n)
    if workers & 1:
        out[:] = more[:n]
        return 0
    ties = 0
    for j in range(n):
        out[j] = more[j] | (equal[j] & undecided)
    if counting:
        for j in range(n):
            ties += count_ones(equal[j])
    return ties


@device_function
def _compare(plane: Any, bit: int, more: Any, equal: Any, n: int) -> None:
    """One bit, from the highest down, of the comparison of counts with a number."""
    if bit:
        for j in range(n):
            equal[j] &= plane[j]
    else:
        for j in range(n):
            more[j] |= equal[j] & plane[j]
            equal[j] &= ~plane[j]


@device_function
def _count_unanimous(planes: Any, workers: int, levels: int, n: int, none: Any, everyone: Any) -> int:
    none[:n] = ~np.uint64(0)
    everyone[:n] = ~np.uint64(0)
    for level in range(levels):
        wanted = ~np.uint64(0) if (workers >> level) & 1 else np.uint64(0)
        for j in range(n):
            none[j] &= ~planes[level, j]
            everyone[j] &= ~(planes[level, j] ^ wanted)
    unanimous = 0
    for j in range(n):
        unanimous += count_ones(none[j] | everyone[j])
    return unanimous
