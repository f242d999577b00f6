"""The Lion kernels in Numba, word by word of 64 elements: what is loaded, computed and stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.arithmetic import mix, signed_step, voted
from lioncub.kernels.numba_cpu.bits import any_nonfinite, pack_word, unpack_word
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.floats import is_finite, narrow, widen
from lioncub.kernels.numba_cpu.lists import addresses, element_addresses, launch, nth_word, share
from lioncub.kernels.numba_cpu.memory import STATUS, WORDS, array_at, prefetch_word
from lioncub.kernels.numba_cpu.momentum import advance
from lioncub.kernels.numba_cpu.rounding import move_stochastic, step_stochastic
from lioncub.kernels.numba_cpu.signs import parity_word
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix


def lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    parity: int,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """out[i] = packed sign codes of tensor i's update; status[i] = 1 where an element of it is not finite."""
    others = (addresses(out), element_addresses(status, len(grad)))
    launch(_encode_kernel, (exp_avg, grad), others, *beta1, parity)


def lion_encode_(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    beta2: Mix,
    parity: int,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """lion_encode, and exp_avg advances; an element whose update is not finite keeps its momentum."""
    others = (addresses(out), element_addresses(status, len(grad)))
    launch(_encode_advance_kernel, (exp_avg, grad), others, *beta1, *beta2, parity)


def apply_votes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    lr: float,
    decay: float,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
    rounding: Streams | None = None,
) -> None:
    """param = param*decay - lr*(+1/-1); where given, exp_avg = beta2*exp_avg + (1-beta2)*grad."""
    if rounding is not None:
        # a vote is a code of one bit, 2*code - 1
        move_stochastic(param, packed, (1, 2, 1), lr, decay, rounding)
        advance(grad, exp_avg, beta2, rounding)
        return
    others = (addresses(packed),)
    if grad is None or exp_avg is None or beta2 is None:
        launch(_apply_kernel, (param,), others, lr, decay)
    else:
        launch(_apply_advance_kernel, (param, grad, exp_avg), others, lr, decay, *beta2)


def lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: float,
    decay: float,
    beta1: Mix,
    beta2: Mix,
    rounding: Streams | None = None,
) -> None:
    """The whole Lion step of one worker; the sign of zero and of NaN is 0."""
    if rounding is not None:
        step_stochastic(param, grad, exp_avg, lr, decay, beta1, beta2, rounding)
        return
    launch(_step_kernel, (param, grad, exp_avg), (), lr, decay, *beta1, *beta2)


@device_function
def mix_into(update: Any, m: Any, g: Any, count: int, kept: np.float32, new: np.float32) -> None:
    """update[:count] = Lion's update of ``count`` elements."""
    for j in range(count):
        update[j] = mix(kept, new, widen(m[j]), widen(g[j]))


@device_function
def raise_status(status_ptr: int) -> None:
    """Set the int32 at an address, where there is one, to 1; threads may do so at the same time."""
    if status_ptr != 0:
        array_at(status_ptr, 0, 1, STATUS)[0] = 1


@kernel
def _encode_kernel(
    first: int, last: int, table: Any, m_dtype: Any, g_dtype: Any, kept: float, new: float, parity: int
) -> None:
    b1, b1c = np.float32(kept), np.float32(new)
    undecided = parity_word(parity)
    update = np.empty(64, np.float32)
    offset = 0
    for row in range(table.shape[0]):
        size, m_ptr, g_ptr = table[row, 0], table[row, 1], table[row, 2]
        out_ptr, status_ptr = table[row, 3], table[row, 4]
        begin, end = share(size, offset, first, last)
        offset += size
        nonfinite = np.uint8(0)
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            # the next word of this place in memory
            prefetch_word(m_ptr, start + 64, m_dtype)
            prefetch_word(g_ptr, start + 64, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            out = array_at(out_ptr, start >> 6, 1, WORDS)
            if count == 64:
                mix_into(update, m, g, 64, b1, b1c)
            else:
                # a pad code is 0, the code of any negative number
                update[:] = -1.0
                mix_into(update, m, g, count, b1, b1c)
            out[0] = pack_word(update, 0, undecided)
            nonfinite |= any_nonfinite(update, 0)
        if nonfinite:
            raise_status(status_ptr)


@kernel
def _encode_advance_kernel(
    first: int,
    last: int,
    table: Any,
    m_dtype: Any,
    g_dtype: Any,
    kept1: float,
    new1: float,
    kept2: float,
    new2: float,
    parity: int,
) -> None:
    b1, b1c, b2, b2c = np.float32(kept1), np.float32(new1), np.float32(kept2), np.float32(new2)
    undecided = parity_word(parity)
    update = np.empty(64, np.float32)
    offset = 0
    for row in range(table.shape[0]):
        size, m_ptr, g_ptr = table[row, 0], table[row, 1], table[row, 2]
        out_ptr, status_ptr = table[row, 3], table[row, 4]
        begin, end = share(size, offset, first, last)
        offset += size
        nonfinite = np.uint8(0)
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            prefetch_word(m_ptr, start + 64, m_dtype)
            prefetch_word(g_ptr, start + 64, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            out = array_at(out_ptr, start >> 6, 1, WORDS)
            if count == 64:
                _mix_and_advance(update, m, g, 64, b1, b1c, b2, b2c, m_dtype)
            else:
                update[:] = -1.0
                _mix_and_advance(update, m, g, count, b1, b1c, b2, b2c, m_dtype)
            out[0] = pack_word(update, 0, undecided)
            nonfinite |= any_nonfinite(update, 0)
        if nonfinite:
            raise_status(status_ptr)


@device_function
def _mix_and_advance(
    update: Any,
    m: Any,
    g: Any,
    count: int,
    b1: np.float32,
    b1c: np.float32,
    b2: np.float32,
    b2c: np.float32,
    m_dtype: Any,
) -> None:
    for j in range(count):
        state, incoming = widen(m[j]), widen(g[j])
        c = mix(b1, b1c, state, incoming)
        update[j] = c
        m[j] = narrow(mix(b2, b2c, state, incoming) if is_finite(c) else state, m_dtype)


@kernel
def _apply_kernel(first: int, last: int, table: Any, x_dtype: Any, lr: float, decay: float) -> None:
    rate, kept = np.float32(lr), np.float32(decay)
    step = np.empty(64, np.float32)
    offset = 0
    for row in range(table.shape[0]):
        size, x_ptr, packed_ptr = table[row, 0], table[row, 1], table[row, 2]
        begin, end = share(size, offset, first, last)
        offset += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            x = array_at(x_ptr, start, count, x_dtype)
            unpack_word(array_at(packed_ptr, start >> 6, 1, WORDS)[0], rate, -rate, step, 0)
            for j in range(count):
                x[j] = narrow(voted(widen(x[j]), step[j], kept), x_dtype)


@kernel
def _apply_advance_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    m_dtype: Any,
    lr: float,
    decay: float,
    kept2: float,
    new2: float,
) -> None:
    rate, kept, b2, b2c = np.float32(lr), np.float32(decay), np.float32(kept2), np.float32(new2)
    step = np.empty(64, np.float32)
    offset = 0
    for row in range(table.shape[0]):
        size, x_ptr, g_ptr = table[row, 0], table[row, 1], table[row, 2]
        m_ptr, packed_ptr = table[row, 3], table[row, 4]
        begin, end = share(size, offset, first, last)
        offset += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            x = array_at(x_ptr, start, count, x_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            unpack_word(array_at(packed_ptr, start >> 6, 1, WORDS)[0], rate, -rate, step, 0)
            for j in range(count):
                x[j] = narrow(voted(widen(x[j]), step[j], kept), x_dtype)
            for j in range(count):
                m[j] = narrow(mix(b2, b2c, widen(m[j]), widen(g[j])), m_dtype)


@kernel
def _step_kernel(
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
) -> None:
    rate, kept = np.float32(lr), np.float32(decay)
    b1, b1c, b2, b2c = np.float32(kept1), np.float32(new1), np.float32(kept2), np.float32(new2)
    offset = 0
    for row in range(table.shape[0]):
        size, x_ptr, g_ptr, m_ptr = table[row, 0], table[row, 1], table[row, 2], table[row, 3]
        begin, end = share(size, offset, first, last)
        offset += size
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            x = array_at(x_ptr, start, count, x_dtype)
            g = array_at(g_ptr, start, count, g_dtype)
            m = array_at(m_ptr, start, count, m_dtype)
            for j in range(count):
                state, incoming = widen(m[j]), widen(g[j])
                step = signed_step(mix(b1, b1c, state, incoming), rate)
                x[j] = narrow(voted(widen(x[j]), step, kept), x_dtype)
                m[j] = narrow(mix(b2, b2c, state, incoming), m_dtype)
