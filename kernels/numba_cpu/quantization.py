"""quantize, lion_quantize and dequantize, in words of 64 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.lists import TensorList
from lioncub.kernels.numba_cpu.arithmetic import is_rounded, narrow, random_words
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import launch, nth_word, run_sliced, share, stream_words
from lioncub.kernels.numba_cpu.memory import CODES, FLOATS, RANDOM_WORDS, STORAGE, WORDS, array_at, scratch
from lioncub.kernels.numba_cpu.signs import load_word, prefetch_values, raise_nonfinite
from lioncub.kernels.numba_cpu.vectors import (
    any_nonfinite,
    even_codes,
    levels_times,
    pack_codes,
    random_codes,
    unpack_codes,
)
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix

_StreamWords = tuple[int, int, int, int] | None


def lion_quantize(
    exp_avg: TensorList,
    grad: TensorList | None,
    beta1: Mix,
    scale: TensorList,
    gain: float,
    block: int,
    bits: int,
    streams: Streams | None,
    out: TensorList,
    nonfinite: Tensor | None,
) -> None:
    """out[i] = packed codes of tensor i's update, or of exp_avg itself; see the reference."""
    how = (tuple(beta1), _shift(block), gain * largest_level(bits), bits)
    stream = stream_words(streams, None if streams is None else streams.worker)
    lists, others, flags = (exp_avg, grad), (scale, out), 0 if nonfinite is None else nonfinite.data_ptr()
    launch(_quantize_kernel, lists, others, *how, stream, flags, streams=streams)


def dequantize(packed: Tensor, scale: Tensor, gain: float, block: int, bits: int, out: Tensor) -> None:
    """out[n] = q * (scale / (gain*K))."""
    fields = (scale.data_ptr(), _shift(block), gain * largest_level(bits), bits)
    run_sliced(_dequantize_kernel, out.numel(), packed.data_ptr(), *fields, out.data_ptr(), STORAGE[out.dtype])


def _shift(block: int) -> int:
    """j >> shift is the block of element j; block 0 means one for all."""
    return block.bit_length() - 1 if block else 63


@device_function
def _factor(scale: np.float32, gain_level: np.float32) -> np.float32:
    """Return the factor that makes a value a level."""
    return np.float32(0.0) if scale == np.float32(0.0) else np.float32(gain_level / scale)


@kernel
def _quantize_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    beta1: tuple[float, float],
    shift: int,
    gain_level: float,
    bits: int,
    stream: _StreamWords,
    flags_ptr: int,
) -> None:
    values, words, codes = scratch(64, FLOATS), scratch(64, RANDOM_WORDS), scratch(64, CODES)
    gain = np.float32(gain_level)
    before = 0
    for row in range(table.shape[0]):
        size, number, key = table[row, 0], table[row, 1], table[row, 2]
        x_ptr, g_ptr, scale_ptr, out_ptr = table[row, 3], table[row, 4], table[row, 5], table[row, 6]
        begin, end = share(size, before, first, last)
        before += size
        nonfinite = np.uint8(0)
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            prefetch_values(x_ptr, g_ptr, start + 64, x_dtype, g_dtype)
            if stream is not None:
                random_words(stream, key, start, words)
            if count == 64 and shift >= 6 and g_dtype is None and not is_rounded(x_dtype):
                # float32 values are quantized where they are
                factor = _factor(array_at(scale_ptr, start >> shift, 1, FLOATS)[0], gain)
                at = array_at(x_ptr, start, 64, x_dtype)
                _quantize_word(at, factor, 64, bits, stream, words, codes, out_ptr, start)
                continue
            load_word(values, np.float32(0.0), x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)
            if g_dtype is not None:
                nonfinite |= any_nonfinite(values)
            factor = _scale_word(values, scale_ptr, shift, start, count, gain)
            _quantize_word(values, factor, count, bits, stream, words, codes, out_ptr, start)
        if nonfinite:
            raise_nonfinite(flags_ptr, number)


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
    stream: _StreamWords,
    words: Any,
    codes: Any,
    out_ptr: int,
    start: int,
) -> None:
    """Write the fields of elements start to start + count, and zeros up to the end of the last word."""
    largest = np.int32((1 << (bits - 1)) - 1)
    # a tail is computed to its full 64 elements and then cleared
    if stream is not None:
        random_codes(values, factor, largest, codes, words)
    else:
        even_codes(values, factor, largest, codes)
    if count < 64:
        codes[count:] = 0
    pack_codes(codes, bits, array_at(out_ptr, start * bits >> 6, (count * bits + 63) >> 6, WORDS))
