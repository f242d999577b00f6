"""p-bit codes to words and back, eight at a time: a word of eight byte-wide codes is folded in three halvings."""

from __future__ import annotations

from typing import Any

import numpy as np

from lioncub.kernels.numba_cpu.compiling import device_function


@device_function
def pack_codes(codes: Any, bits: int, out: Any) -> None:
    """out[words] = the fields of codes, uint8[64]; bits is 1, 2, 4 or 8."""
    eights = codes.view(np.uint64)
    out[:] = 0
    width = 8 * bits
    for i in range((out.size * 64 + width - 1) // width):
        place = i * width
        out[place >> 6] |= _fold(eights[i], np.uint64(bits)) << np.uint64(place & 63)


@device_function
def unpack_codes(words: Any, bits: int, codes: Any) -> None:
    """codes, uint8[64], from the fields of words."""
    eights = codes.view(np.uint64)
    width = 8 * bits
    for i in range((words.size * 64 + width - 1) // width):
        place = i * width
        eights[i] = _unfold(words[place >> 6] >> np.uint64(place & 63), np.uint64(bits))


@device_function
def _fold(eight: np.uint64, bits: np.uint64) -> np.uint64:
    """The low ``bits`` bits of each byte, moved together."""
    eight = (eight | (eight >> (np.uint64(8) - bits))) & _mask(np.uint64(2) * bits, np.uint64(0x0001000100010001))
    eight = (eight | (eight >> (np.uint64(16) - np.uint64(2) * bits))) & _mask(
        np.uint64(4) * bits, np.uint64(0x0000000100000001)
    )
    folded = eight | (eight >> (np.uint64(32) - np.uint64(4) * bits))
    return np.uint64(folded & _mask(np.uint64(8) * bits, np.uint64(1)))


@device_function
def _unfold(folded: np.uint64, bits: np.uint64) -> np.uint64:
    """The inverse of `_fold`; bits above the eighth field are ignored."""
    four, two = np.uint64(4) * bits, np.uint64(2) * bits
    eight = folded & _mask(np.uint64(8) * bits, np.uint64(1))
    eight = (eight | (eight << (np.uint64(32) - four))) & _mask(four, np.uint64(0x0000000100000001))
    eight = (eight | (eight << (np.uint64(16) - two))) & _mask(two, np.uint64(0x0001000100010001))
    return np.uint64((eight | (eight << (np.uint64(8) - bits))) & _mask(bits, np.uint64(0x0101010101010101)))


@device_function
def _mask(width: np.uint64, places: np.uint64) -> np.uint64:
    """``width`` ones from each of ``places`` up; a shift by 64 would be undefined, so 64 ones are taken apart."""
    ones = ~np.uint64(0) if width == np.uint64(64) else (np.uint64(1) << width) - np.uint64(1)
    return ones * places
