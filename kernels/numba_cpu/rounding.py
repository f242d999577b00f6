"""Parameters that are rounded stochastically: the same moves as in lion.py and codes.py, and random words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.arithmetic import mix, moves_of, signed_step, voted
from lioncub.kernels.numba_cpu.compiling import kernel
from lioncub.kernels.numba_cpu.fields import unpack_codes
from lioncub.kernels.numba_cpu.floats import is_rounded, narrow, narrow_stochastic, widen
from lioncub.kernels.numba_cpu.lists import addresses, launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import WIDE_CODES, WORDS, array_at
from lioncub.kernels.numba_cpu.philox import random_words, stream_words
from lioncub.kernels.rounding import PARAM_WORKER, Streams
from lioncub.kernels.scalars import Mix

_StreamWords = tuple[int, int, int, int]


def move_stochastic(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    form: tuple[int, int, int],
    rate: float,
    decay: float,
    rounding: Streams,
) -> None:
    """param = param*decay - (step*code - offset)*rate; ``form`` is (bits, step, offset)."""
    stream = stream_words(rounding.seed, PARAM_WORKER, rounding.step)
    launch(_move_stochastic_kernel, (param,), (addresses(packed), rounding.numbers), *form, rate, decay, stream)


def step_stochastic(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: float,
    decay: float,
    beta1: Mix,
    beta2: Mix,
    rounding: Streams,
) -> None:
    """The whole Lion step of one worker."""
    worker = rounding.momentum_worker
    streams = [stream_words(rounding.seed, who, rounding.step) for who in (PARAM_WORKER, worker or 0)]
    lists = (param, grad, exp_avg)
    launch(_step_stochastic_kernel, lists, (rounding.numbers,), lr, decay, *beta1, *beta2, *streams, worker is not None)


@kernel
def _move_stochastic_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
    stream: _StreamWords,
) -> None:
    unit, kept = np.float32(rate), np.float32(decay)
    factor, less = np.int32(step), np.int32(offset)
    codes, moves, words = np.empty(64, np.uint8), np.empty(64, np.float32), np.zeros(64, np.uint32)
    before = 0
    for row in range(table.shape[0]):
        size, x_ptr, packed_ptr, number = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        begin, end = share(size, before, first, last)
        before += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            if bits == 16:
                moves_of(array_at(packed_ptr, start, 64, WIDE_CODES), factor, less, unit, moves)
            else:
                unpack_codes(array_at(packed_ptr, (start >> 6) * bits, bits, WORDS), bits, codes)
                moves_of(codes, factor, less, unit, moves)
            if is_rounded(x_dtype):
                random_words((stream[0], stream[1], stream[2], stream[3], number), start, words)
            x = array_at(x_ptr, start, count, x_dtype)
            for j in range(count):
                x[j] = narrow_stochastic(voted(widen(x[j]), moves[j], kept), x_dtype, words[j])


@kernel
def _step_stochastic_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    m_dtype: Any,
    lr: float,
    decay: float,
    kept1: float,
    new1: float,
    kept2: float,
    new2: float,
    param_stream: _StreamWords,
    momentum_stream: _StreamWords,
    momentum_too: bool,
) -> None:
    rate, kept = np.float32(lr), np.float32(decay)
    b1, b1c, b2, b2c = np.float32(kept1), np.float32(new1), np.float32(kept2), np.float32(new2)
    words, moved = np.zeros(64, np.uint32), np.empty(64, np.float32)
    offset = 0
    for row in range(table.shape[0]):
        size, x_ptr, g_ptr = table[row, 0], table[row, 1], table[row, 2]
        m_ptr, number = table[row, 3], table[row, 4]
        begin, end = share(size, offset, first, last)
        offset += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            x = array_at(x_ptr, start, count, x_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            if is_rounded(x_dtype):
                s = param_stream
                random_words((s[0], s[1], s[2], s[3], number), start, words)
            for j in range(count):
                state, incoming = widen(m[j]), widen(g[j])
                step = signed_step(mix(b1, b1c, state, incoming), rate)
                x[j] = narrow_stochastic(voted(widen(x[j]), step, kept), x_dtype, words[j])
                moved[j] = mix(b2, b2c, state, incoming)
            if momentum_too:
                if is_rounded(m_dtype):
                    s = momentum_stream
                    random_words((s[0], s[1], s[2], s[3], number), start, words)
                for j in range(count):
                    m[j] = narrow_stochastic(moved[j], m_dtype, words[j])
            else:
                for j in range(count):
                    m[j] = narrow(moved[j], m_dtype)
