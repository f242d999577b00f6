"""apply_codes_ in Numba, word by word of 64 elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.arithmetic import moves_of, voted
from lioncub.kernels.numba_cpu.compiling import kernel
from lioncub.kernels.numba_cpu.fields import unpack_codes
from lioncub.kernels.numba_cpu.floats import narrow, widen
from lioncub.kernels.numba_cpu.lists import addresses, launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import WIDE_CODES, WORDS, array_at
from lioncub.kernels.numba_cpu.momentum import advance
from lioncub.kernels.numba_cpu.rounding import move_stochastic
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix


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
    rounding: Streams | None = None,
) -> None:
    """param = param*decay - (step*code - offset)*rate; where given, exp_avg = beta2*exp_avg + (1-beta2)*grad."""
    if rounding is None:
        launch(_apply_codes_kernel, (param,), (addresses(packed),), bits, step, offset, rate, decay)
    else:
        move_stochastic(param, packed, (bits, step, offset), rate, decay, rounding)
    advance(grad, exp_avg, beta2, rounding)


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
                moves_of(array_at(packed_ptr, start, 64, WIDE_CODES), factor, less, unit, moves)
            else:
                unpack_codes(array_at(packed_ptr, (start >> 6) * bits, bits, WORDS), bits, codes)
                moves_of(codes, factor, less, unit, moves)
            x = array_at(x_ptr, start, count, x_dtype)
            for j in range(count):
                x[j] = narrow(voted(widen(x[j]), moves[j], kept), x_dtype)
