"""add_codes and ternary_of_fields in Numba.

Words of fields are added as whole numbers, since no field ever carries into the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.field_sums import CHUNKS, spread_codes, spread_word, spreading
from lioncub.kernels.numba_cpu.fields import pack_codes, unpack_codes
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.numba_cpu.planes import BLOCK, add_tally
from lioncub.kernels.numba_cpu.threads import MIN_SLICE, run_slices, slices

_WIDE = np.dtype(np.uint16)
# fields that are looked at together
_GROUP = 64


def add_codes(packed: Tensor, bits: int, field_bits: int, out: Tensor) -> None:
    """out[B*field_bits//bits] = the sum over rows of each code of packed[G, B], in a field of field_bits bits."""
    if field_bits == 16 * bits:
        # less than a byte of codes makes a word of such fields, so they go through narrower ones
        narrow = torch.empty(len(packed), 2 * packed.shape[1], dtype=torch.uint8, device="cpu")
        for row, wider in zip(packed, narrow, strict=True):
            spread_codes(row, bits, 2 * bits, wider)
        packed, bits = narrow, 2 * bits
    rows = (packed.data_ptr(), packed.stride(0), len(packed), CHUNKS[8 * bits // field_bits])
    parts = slices(out.numel() // 8, 1, MIN_SLICE // 64)
    run_slices(_add_kernel, parts, *rows, *spreading(bits, field_bits), out.data_ptr())


def ternary_of_fields(
    fields: Tensor, field_bits: int, step: int, offset: int, largest: int, out: Tensor, counts: Tensor | None
) -> None:
    """out[n/4] = 1 + sign(step*field - offset) in 2 bits; counts[2] += (signs of 0, fields of 0 or ``largest``)."""
    groups, rest = divmod(4 * out.numel(), _GROUP)
    rule = (field_bits, step, offset, largest)
    counted = []
    if groups:
        parts = slices(groups, 1, MIN_SLICE // _GROUP)
        counted = run_slices(_ternary_kernel, parts, fields.data_ptr(), *rule, out.data_ptr(), _GROUP)
    if rest:
        padded, codes = (
            torch.zeros(8 * field_bits, dtype=torch.uint8, device="cpu"),
            torch.empty(16, dtype=torch.uint8, device="cpu"),
        )
        padded[: rest * field_bits // 8] = fields[groups * 8 * field_bits :]
        counted += run_slices(_ternary_kernel, [(0, 1)], padded.data_ptr(), *rule, codes.data_ptr(), rest)
        out[16 * groups :] = codes[: rest // 4]
    add_tally(counts, counted, 0)


@kernel
def _add_kernel(
    first: int,
    last: int,
    packed_ptr: int,
    stride: int,
    n_rows: int,
    chunk: Any,
    shifts: tuple[np.uint64, ...],
    masks: tuple[np.uint64, ...],
    out_ptr: int,
) -> None:
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        out = array_at(out_ptr, start, n, WORDS)
        out[:] = 0
        for row in range(n_rows):
            chunks = array_at(packed_ptr + row * stride, start, n, chunk)
            for j in range(n):
                out[j] += spread_word(np.uint64(chunks[j]), shifts, masks)


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
            wide = array_at(fields_ptr, group * _GROUP, _GROUP, _WIDE)
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
