"""majority_vote in Numba: a bit-sliced counter of carry-save adders, on blocks of words in the L1 cache.

Plane k holds bit k of the number of ones of every code. Eight rows at a time are counted in registers, with full
adders (Harley and Seal's counter; Warren, Hacker's Delight, 5-1), and added to the planes. The planes are compared
with half the number of voters bit by bit, from the highest down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.bits import count_ones
from lioncub.kernels.numba_cpu.compiling import block_function, device_function, kernel
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.numba_cpu.signs import parity_word
from lioncub.kernels.numba_cpu.threads import MIN_SLICE, run_slices, slices

# words per block: 512 bytes of each row, so that rows a power of two apart do not evict one another
_BLOCK = 64
_ROW = 8 * _BLOCK
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)


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
    # as addresses, since arrays that own memory are counted by atomic operations whenever they are passed on
    memory = np.zeros((max(levels, 4) + 4 + 3) * _BLOCK, np.uint64)
    planes = memory.ctypes.data
    group = planes + max(levels, 4) * _ROW
    spare = group + 4 * _ROW
    undecided = parity_word(parity)
    ties, unanimous = 0, 0
    for start in range(first, last, _BLOCK):
        n = min(_BLOCK, last - start)
        _count_voters(packed_ptr + 8 * start, stride, workers, levels, n, planes, group, spare)
        ties += _decide(planes, workers, levels, n, undecided, out_ptr + 8 * start, spare, counting)
        if counting:
            unanimous += _count_unanimous(planes, workers, levels, n, spare)
    return ties, unanimous


@device_function
def _count_voters(
    row: int, stride: int, workers: int, levels: int, n: int, planes: int, group: int, spare: int
) -> None:
    """Planes = number of ones in each code of n words of ``workers`` rows."""
    zeros = spare + 2 * _ROW
    _fill(zeros, np.uint64(0), n)
    _count_eight(row, stride, workers, zeros, n, planes)
    for level in range(4, levels):
        _fill(planes + level * _ROW, np.uint64(0), n)
    for worker in range(8, workers, 8):
        _count_eight(row + worker * stride, stride, workers - worker, zeros, n, group)
        carry = zeros
        for level in range(levels):
            # two spare rows by turns: one is read while the other is written
            above = spare + (level & 1) * _ROW
            _add(planes + level * _ROW, group + level * _ROW if level < 4 else zeros, carry, above, n)
            carry = above


@device_function
def _count_eight(row: int, stride: int, workers: int, zeros: int, n: int, planes: int) -> None:
    """Four planes = number of ones in each code of up to eight rows, counted in registers."""
    r0 = array_at(row, 0, n, WORDS)
    r1 = array_at(row + stride if workers > 1 else zeros, 0, n, WORDS)
    r2 = array_at(row + 2 * stride if workers > 2 else zeros, 0, n, WORDS)
    r3 = array_at(row + 3 * stride if workers > 3 else zeros, 0, n, WORDS)
    r4 = array_at(row + 4 * stride if workers > 4 else zeros, 0, n, WORDS)
    r5 = array_at(row + 5 * stride if workers > 5 else zeros, 0, n, WORDS)
    r6 = array_at(row + 6 * stride if workers > 6 else zeros, 0, n, WORDS)
    r7 = array_at(row + 7 * stride if workers > 7 else zeros, 0, n, WORDS)
    out = array_at(planes, 0, 4 * _BLOCK, WORDS)
    for j in range(n):
        one_a, two_a = _full_adder(r0[j], r1[j], r2[j])
        one_b, two_b = _full_adder(r3[j], r4[j], r5[j])
        one_c, two_c = _full_adder(r6[j], r7[j], one_a)
        one, two_d = one_b ^ one_c, one_b & one_c
        two_e, four_a = _full_adder(two_a, two_b, two_c)
        two, four_b = two_d ^ two_e, two_d & two_e
        out[j] = one
        out[j + _BLOCK] = two
        out[j + 2 * _BLOCK] = four_a ^ four_b
        out[j + 3 * _BLOCK] = four_a & four_b


@device_function
def _full_adder(a: np.uint64, b: np.uint64, c: np.uint64) -> tuple[np.uint64, np.uint64]:
    """a + b + c = first + 2*second, in each bit."""
    odd = a ^ b
    return odd ^ c, (a & b) | (odd & c)


@block_function
def _add(plane_ptr: int, one_ptr: int, other_ptr: int, carry_ptr: int, n: int) -> None:
    """Full adders: plane + one + other = plane + 2*carry."""
    plane, carry = array_at(plane_ptr, 0, n, WORDS), array_at(carry_ptr, 0, n, WORDS)
    one, other = array_at(one_ptr, 0, n, WORDS), array_at(other_ptr, 0, n, WORDS)
    for j in range(n):
        plane[j], carry[j] = _full_adder(plane[j], one[j], other[j])


@device_function
def _decide(
    planes: int, workers: int, levels: int, n: int, undecided: np.uint64, out_ptr: int, spare: int, counting: bool
) -> int:
    """out = 1 where the count exceeds half of ``workers``, the parity bit where it is half; the number of ties."""
    half = workers >> 1
    more, equal, out = array_at(spare, 0, n, WORDS), array_at(spare + _ROW, 0, n, WORDS), array_at(out_ptr, 0, n, WORDS)
    _fill(spare, np.uint64(0), n)
    _fill(spare + _ROW, _ONES, n)
    for k in range(levels):
        level = levels - 1 - k
        plane = array_at(planes + level * _ROW, 0, n, WORDS)
        if (half >> level) & 1:
            for j in range(n):
                equal[j] &= plane[j]
        else:
            for j in range(n):
                more[j] |= equal[j] & plane[j]
                equal[j] &= ~plane[j]
    if workers & 1:
        undecided = np.uint64(0)
        counting = False
    for j in range(n):
        out[j] = more[j] | (equal[j] & undecided)
    return _count(equal, n) if counting else 0


@block_function
def _count_unanimous(planes: int, workers: int, levels: int, n: int, spare: int) -> int:
    none, everyone = array_at(spare, 0, n, WORDS), array_at(spare + _ROW, 0, n, WORDS)
    _fill(spare, _ONES, n)
    _fill(spare + _ROW, _ONES, n)
    for level in range(levels):
        plane = array_at(planes + level * _ROW, 0, n, WORDS)
        different = np.uint64(0) if (workers >> level) & 1 else _ONES
        for j in range(n):
            none[j] &= ~plane[j]
            everyone[j] &= plane[j] ^ different
    unanimous: int = _count(none, n) + _count(everyone, n)
    return unanimous


@device_function
def _fill(row_ptr: int, word: np.uint64, n: int) -> None:
    row = array_at(row_ptr, 0, n, WORDS)
    for j in range(n):
        row[j] = word


@block_function
def _count(row: Any, n: int) -> int:
    ones = 0
    for j in range(n):
        ones += count_ones(row[j])
    return ones
