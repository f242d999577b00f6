"""quantize, lion_quantize and dequantize in Numba, in words of 64 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.numba_cpu.bits import any_nonfinite
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.fields import pack_codes, unpack_codes
from lioncub.kernels.numba_cpu.floats import narrow
from lioncub.kernels.numba_cpu.lion import mix_into, raise_status
from lioncub.kernels.numba_cpu.memory import STORAGE, WORDS, array_at
from lioncub.kernels.numba_cpu.philox import random_words
from lioncub.kernels.numba_cpu.signs import widen_into
from lioncub.kernels.numba_cpu.threads import run_slices, slices
from lioncub.kernels.random_bits import Stream
from lioncub.kernels.scalars import Mix

_SCALES = np.dtype(np.float32)
_UINT32 = 0xFFFFFFFF
_RandomArguments = tuple[int, int, int, int, int]


def quantize(x: Tensor, scale: Tensor, gain: float, block: int, bits: int, stream: Stream | None, out: Tensor) -> None:
    """out = packed codes q + K of x[n], q = gain*K*x/scale rounded to even or, with a stream, stochastically."""
    source = (x.data_ptr(), STORAGE[x.dtype])
    fields = (scale.data_ptr(), _shift(block), gain * largest_level(bits), bits)
    run_slices(_quantize_kernel, slices(x.numel()), *source, *fields, *_random(stream), out.data_ptr())


def lion_quantize(
    exp_avg: Tensor,
    grad: Tensor,
    beta1: Mix,
    scale: Tensor,
    gain: float,
    block: int,
    bits: int,
    stream: Stream | None,
    out: Tensor,
    status: Tensor | None,
) -> None:
    """quantize of the update; status[0] = 1 where an element of it is not finite."""
    source = (exp_avg.data_ptr(), STORAGE[exp_avg.dtype], grad.data_ptr(), STORAGE[grad.dtype], *beta1)
    fields = (scale.data_ptr(), _shift(block), gain * largest_level(bits), bits)
    written = (out.data_ptr(), 0 if status is None else status.data_ptr())
    run_slices(_lion_quantize_kernel, slices(grad.numel()), *source, *fields, *_random(stream), *written)


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


@device_function
def _clip(ratio: np.float32, level: np.float32) -> np.float32:
    """Within -level .. level; NaN becomes 0."""
    ratio = np.float32(0.0) if ratio != ratio else ratio
    ratio = -level if ratio < -level else ratio
    return level if ratio > level else ratio


@device_function
def _round_to_even(ratio: np.float32) -> np.float32:
    # float32 has no fractions from 2^23 on, and |ratio| is at most 127
    return np.float32(np.float32(ratio + np.float32(12582912.0)) - np.float32(12582912.0))


@device_function
def _round_stochastically(ratio: np.float32, word: np.uint32) -> np.float32:
    """|ratio| is rounded up where its fraction exceeds a uniform number, the word's 24 high bits."""
    magnitude = np.float32(abs(ratio))
    whole = np.float32(np.int32(magnitude))
    uniform = np.float32(np.float32(np.int32(word >> np.uint32(8))) * np.float32(2.0**-24))
    one_more = np.float32(1.0) if uniform < np.float32(magnitude - whole) else np.float32(0.0)
    rounded = np.float32(whole + one_more)
    return -rounded if ratio < np.float32(0.0) else rounded


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
    values, factors, words, codes = _scratch()
    for start in range(first, last, 64):
        count = min(64, last - start)
        widen_into(values, array_at(x_ptr, start, count, x_dtype), count)
        _load_factors(factors, scale_ptr, shift, start, count, np.float32(gain_level))
        if stochastic:
            random_words(stream, start, words)
        _quantize_word(values, factors, count, bits, stochastic, words, codes, out_ptr, start)


@kernel
def _lion_quantize_kernel(
    first: int,
    last: int,
    m_ptr: int,
    m_dtype: Any,
    g_ptr: int,
    g_dtype: Any,
    kept: float,
    new: float,
    scale_ptr: int,
    shift: int,
    gain_level: float,
    bits: int,
    stochastic: bool,
    stream: _RandomArguments,
    out_ptr: int,
    status_ptr: int,
) -> None:
    values, factors, words, codes = _scratch()
    nonfinite = np.uint8(0)
    for start in range(first, last, 64):
        count = min(64, last - start)
        m, g = array_at(m_ptr, start, count, m_dtype), array_at(g_ptr, start, count, g_dtype)
        values[count:] = 0.0
        mix_into(values, m, g, count, np.float32(kept), np.float32(new))
        nonfinite |= any_nonfinite(values, 0)
        _load_factors(factors, scale_ptr, shift, start, count, np.float32(gain_level))
        if stochastic:
            random_words(stream, start, words)
        _quantize_word(values, factors, count, bits, stochastic, words, codes, out_ptr, start)
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
    _, units, _, codes = _scratch()
    level = np.float32((1 << (bits - 1)) - 1)
    for start in range(first, last, 64):
        count = min(64, last - start)
        unpack_codes(array_at(packed_ptr, start * bits >> 6, (count * bits + 63) >> 6, WORDS), bits, codes)
        _load_units(units, scale_ptr, shift, start, count, np.float32(gain_level))
        out = array_at(out_ptr, start, count, out_dtype)
        for j in range(count):
            q = np.float32(np.float32(codes[j]) - level)
            out[j] = narrow(np.float32(q * units[j]), out_dtype)


@device_function
def _scratch() -> tuple[Any, Any, Any, Any]:
    """Values, factors, random words and codes of 64 elements."""
    return np.zeros(64, np.float32), np.zeros(64, np.float32), np.zeros(64, np.uint32), np.zeros(64, np.uint8)


@device_function
def _load_factors(factors: Any, scale_ptr: int, shift: int, start: int, count: int, gain_level: np.float32) -> None:
    """factors[:count] = gain*K / scale of each element's block."""
    if shift >= 6:
        factors[:] = _factor(array_at(scale_ptr, start >> shift, 1, _SCALES)[0], gain_level)
        return
    for j in range(count):
        factors[j] = _factor(array_at(scale_ptr, (start + j) >> shift, 1, _SCALES)[0], gain_level)


@device_function
def _load_units(units: Any, scale_ptr: int, shift: int, start: int, count: int, gain_level: np.float32) -> None:
    """units[:count] = scale / (gain*K) of each element's block."""
    if shift >= 6:
        units[:] = array_at(scale_ptr, start >> shift, 1, _SCALES)[0] / gain_level
        return
    for j in range(count):
        units[j] = array_at(scale_ptr, (start + j) >> shift, 1, _SCALES)[0] / gain_level


@device_function
def _quantize_word(
    values: Any,
    factors: Any,
    count: int,
    bits: int,
    stochastic: bool,
    words: Any,
    codes: Any,
    out_ptr: int,
    start: int,
) -> None:
    """Write the fields of elements start to start + count, and zeros up to the end of the last word."""
    level = np.float32((1 << (bits - 1)) - 1)
    # a tail is computed to its full 64 elements and then cleared, so that the loops have a fixed length
    if stochastic:
        for j in range(64):
            ratio = _clip(np.float32(values[j] * factors[j]), level)
            codes[j] = np.int32(_round_stochastically(ratio, words[j]) + level)
    else:
        for j in range(64):
            ratio = _clip(np.float32(values[j] * factors[j]), level)
            codes[j] = np.int32(_round_to_even(ratio) + level)
    codes[count:] = 0
    pack_codes(codes, bits, array_at(out_ptr, start * bits >> 6, (count * bits + 63) >> 6, WORDS))
