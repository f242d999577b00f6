"""quantize, lion_quantize and dequantize in Numba, in words of 64 elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.numba_cpu.bits import any_nonfinite
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.fields import pack_codes, unpack_codes
from lioncub.kernels.numba_cpu.floats import is_rounded, narrow
from lioncub.kernels.numba_cpu.levels import even_codes, levels_times, random_codes
from lioncub.kernels.numba_cpu.lion import mix_into, raise_status
from lioncub.kernels.numba_cpu.lists import addresses, element_addresses, launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import (
    CODES,
    FLOATS,
    RANDOM_WORDS,
    STORAGE,
    WORDS,
    array_at,
    prefetch_word,
    scratch,
)
from lioncub.kernels.numba_cpu.philox import random_words
from lioncub.kernels.numba_cpu.signs import widen_into, word_in_float32
from lioncub.kernels.numba_cpu.threads import run_slices, slices
from lioncub.kernels.random_bits import Stream
from lioncub.kernels.scalars import Mix

_UINT32 = 0xFFFFFFFF
_RandomArguments = tuple[int, int, int, int, int]


def quantize(x: Tensor, scale: Tensor, gain: float, block: int, bits: int, stream: Stream | None, out: Tensor) -> None:
    """out = packed codes q + K of x[n], q = gain*K*x/scale rounded to even or, with a stream, stochastically."""
    source = (x.data_ptr(), STORAGE[x.dtype])
    fields = (scale.data_ptr(), _shift(block), gain * largest_level(bits), bits)
    run_slices(_quantize_kernel, slices(x.numel()), *source, *fields, *_random(stream), out.data_ptr())


def lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    scale: Sequence[Tensor],
    gain: float,
    block: int,
    bits: int,
    streams: Sequence[Stream] | None,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """quantize of each update; status[i] = 1 where an element of update i is not finite."""
    if not grad:
        return
    fields = (_shift(block), gain * largest_level(bits), bits)
    numbers = [0] * len(grad) if streams is None else [stream.tensor & _UINT32 for stream in streams]
    others = (addresses(scale), addresses(out), element_addresses(status, len(grad)), numbers)
    launch(_lion_quantize_kernel, (exp_avg, grad), others, *beta1, *fields, *_random(streams[0] if streams else None))


def dequantize(packed: Tensor, scale: Tensor, gain: float, block: int, bits: int, out: Tensor) -> None:
    """out[n] = q * (scale / (gain*K))."""
    fields = (scale.data_ptr(), _shift(block), gain * largest_level(bits), bits)
    parts = slices(out.numel())
    run_slices(_dequantize_kernel, parts, packed.data_ptr(), *fields, out.data_ptr(), STORAGE[out.dtype])


def _shift(block: int) -> int:
    """j >> shift is the block of element j; block 0 means one for all."""
    return block.bit_length() - 1 if block else 63


def _random(stream: Stream | None) -> tuple[bool, _RandomArguments]:
    """Whether to round stochastically, and what `random_words` takes."""
    if stream is None:
        return False, (0, 0, 0, 0, 0)
    return True, (*stream.key, stream.worker & _UINT32, stream.step & _UINT32, stream.tensor & _UINT32)


@device_function
def _factor(scale: np.float32, gain_level: np.float32) -> np.float32:
    """What a value is multiplied by to become a level."""
    return np.float32(0.0) if scale == np.float32(0.0) else np.float32(gain_level / scale)


@kernel
def _quantize_kernel(
    first: int,
    last: int,
    x_ptr: int,
    x_dtype: Any,
    scale_ptr: int,
    shift: int,
    gain_level: float,
    bits: int,
    stochastic: bool,
    stream: _RandomArguments,
    out_ptr: int,
) -> None:
    values, words, codes = scratch(64, FLOATS), scratch(64, RANDOM_WORDS), scratch(64, CODES)
    for word in range((last - first + 63) >> 6):
        start = nth_word(word, first, last)
        count = min(64, last - start)
        prefetch_word(x_ptr, start + 64, x_dtype)
        x = array_at(x_ptr, start, count, x_dtype)
        if stochastic:
            random_words(stream, start, words)
        if count == 64 and shift >= 6:
            factor = _factor(array_at(scale_ptr, start >> shift, 1, FLOATS)[0], np.float32(gain_level))
            source = word_in_float32(x, values)
            _quantize_word(source, factor, count, bits, stochastic, words, codes, out_ptr, start)
        else:
            widen_into(values, x, count)
            factor = _scale_word(values, scale_ptr, shift, start, count, np.float32(gain_level))
            _quantize_word(values, factor, count, bits, stochastic, words, codes, out_ptr, start)


@kernel
def _lion_quantize_kernel(
    first: int,
    last: int,
    table: Any,
    m_dtype: Any,
    g_dtype: Any,
    kept: float,
    new: float,
    shift: int,
    gain_level: float,
    bits: int,
    stochastic: bool,
    stream: _RandomArguments,
) -> None:
    values, words, codes = scratch(64, FLOATS), scratch(64, RANDOM_WORDS), scratch(64, CODES)
    b1, b1c = np.float32(kept), np.float32(new)
    offset = 0
    for row in range(table.shape[0]):
        size, m_ptr, g_ptr, scale_ptr = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        out_ptr, status_ptr, number = table[row, 4], table[row, 5], table[row, 6]
        begin, end = share(size, offset, first, last)
        offset += size
        nonfinite = np.uint8(0)
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            prefetch_word(m_ptr, start + 64, m_dtype)
            prefetch_word(g_ptr, start + 64, g_dtype)
            m, g = array_at(m_ptr, start, count, m_dtype), array_at(g_ptr, start, count, g_dtype)
            if count == 64:
                mix_into(values, m, g, 64, b1, b1c)
            else:
                values[:] = 0.0
                mix_into(values, m, g, count, b1, b1c)
            nonfinite |= any_nonfinite(values, 0)
            factor = _scale_word(values, scale_ptr, shift, start, count, np.float32(gain_level))
            if stochastic:
                random_words((stream[0], stream[1], stream[2], stream[3], number), start, words)
            _quantize_word(values, factor, count, bits, stochastic, words, codes, out_ptr, start)
        if nonfinite:
            raise_status(status_ptr)


@kernel
def _dequantize_kernel(
    first: int,
    last: int,
    packed_ptr: int,
    scale_ptr: int,
    shift: int,
    gain_level: float,
    bits: int,
    out_ptr: int,
    out_dtype: Any,
) -> None:
    values, codes = scratch(64, FLOATS), scratch(64, CODES)
    level = np.int32((1 << (bits - 1)) - 1)
    for start in range(first, last, 64):
        count = min(64, last - start)
        unpack_codes(array_at(packed_ptr, start * bits >> 6, (count * bits + 63) >> 6, WORDS), bits, codes)
        out = array_at(out_ptr, start, count, out_dtype)
        if shift >= 6:
            unit = np.float32(array_at(scale_ptr, start >> shift, 1, FLOATS)[0] / np.float32(gain_level))
            if count == 64 and not is_rounded(out_dtype):
                levels_times(codes, level, unit, out)
                continue
            levels_times(codes, level, unit, values)
        else:
            levels_times(codes, level, np.float32(1.0), values)
            for j in range(count):
                scale = array_at(scale_ptr, (start + j) >> shift, 1, FLOATS)[0]
                values[j] = np.float32(values[j] * np.float32(scale / np.float32(gain_level)))
        for j in range(count):
            out[j] = narrow(values[j], out_dtype)


@device_function
def _scale_word(values: Any, scale_ptr: int, shift: int, start: int, count: int, gain_level: np.float32) -> np.float32:
    """gain*K / scale, by which ``values`` become levels; blocks smaller than a word are scaled here, and it is 1."""
    if shift >= 6:
        return np.float32(_factor(array_at(scale_ptr, start >> shift, 1, FLOATS)[0], gain_level))
    for j in range(count):
        values[j] = np.float32(values[j] * _factor(array_at(scale_ptr, (start + j) >> shift, 1, FLOATS)[0], gain_level))
    return np.float32(1.0)


@device_function
def _quantize_word(
    values: Any,
    factor: np.float32,
    count: int,
    bits: int,
    stochastic: bool,
    words: Any,
    codes: Any,
    out_ptr: int,
    start: int,
) -> None:
    """Write the fields of elements start to start + count, and zeros up to the end of the last word."""
    largest = np.int32((1 << (bits - 1)) - 1)
    # a tail is computed to its full 64 elements and then cleared
    if stochastic:
        random_codes(values, factor, largest, codes, words)
    else:
        even_codes(values, factor, largest, codes)
    if count < 64:
        codes[count:] = 0
    pack_codes(codes, bits, array_at(out_ptr, start * bits >> 6, (count * bits + 63) >> 6, WORDS))
