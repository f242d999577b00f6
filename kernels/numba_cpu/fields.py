"""majority_of_fields, add_codes and ternary_of_fields: 64 bits of fields at a time.

Codes are moved into wider fields in halvings: the upper half of a word's codes to where it belongs, then the upper
half of each half, and so on; bits of wide fields are moved together the other way round. For arithmetic, every other
field is masked out, so that its bits take the carry of its neighbour. Words of fields are added as whole numbers, since
no field ever carries into the next.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import block_function, device_function, kernel
from lioncub.kernels.numba_cpu.launch import run_sliced
from lioncub.kernels.numba_cpu.memory import WIDE_CODES, WORDS, array_at
from lioncub.kernels.numba_cpu.planes import BLOCK, in_chunks
from lioncub.kernels.numba_cpu.vectors import count_ones, pack_codes, unpack_codes

CHUNKS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: WORDS}
_ALL = 2**64 - 1
# fields of 2 bits, the narrowest that are moved, take 5 halvings
_STEPS = 5
# fields whose signs are looked at together
_GROUP = 64
_Words = tuple[np.uint64, ...]


def majority_of_fields(
    fields: Tensor, field_bits: int, voters: int, parity: int, out: Tensor, counts: Tensor | None
) -> None:
    """out[B] = majority bit of 8*B fields, each the number of ones of ``voters``; counts as in majority_vote."""
    chunk_bytes, words_per_chunk = max(8 // field_bits, 1), max(field_bits // 8, 1)
    rule = (_thresholds(field_bits, voters, parity), *_folding(field_bits))

    def vote(fields: Tensor, chunks: int, out: Tensor, pads: int) -> list[tuple[int, int]]:
        how = (out.data_ptr(), CHUNKS[chunk_bytes], counts is not None, *_alike(field_bits, voters))
        found = run_sliced(_majority_kernel, chunks, fields.data_ptr(), words_per_chunk, *rule, *how, unit=64)
        # pad fields are unanimous
        return [*found, (0, -8 * pads)]

    in_chunks(vote, fields, out, counts, (chunk_bytes * field_bits, chunk_bytes))


def add_codes(packed: Tensor, bits: int, field_bits: int, out: Tensor) -> None:
    """out[B*field_bits//bits] = the sum over rows of each code of packed[G, B], in a field of field_bits bits."""
    if field_bits == 16 * bits:
        # less than a byte of codes makes a word of such fields, so they go through narrower ones
        narrow = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.uint8, device="cpu")
        for row, wider in zip(packed, narrow, strict=True):
            add_codes(row.unsqueeze(0), bits, 2 * bits, wider)
        packed, bits = narrow, 2 * bits
    rows = (packed.data_ptr(), packed.stride(0), len(packed), CHUNKS[8 * bits // field_bits])
    run_sliced(_add_kernel, out.numel() // 8, *rows, *_spreading(bits, field_bits), out.data_ptr(), unit=64)


def ternary_of_fields(
    fields: Tensor, field_bits: int, step: int, offset: int, largest: int, out: Tensor, counts: Tensor | None
) -> None:
    """out[n/4] = 1 + sign(step*field - offset) in 2 bits; counts[2] += (signs of 0, fields of 0 or ``largest``)."""

    def vote(fields: Tensor, groups: int, out: Tensor, pads: int) -> list[tuple[int, int]]:
        how = (field_bits, step, offset, largest, out.data_ptr(), _GROUP - 4 * pads)
        return run_sliced(_ternary_kernel, groups, fields.data_ptr(), *how, unit=_GROUP)

    in_chunks(vote, fields, out, counts, (8 * field_bits, _GROUP // 4))


@functools.cache
def _spreading(bits: int, field_bits: int) -> tuple[_Words, _Words]:
    """Return shifts and masks that move the 64/field_bits codes at the bottom of a word into fields."""
    codes, steps = 64 // field_bits, []
    while codes > 1:
        codes //= 2
        steps.append((codes * (field_bits - bits), _repeat(codes * bits, codes * field_bits)))
    return _words(steps)


@functools.cache
def _folding(field_bits: int) -> tuple[_Words, _Words]:
    """Return shifts and masks that move the lowest bits of a word's fields together at the bottom."""
    codes, steps = 1, []
    while codes * field_bits < 64 and field_bits > 1:
        steps.append((codes * (field_bits - 1), _repeat(2 * codes, 2 * codes * field_bits)))
        codes *= 2
    return _words(steps)


@functools.cache
def _thresholds(field_bits: int, voters: int, parity: int) -> _Words:
    """Field width, every other field, its lowest bit, and what makes even and odd fields carry where they win."""
    half, even_number = voters // 2, voters % 2 == 0
    # a tied field wins where its parity bit is 1, which is where it wins with half the votes
    least = [half + 1 - (even_number and (field + parity) % 2) for field in (0, 1)]
    ones = _repeat(1, 2 * field_bits)
    carrying = [(2**field_bits - count) * ones for count in least]
    return tuple(map(np.uint64, (field_bits, _repeat(field_bits, 2 * field_bits), ones, *carrying)))


@functools.cache
def _alike(field_bits: int, voters: int) -> tuple[bool, _Words]:
    """Whether ties exist, and words whose every other field is half of, none of and all of the voters."""
    ones = _repeat(1, 2 * field_bits)
    return voters % 2 == 0, tuple(np.uint64(number * ones) for number in (voters // 2, 0, voters))


def _repeat(width: int, period: int) -> int:
    """Return a word of ``width`` ones in every ``period`` bits, from the lowest up."""
    return sum((2**width - 1) << place for place in range(0, 64, period))


def _words(steps: list[tuple[int, int]]) -> tuple[_Words, _Words]:
    # a shift by 0 under a full mask changes nothing, and a fixed number of steps is compiled without a loop
    padded = steps + [(0, _ALL)] * (_STEPS - len(steps))
    return tuple(np.uint64(shift) for shift, _ in padded), tuple(np.uint64(mask) for _, mask in padded)


@kernel
def _majority_kernel(
    first: int,
    last: int,
    fields_ptr: int,
    words_per_chunk: int,
    rule: _Words,
    shifts: _Words,
    masks: _Words,
    out_ptr: int,
    chunk: Any,
    counting: bool,
    can_tie: bool,
    numbers: _Words,
) -> tuple[int, int]:
    ties, unanimous = 0, 0
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        words = array_at(fields_ptr, start * words_per_chunk, n * words_per_chunk, WORDS)
        out = array_at(out_ptr, start, n, chunk)
        if words_per_chunk == 1:
            for j in range(n):
                out[j] = _fold(_winners(words[j], rule), shifts, masks)
        else:
            for j in range(n):
                low = _fold(_winners(words[2 * j], rule), shifts, masks)
                out[j] = low | _fold(_winners(words[2 * j + 1], rule), shifts, masks) << np.uint64(4)
        if counting:
            unanimous += _count_fields(words, n * words_per_chunk, rule, numbers[1], numbers[2])
            if can_tie:
                ties += _count_fields(words, n * words_per_chunk, rule, numbers[0], numbers[0])
    return ties, unanimous


@device_function
def _spread_word(word: np.uint64, shifts: _Words, masks: _Words) -> np.uint64:
    """Return the codes at the bottom of a word, in fields; as `_spreading` says."""
    word = (word | (word << shifts[0])) & masks[0]
    word = (word | (word << shifts[1])) & masks[1]
    word = (word | (word << shifts[2])) & masks[2]
    word = (word | (word << shifts[3])) & masks[3]
    return (word | (word << shifts[4])) & masks[4]


@device_function
def _fold(word: np.uint64, shifts: _Words, masks: _Words) -> np.uint64:
    """Return the lowest bits of the fields, moved together; their other bits are zero."""
    word = (word | (word >> shifts[0])) & masks[0]
    word = (word | (word >> shifts[1])) & masks[1]
    word = (word | (word >> shifts[2])) & masks[2]
    word = (word | (word >> shifts[3])) & masks[3]
    return (word | (word >> shifts[4])) & masks[4]


@device_function
def _winners(word: np.uint64, rule: _Words) -> np.uint64:
    """Return a 1 in the lowest bit of each field that wins the vote."""
    width, every_other, lowest, even, odd = rule
    # a field and its number carry into the next field, which is masked out; for odd ones that is their own place
    even_wins = (((word & every_other) + even) >> width) & lowest
    return even_wins | ((((word >> width) & every_other) + odd) & (lowest << width))


@block_function
def _count_fields(words: Any, n: int, rule: _Words, one: np.uint64, other: np.uint64) -> int:
    """Number of fields that are as in word ``one`` or as in ``other``."""
    width, every_other, lowest, _, _ = rule
    upper = lowest << width
    found = 0
    for j in range(n):
        even, odd = words[j] & every_other, (words[j] >> width) & every_other
        # what differs from a number in any bit carries
        even_differs = ((even ^ one) + every_other) & ((even ^ other) + every_other)
        odd_differs = ((odd ^ one) + every_other) & ((odd ^ other) + every_other)
        found += count_ones((~even_differs & upper) | ((~odd_differs & upper) >> width))
    return found


@kernel
def _add_kernel(
    first: int,
    last: int,
    packed_ptr: int,
    stride: int,
    n_rows: int,
    chunk: Any,
    shifts: _Words,
    masks: _Words,
    out_ptr: int,
) -> None:
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        out, first_row = array_at(out_ptr, start, n, WORDS), array_at(packed_ptr, start, n, chunk)
        for j in range(n):
            out[j] = _spread_word(np.uint64(first_row[j]), shifts, masks)
        for row in range(1, n_rows):
            chunks = array_at(packed_ptr + row * stride, start, n, chunk)
            for j in range(n):
                out[j] += _spread_word(np.uint64(chunks[j]), shifts, masks)


@kernel
def _ternary_kernel(
    first: int,
    last: int,
    fields_ptr: int,
    field_bits: int,
    step: int,
    offset: int,
    largest: int,
    out_ptr: int,
    counted: int,
) -> tuple[int, int]:
    codes, signs = np.empty(_GROUP, np.uint8), np.empty(_GROUP, np.uint8)
    factor, less, most = np.int32(step), np.int32(offset), np.int32(largest)
    ties, unanimous = 0, 0
    for group in range(first, last):
        if field_bits == 16:
            wide = array_at(fields_ptr, group * _GROUP, _GROUP, WIDE_CODES)
            found = _signs_of(wide, factor, less, most, signs, counted)
        else:
            unpack_codes(array_at(fields_ptr, group * field_bits, field_bits, WORDS), field_bits, codes)
            found = _signs_of(codes, factor, less, most, signs, counted)
        ties += found[0]
        unanimous += found[1]
        pack_codes(signs, 2, array_at(out_ptr, 2 * group, 2, WORDS))
    return ties, unanimous


@device_function
def _signs_of(
    fields: Any, step: np.int32, offset: np.int32, largest: np.int32, signs: Any, counted: int
) -> tuple[int, int]:
    """signs[64] = 1 + sign of each field's sum; (sums of 0, least and largest sums) among the first ``counted``."""
    ties, unanimous = np.int32(0), np.int32(0)
    for j in range(_GROUP):
        total = np.int32(np.int32(np.int32(fields[j]) * step) - offset)
        signs[j] = np.uint8(1) + np.uint8(total > 0) - np.uint8(total < 0)
    for j in range(counted):
        field = np.int32(fields[j])
        ties += np.int32(np.int32(np.int32(field * step) - offset) == 0)
        unanimous += np.int32((field == 0) | (field == largest))
    return int(ties), int(unanimous)
