"""Momentum that advances by itself: exp_avg = beta2*exp_avg + (1-beta2)*grad, rounded to nearest or stochastically."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.arithmetic import mix
from lioncub.kernels.numba_cpu.compiling import kernel
from lioncub.kernels.numba_cpu.floats import is_rounded, narrow, narrow_stochastic, widen
from lioncub.kernels.numba_cpu.lists import launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import array_at
from lioncub.kernels.numba_cpu.philox import random_words, stream_words
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix


def advance(
    grad: Sequence[Tensor] | None, exp_avg: Sequence[Tensor] | None, beta2: Mix | None, rounding: Streams | None
) -> None:
    """exp_avg = beta2*exp_avg + (1-beta2)*grad, where there are any."""
    if grad is None or exp_avg is None or beta2 is None:
        return
    if rounding is None or rounding.momentum_worker is None:
        launch(_advance_kernel, (grad, exp_avg), (), *beta2)
        return
    stream = stream_words(rounding.seed, rounding.momentum_worker, rounding.step)
    launch(_advance_stochastic_kernel, (grad, exp_avg), (rounding.numbers,), *beta2, stream)


@kernel
def _advance_kernel(first: int, last: int, table: Any, g_dtype: Any, m_dtype: Any, kept: float, new: float) -> None:
    b2, b2c = np.float32(kept), np.float32(new)
    before = 0
    for row in range(table.shape[0]):
        size, g_ptr, m_ptr = table[row, 0], table[row, 1], table[row, 2]
        begin, end = share(size, before, first, last)
        before += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            g, m = array_at(g_ptr, start, count, g_dtype), array_at(m_ptr, start, count, m_dtype)
            for j in range(count):
                m[j] = narrow(mix(b2, b2c, widen(m[j]), widen(g[j])), m_dtype)


@kernel
def _advance_stochastic_kernel(
    first: int,
    last: int,
    table: Any,
    g_dtype: Any,
    m_dtype: Any,
    kept: float,
    new: float,
    stream: tuple[int, int, int, int],
) -> None:
    b2, b2c = np.float32(kept), np.float32(new)
    words = np.zeros(64, np.uint32)
    before = 0
    for row in range(table.shape[0]):
        size, g_ptr, m_ptr, number = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        begin, end = share(size, before, first, last)
        before += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            g, m = array_at(g_ptr, start, count, g_dtype), array_at(m_ptr, start, count, m_dtype)
            if is_rounded(m_dtype):
                random_words((stream[0], stream[1], stream[2], stream[3], number), start, words)
            for j in range(count):
                m[j] = narrow_stochastic(mix(b2, b2c, widen(m[j]), widen(g[j])), m_dtype, words[j])
