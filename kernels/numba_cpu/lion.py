"""lion_apply_ and lion_step_, word by word of 64 elements: what is loaded, computed and stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.lists import TensorList
from lioncub.kernels.numba_cpu.arithmetic import (
    current_value,
    decayed,
    ema,
    is_rounded,
    narrow,
    narrow_stochastic,
    random_words,
    signed_step,
    widen,
)
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import launch, nth_word, share, stream_words
from lioncub.kernels.numba_cpu.memory import CODES, FLOATS, RANDOM_WORDS, WIDE_CODES, WORDS, array_at, scratch
from lioncub.kernels.numba_cpu.vectors import unpack_codes, unpack_word
from lioncub.kernels.rounding import PARAM_WORKER, Streams
from lioncub.kernels.scalars import NO_MIX, Mix

_StreamWords = tuple[int, int, int, int] | None


def lion_apply_(
    param: TensorList,
    packed: TensorList,
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
    grad: TensorList | None,
    exp_avg: TensorList | None,
    beta2: Mix | None,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: TensorList | None = None,
) -> None:
    """param = param*decay - (step*code - offset)*rate; where given, exp_avg = beta2*exp_avg + (1-beta2)*grad."""
    how = (bits, step, offset, rate, decay, tuple(beta2 or NO_MIX))
    words = (None, None) if rounding is None else _words(rounding)
    launch(_apply_kernel, (param, grad, exp_avg, master), (packed,), *how, *words, streams=rounding, active=active)


def lion_step_(
    param: TensorList,
    grad: TensorList,
    exp_avg: TensorList,
    lr: float,
    decay: float,
    beta1: Mix,
    beta2: Mix,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: TensorList | None = None,
) -> None:
    """Take the whole Lion step of one worker; the sign of zero and of NaN is 0."""
    how = (lr, decay, tuple(beta1), tuple(beta2))
    words = (None, None) if rounding is None else _words(rounding)
    launch(_step_kernel, (param, grad, exp_avg, master), (), *how, *words, streams=rounding, active=active)


def _words(rounding: Streams) -> tuple[_StreamWords, _StreamWords]:
    """Return the streams of parameters and of momentum; the latter None where it is rounded to nearest."""
    return stream_words(rounding, PARAM_WORKER), stream_words(rounding, rounding.worker)


@device_function
def _draw(stream: _StreamWords, key: int, start: int, words: Any, dtype: Any) -> None:
    """words[64] = the random words to round elements of ``dtype`` by, where any are needed."""
    if stream is not None and is_rounded(dtype):
        random_words(stream, key, start, words)


@device_function
def _stored(value: np.float32, dtype: Any, stream: _StreamWords, word: np.uint32) -> Any:
    """Return a float32 rounded to ``dtype``: to nearest, or by a word of a stream."""
    return narrow(value, dtype) if stream is None else narrow_stochastic(value, dtype, word)


@device_function
def _move_of(code: int, step: np.int32, offset: np.int32, unit: np.float32) -> np.float32:
    """(step*code - offset) * unit; the whole number is exact in fp32."""
    total = np.int32(np.int32(np.int32(code) * step) - offset)
    return np.float32(np.float32(total) * unit)


@device_function
def _moves_of(codes: Any, step: np.int32, offset: np.int32, unit: np.float32, moves: Any) -> None:
    for j in range(64):
        moves[j] = _move_of(codes[j], step, offset, unit)


@device_function
def _move_word(
    x_ptr: int,
    start: int,
    count: int,
    moves: Any,
    kept: np.float32,
    x_dtype: Any,
    stream: _StreamWords,
    key: int,
    words: Any,
    master_ptr: int,
    master_dtype: Any,
) -> None:
    """x = x*kept - moves for ``count`` elements from ``start`` on; those that are rounded by their masters."""
    x = array_at(x_ptr, start, count, x_dtype)
    if master_dtype is not None and is_rounded(x_dtype):
        master = array_at(master_ptr, start, count, master_dtype)
        for j in range(count):
            value = decayed(current_value(master[j], x[j], x_dtype), moves[j], kept)
            master[j] = value
            x[j] = narrow(value, x_dtype)
        return
    _draw(stream, key, start, words, x_dtype)
    for j in range(count):
        x[j] = _stored(decayed(widen(x[j]), moves[j], kept), x_dtype, stream, words[j])


@kernel
def _apply_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    m_dtype: Any,
    master_dtype: Any,
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
    beta2: tuple[float, float],
    param_stream: _StreamWords,
    momentum_stream: _StreamWords,
) -> None:
    unit, kept = np.float32(rate), np.float32(decay)
    factor, less = np.int32(step), np.int32(offset)
    b2, b2c = np.float32(beta2[0]), np.float32(beta2[1])
    codes, moves, words = scratch(64, CODES), scratch(64, FLOATS), scratch(64, RANDOM_WORDS)
    before = 0
    for row in range(table.shape[0]):
        size, key = table[row, 0], table[row, 2]
        x_ptr, g_ptr, m_ptr, master_ptr = table[row, 3], table[row, 4], table[row, 5], table[row, 6]
        packed_ptr = table[row, 7]
        begin, end = share(size, before, first, last)
        before += size
        if bits == 1:
            # apart from the others, so that its loop is compiled without their branches
            up, down = _move_of(1, factor, less, unit), _move_of(0, factor, less, unit)
            for word in range((end - begin + 63) >> 6):
                start = nth_word(word, begin, end)
                unpack_word(array_at(packed_ptr, start >> 6, 1, WORDS)[0], up, down, moves)
                _move_word(
                    x_ptr,
                    start,
                    min(64, end - start),
                    moves,
                    kept,
                    x_dtype,
                    param_stream,
                    key,
                    words,
                    master_ptr,
                    master_dtype,
                )
        else:
            for word in range((end - begin + 63) >> 6):
                start = nth_word(word, begin, end)
                if bits == 16:
                    _moves_of(array_at(packed_ptr, start, 64, WIDE_CODES), factor, less, unit, moves)
                else:
                    unpack_codes(array_at(packed_ptr, (start >> 6) * bits, bits, WORDS), bits, codes)
                    _moves_of(codes, factor, less, unit, moves)
                _move_word(
                    x_ptr,
                    start,
                    min(64, end - start),
                    moves,
                    kept,
                    x_dtype,
                    param_stream,
                    key,
                    words,
                    master_ptr,
                    master_dtype,
                )
        # a pass of its own: one core follows few streams of memory better than many
        if m_dtype is not None:
            for word in range((end - begin + 63) >> 6):
                start = nth_word(word, begin, end)
                count = min(64, end - start)
                _draw(momentum_stream, key, start, words, m_dtype)
                g, m = array_at(g_ptr, start, count, g_dtype), array_at(m_ptr, start, count, m_dtype)
                for j in range(count):
                    m[j] = _stored(ema(b2, b2c, widen(m[j]), widen(g[j])), m_dtype, momentum_stream, words[j])


@kernel
def _step_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    m_dtype: Any,
    master_dtype: Any,
    lr: float,
    decay: float,
    beta1: tuple[float, float],
    beta2: tuple[float, float],
    param_stream: _StreamWords,
    momentum_stream: _StreamWords,
) -> None:
    rate, kept = np.float32(lr), np.float32(decay)
    b1, b1c, b2, b2c = np.float32(beta1[0]), np.float32(beta1[1]), np.float32(beta2[0]), np.float32(beta2[1])
    words, moved = scratch(64, RANDOM_WORDS), scratch(64, FLOATS)
    before = 0
    for row in range(table.shape[0]):
        size, key, x_ptr, g_ptr, m_ptr = table[row, 0], table[row, 2], table[row, 3], table[row, 4], table[row, 5]
        begin, end = share(size, before, first, last)
        before += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            x = array_at(x_ptr, start, count, x_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            if master_dtype is not None and is_rounded(x_dtype):
                master = array_at(table[row, 6], start, count, master_dtype)
                for j in range(count):
                    state, incoming = widen(m[j]), widen(g[j])
                    step = signed_step(ema(b1, b1c, state, incoming), rate)
                    value = decayed(current_value(master[j], x[j], x_dtype), step, kept)
                    master[j] = value
                    x[j] = narrow(value, x_dtype)
                    m[j] = narrow(ema(b2, b2c, state, incoming), m_dtype)
            elif param_stream is None:
                for j in range(count):
                    state, incoming = widen(m[j]), widen(g[j])
                    step = signed_step(ema(b1, b1c, state, incoming), rate)
                    x[j] = narrow(decayed(widen(x[j]), step, kept), x_dtype)
                    m[j] = narrow(ema(b2, b2c, state, incoming), m_dtype)
            else:
                _draw(param_stream, key, start, words, x_dtype)
                for j in range(count):
                    state, incoming = widen(m[j]), widen(g[j])
                    step = signed_step(ema(b1, b1c, state, incoming), rate)
                    x[j] = narrow_stochastic(decayed(widen(x[j]), step, kept), x_dtype, words[j])
                    moved[j] = ema(b2, b2c, state, incoming)
                _draw(momentum_stream, key, start, words, m_dtype)
                for j in range(count):
                    m[j] = _stored(moved[j], m_dtype, momentum_stream, words[j])
