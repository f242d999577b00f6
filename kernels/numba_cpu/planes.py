"""Bit planes: counted from rows of bits, added, and compared with half the voters, 64 codes at a time.

Plane k holds bit k of the number of ones of every code. Planes are in blocks of words in the L1 cache: plane k of a
block is ROW bytes behind plane k - 1. Eight rows at a time are counted in registers, with full adders (Harley and
Seal's counter; Warren, Hacker's Delight, 5-1). A comparison goes bit by bit, from the highest down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import block_function, device_function
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.numba_cpu.vectors import count_ones

# words per block: 512 bytes of each row, so that rows a power of two apart do not evict one another
BLOCK = 64
ROW = 8 * BLOCK
_ONES = np.uint64(0xFFFFFFFFFFFFFFFF)


def in_chunks(
    run: Callable[[Tensor, int, Tensor, int], Sequence[tuple[int, int]] | None],
    source: Tensor,
    out: Tensor,
    counts: Tensor | None = None,
    sizes: tuple[int, int] = (8, 8),
) -> None:
    """Call ``run(source, n_chunks, out, pads)`` for all whole chunks, and for what is behind them, padded with zeros.

    ``sizes`` are bytes of a chunk in the last dimension of source and of out; ``pads`` are the last bytes of out that
    stand for nothing. counts[2] += (ties, unanimous codes) of what the calls return.
    """
    source_bytes, out_bytes = sizes
    chunks, tail = divmod(out.shape[-1], out_bytes)
    counted: list[tuple[int, int]] = []
    if chunks:
        counted += run(source, chunks, out, 0) or ()
    if tail:
        padded = torch.zeros(*source.shape[:-1], source_bytes, dtype=torch.uint8, device="cpu")
        rest = source[..., source_bytes * chunks :]
        padded[..., : rest.shape[-1]] = rest
        written = torch.empty(*out.shape[:-1], out_bytes, dtype=torch.uint8, device="cpu")
        counted += run(padded, 1, written, out_bytes - tail) or ()
        out[..., out_bytes * chunks :] = written[..., :tail]
    if counts is not None:
        counts += torch.tensor([sum(part) for part in zip(*counted, strict=True)], dtype=torch.int64, device="cpu")


@device_function
def count_voters(row: int, stride: int, workers: int, levels: int, n: int, planes: int, group: int, spare: int) -> None:
    """Set planes to the number of ones in each code of n words of ``workers`` rows; at least four are written."""
    zeros = spare + 2 * ROW
    fill(zeros, np.uint64(0), n)
    _count_eight(row, stride, workers, zeros, n, planes)
    for level in range(4, levels):
        fill(planes + level * ROW, np.uint64(0), n)
    for worker in range(8, workers, 8):
        _count_eight(row + worker * stride, stride, workers - worker, zeros, n, group)
        add_planes(planes, levels, group, ROW, 4, n, zeros, spare)


@device_function
def add_planes(
    planes: int, levels: int, others: int, stride: int, n_others: int, n: int, zeros: int, spare: int
) -> None:
    """Add the ``n_others`` planes that are ``stride`` bytes apart; ``levels`` planes hold every carry."""
    carry = zeros
    for level in range(levels):
        # two spare rows by turns: one is read while the other is written
        above = spare + (level & 1) * ROW
        _add(planes + level * ROW, others + level * stride if level < n_others else zeros, carry, above, n)
        carry = above


@device_function
def add_two(
    one: int, stride: int, other: int, other_stride: int, n_planes: int, n: int, zeros: int, planes: int
) -> None:
    """Five planes = sum of two counts of up to four planes, added in registers."""
    a0, b0 = array_at(one, 0, n, WORDS), array_at(other, 0, n, WORDS)
    a1 = array_at(one + stride if n_planes > 1 else zeros, 0, n, WORDS)
    b1 = array_at(other + other_stride if n_planes > 1 else zeros, 0, n, WORDS)
    a2 = array_at(one + 2 * stride if n_planes > 2 else zeros, 0, n, WORDS)
    b2 = array_at(other + 2 * other_stride if n_planes > 2 else zeros, 0, n, WORDS)
    a3 = array_at(one + 3 * stride if n_planes > 3 else zeros, 0, n, WORDS)
    b3 = array_at(other + 3 * other_stride if n_planes > 3 else zeros, 0, n, WORDS)
    out = array_at(planes, 0, 5 * BLOCK, WORDS)
    for j in range(n):
        out[j] = a0[j] ^ b0[j]
        out[j + BLOCK], carry = _full_adder(a1[j], b1[j], a0[j] & b0[j])
        out[j + 2 * BLOCK], carry = _full_adder(a2[j], b2[j], carry)
        out[j + 3 * BLOCK], out[j + 4 * BLOCK] = _full_adder(a3[j], b3[j], carry)


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
    out = array_at(planes, 0, 4 * BLOCK, WORDS)
    for j in range(n):
        one_a, two_a = _full_adder(r0[j], r1[j], r2[j])
        one_b, two_b = _full_adder(r3[j], r4[j], r5[j])
        one_c, two_c = _full_adder(r6[j], r7[j], one_a)
        one, two_d = one_b ^ one_c, one_b & one_c
        two_e, four_a = _full_adder(two_a, two_b, two_c)
        two, four_b = two_d ^ two_e, two_d & two_e
        out[j] = one
        out[j + BLOCK] = two
        out[j + 2 * BLOCK] = four_a ^ four_b
        out[j + 3 * BLOCK] = four_a & four_b


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
def decide(
    planes: int, workers: int, levels: int, n: int, undecided: np.uint64, out_ptr: int, spare: int, counting: bool
) -> int:
    """out = 1 where the count exceeds half of ``workers``, the parity bit where it is half; the number of ties.

    The lowest four planes, which must exist, are compared in registers.
    """
    half = workers >> 1
    more, equal, out = array_at(spare, 0, n, WORDS), array_at(spare + ROW, 0, n, WORDS), array_at(out_ptr, 0, n, WORDS)
    fill(spare, np.uint64(0), n)
    fill(spare + ROW, _ONES, n)
    for k in range(levels - 4):
        level = levels - 1 - k
        plane, wanted = array_at(planes + level * ROW, 0, n, WORDS), _bit_word(half, level)
        for j in range(n):
            more[j], equal[j] = _compare(plane[j], wanted, more[j], equal[j])
    if workers & 1:
        undecided = np.uint64(0)
        counting = False
    low = array_at(planes, 0, 4 * BLOCK, WORDS)
    wanted_0, wanted_1, wanted_2, wanted_3 = _low_words(half)
    for j in range(n):
        above, same = _compare(low[j + 3 * BLOCK], wanted_3, more[j], equal[j])
        above, same = _compare(low[j + 2 * BLOCK], wanted_2, above, same)
        above, same = _compare(low[j + BLOCK], wanted_1, above, same)
        above, same = _compare(low[j], wanted_0, above, same)
        equal[j] = same
        out[j] = above | (same & undecided)
    return _count(equal, n) if counting else 0


@device_function
def _compare(plane: np.uint64, wanted: np.uint64, more: np.uint64, equal: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Whether counts are more than and equal to a number whose next lower bit is all of ``wanted``."""
    return more | (equal & plane & ~wanted), equal & ~(plane ^ wanted)


@device_function
def _bit_word(number: int, level: int) -> np.uint64:
    return _ONES if (number >> level) & 1 else np.uint64(0)


@device_function
def _low_words(number: int) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    return _bit_word(number, 0), _bit_word(number, 1), _bit_word(number, 2), _bit_word(number, 3)


@block_function
def count_unanimous(planes: int, workers: int, levels: int, n: int, spare: int) -> int:
    """Number of codes whose count is 0 or ``workers``; the lowest four planes must exist."""
    none, everyone = array_at(spare, 0, n, WORDS), array_at(spare + ROW, 0, n, WORDS)
    fill(spare, _ONES, n)
    fill(spare + ROW, _ONES, n)
    for level in range(4, levels):
        plane, wanted = array_at(planes + level * ROW, 0, n, WORDS), _bit_word(workers, level)
        for j in range(n):
            none[j] &= ~plane[j]
            everyone[j] &= ~(plane[j] ^ wanted)
    low = array_at(planes, 0, 4 * BLOCK, WORDS)
    wanted_0, wanted_1, wanted_2, wanted_3 = _low_words(workers)
    for j in range(n):
        p0, p1, p2, p3 = low[j], low[j + BLOCK], low[j + 2 * BLOCK], low[j + 3 * BLOCK]
        different = (p0 ^ wanted_0) | (p1 ^ wanted_1) | (p2 ^ wanted_2) | (p3 ^ wanted_3)
        none[j] = (none[j] & ~(p0 | p1 | p2 | p3)) | (everyone[j] & ~different)
    unanimous: int = _count(none, n)
    return unanimous


@device_function
def fill(row_ptr: int, word: np.uint64, n: int) -> None:
    row = array_at(row_ptr, 0, n, WORDS)
    for j in range(n):
        row[j] = word


@block_function
def _count(row: Any, n: int) -> int:
    ones = 0
    for j in range(n):
        ones += count_ones(row[j])
    return ones
