"""apply_codes_ in Numba, word by word of 64 elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.fields import unpack_codes
from lioncub.kernels.numba_cpu.floats import narrow, widen
from lioncub.kernels.numba_cpu.lion import mix, voted
from lioncub.kernels.numba_cpu.lists import addresses, launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import WORDS, array_at
from lioncub.kernels.scalars import Mix

_WIDE = np.dtype(np.uint16)


def apply_codes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
) -> None:
    """param = param*decay - (step*code - offset)*rate; where given, exp_avg = beta2*exp_avg + (1-beta2)*grad."""
    launch(_apply_codes_kernel, (param,), (addresses(packed),), bits, step, offset, rate, decay)
    if grad is not None and exp_avg is not None and beta2 is not None:
        launch(_advance_kernel, (grad, exp_avg), (), *beta2)


@kernel
def _apply_codes_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
) -> None:
    unit, kept = np.float32(rate), np.float32(decay)
    factor, less = np.int32(step), np.int32(offset)
    codes, moves = np.empty(64, np.uint8), np.empty(64, np.float32)
    before = 0
    for row in range(table.shape[0]):
        size, x_ptr, packed_ptr = table[row, 0], table[row, 1], table[row, 2]
        begin, end = share(size, before, first, last)
        before += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            if bits == 16:
                _moves_of(array_at(packed_ptr, start, 64, _WIDE), factor, less, unit, moves)
            else:
                unpack_codes(array_at(packed_ptr, (start >> 6) * bits, bits, WORDS), bits, codes)
                _moves_of(codes, factor, less, unit, moves)
            x = array_at(x_ptr, start, count, x_dtype)
            for j in range(count):
                x[j] = narrow(voted(widen(x[j]), moves[j], kept), x_dtype)


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


@device_function
def _moves_of(codes: Any, step: np.int32, offset: np.int32, unit: np.float32, moves: Any) -> None:
    """moves[64] = (step*code - offset) * unit; the whole number is exact in fp32."""
    for j in range(64):
        total = np.int32(np.int32(np.int32(codes[j]) * step) - offset)
        moves[j] = np.float32(np.float32(total) * unit)
