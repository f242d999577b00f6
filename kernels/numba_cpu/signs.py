"""pack_signs, unpack_signs, and Lion's update as signs, word by word of 64 elements."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.lists import TensorList
from lioncub.kernels.numba_cpu.arithmetic import ema, is_finite, is_rounded, narrow, widen
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import launch, nth_word, run_sliced, share
from lioncub.kernels.numba_cpu.memory import (
    FLOATS,
    NONFINITE,
    STORAGE,
    WORDS,
    array_at,
    prefetch_word,
    scratch,
)
from lioncub.kernels.numba_cpu.vectors import any_nonfinite, pack_word, unpack_word
from lioncub.kernels.scalars import Mix


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """out[n] = +1 where the bit is set, else -1."""
    n = out.numel()
    run_sliced(_unpack_kernel, n, packed.data_ptr(), out.data_ptr(), STORAGE[out.dtype])


def lion_encode(
    exp_avg: TensorList,
    grad: TensorList | None,
    beta1: Mix,
    parity: int,
    out: TensorList,
    nonfinite: Tensor | None,
    beta2: Mix | None = None,
) -> None:
    """out[i] = packed sign codes of tensor i's update, or of exp_avg itself; see the reference."""
    how = (tuple(beta1), None if beta2 is None else tuple(beta2), parity)
    launch(_encode_kernel, (exp_avg, grad), (out,), *how, 0 if nonfinite is None else nonfinite.data_ptr())


@device_function
def parity_word(parity: int) -> np.uint64:
    """Bit k is (k + parity) & 1 (rule 3)."""
    return np.uint64(0x5555555555555555) if parity & 1 else np.uint64(0xAAAAAAAAAAAAAAAA)


@device_function
def prefetch_values(x_ptr: int, g_ptr: int, start: int, x_dtype: Any, g_dtype: Any) -> None:
    """Ask for the 64 elements from ``start`` on of x and, unless its dtype is None, of g."""
    prefetch_word(x_ptr, start, x_dtype)
    if g_dtype is not None:
        prefetch_word(g_ptr, start, g_dtype)


@device_function
def load_values(
    values: Any, x_ptr: int, g_ptr: int, start: int, count: int, beta1: tuple[float, float], x_dtype: Any, g_dtype: Any
) -> None:
    """values[:count] = elements of x in float32 or, unless its dtype is None, Lion's update of momentum x by g."""
    x = array_at(x_ptr, start, count, x_dtype)
    if g_dtype is None:
        for j in range(count):
            values[j] = widen(x[j])
    else:
        g = array_at(g_ptr, start, count, g_dtype)
        kept, new = np.float32(beta1[0]), np.float32(beta1[1])
        for j in range(count):
            values[j] = ema(kept, new, widen(x[j]), widen(g[j]))


@device_function
def load_word(
    values: Any,
    pad: float,
    x_ptr: int,
    g_ptr: int,
    start: int,
    count: int,
    beta1: tuple[float, float],
    x_dtype: Any,
    g_dtype: Any,
) -> None:
    """`load_values` of all 64 values, of which those behind the first ``count`` are ``pad``."""
    if count == 64:
        load_values(values, x_ptr, g_ptr, start, 64, beta1, x_dtype, g_dtype)
    else:
        values[:] = pad
        load_values(values, x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)


@device_function
def raise_nonfinite(flags_ptr: int, number: int) -> None:
    """Set a tensor's int32 flag, where there are any, to 1; threads may do so at the same time."""
    if flags_ptr != 0:
        array_at(flags_ptr, number, 1, NONFINITE)[0] = 1


@device_function
def _load_and_advance(
    values: Any,
    x_ptr: int,
    g_ptr: int,
    start: int,
    count: int,
    beta1: tuple[float, float],
    beta2: tuple[float, float],
    x_dtype: Any,
    g_dtype: Any,
) -> None:
    """`load_values`, and advance the momentum of elements whose update is finite.

    In one loop, which reads each element once whether its update is finite or not. A loop for momentum alone that reads
    bf16 or fp16 where it is finite is not vectorized; one that reads all of them ends in masked stores, slow on AMD.
    """
    m, g = array_at(x_ptr, start, count, x_dtype), array_at(g_ptr, start, count, g_dtype)
    b1, b1c, b2, b2c = np.float32(beta1[0]), np.float32(beta1[1]), np.float32(beta2[0]), np.float32(beta2[1])
    for j in range(count):
        state, incoming = widen(m[j]), widen(g[j])
        update, moved = ema(b1, b1c, state, incoming), ema(b2, b2c, state, incoming)
        values[j] = update
        m[j] = narrow(moved if is_finite(update) else state, x_dtype)


@kernel
def _encode_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    beta1: tuple[float, float],
    beta2: tuple[float, float] | None,
    parity: int,
    flags_ptr: int,
) -> None:
    undecided = parity_word(parity)
    values = scratch(64, FLOATS)
    before = 0
    for row in range(table.shape[0]):
        size, number, x_ptr, g_ptr, out_ptr = table[row, 0], table[row, 1], table[row, 3], table[row, 4], table[row, 5]
        begin, end = share(size, before, first, last)
        before += size
        nonfinite = np.uint8(0)
        for word in range((end - begin + 63) >> 6):
            start = nth_word(word, begin, end)
            count = min(64, end - start)
            # the next word of this place in memory
            prefetch_values(x_ptr, g_ptr, start + 64, x_dtype, g_dtype)
            if count == 64 and g_dtype is None and not is_rounded(x_dtype):
                # float32 values are packed where they are
                array_at(out_ptr, start >> 6, 1, WORDS)[0] = pack_word(array_at(x_ptr, start, 64, x_dtype), undecided)
                continue
            # a pad code is 0, the code of any negative number
            if beta2 is None:
                load_word(values, np.float32(-1.0), x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)
            elif count == 64:
                _load_and_advance(values, x_ptr, g_ptr, start, 64, beta1, beta2, x_dtype, g_dtype)
            else:
                values[:] = np.float32(-1.0)
                _load_and_advance(values, x_ptr, g_ptr, start, count, beta1, beta2, x_dtype, g_dtype)
            array_at(out_ptr, start >> 6, 1, WORDS)[0] = pack_word(values, undecided)
            if g_dtype is not None:
                nonfinite |= any_nonfinite(values)
        if nonfinite:
            raise_nonfinite(flags_ptr, number)


@kernel
def _unpack_kernel(first: int, last: int, packed_ptr: int, out_ptr: int, out_dtype: Any) -> None:
    values = scratch(64, FLOATS)
    for start in range(first, last, 64):
        count = min(64, last - start)
        word = array_at(packed_ptr, start >> 6, 1, WORDS)[0]
        out = array_at(out_ptr, start, count, out_dtype)
        unpack_word(word, np.float32(1.0), np.float32(-1.0), values)
        for j in range(count):
            out[j] = narrow(values[j], out_dtype)
