"""pack_signs, unpack_signs, and Lion's update as signs, word by word of 64 elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from torch import Tensor

from lioncub.kernels.lists import tensor_list
from lioncub.kernels.numba_cpu.arithmetic import ema, is_finite, narrow, widen
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import element_addresses, launch, nth_word, run_slices, share, slices
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


def pack_signs(x: Tensor, parity: int, out: Tensor) -> None:
    """out[packed_bytes(n)] = one bit per element of x[n]; see the reference."""
    launch(_encode_kernel, ([x], None), ([out.data_ptr()], [0]), (0.0, 0.0), None, parity)


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """out[n] = +1 where the bit is set, else -1."""
    n = out.numel()
    run_slices(_unpack_kernel, slices(n), packed.data_ptr(), out.data_ptr(), STORAGE[out.dtype])


def lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    parity: int,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
) -> None:
    """out[i] = packed sign codes of tensor i's update; nonfinite[i] = 1 where an element of it is not finite."""
    others = (tensor_list(out).addresses, element_addresses(nonfinite, len(grad)))
    launch(_encode_kernel, (exp_avg, grad), others, tuple(beta1), None, parity)


def lion_encode_(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    beta2: Mix,
    parity: int,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
) -> None:
    """lion_encode, and exp_avg advances; an element whose update is not finite keeps its momentum."""
    others = (tensor_list(out).addresses, element_addresses(nonfinite, len(grad)))
    launch(_encode_kernel, (exp_avg, grad), others, tuple(beta1), tuple(beta2), parity)


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


def word_of(values: Any, x_ptr: Any, start: Any, x_dtype: Any) -> Any:
    """64 elements of x in float32: x itself where it is, else ``values``, filled with them."""
    raise NotImplementedError("word_of: runs in compiled code alone")


@overload(word_of, jit_options={"forceinline": True})
def _overload_word_of(values: Any, x_ptr: Any, start: Any, x_dtype: Any) -> Any:
    return _word_itself if x_dtype.dtype == types.float32 else _word_loaded


def _word_itself(values: Any, x_ptr: Any, start: Any, x_dtype: Any) -> Any:
    return array_at(x_ptr, start, 64, x_dtype)


def _word_loaded(values: Any, x_ptr: Any, start: Any, x_dtype: Any) -> Any:
    load_values(values, x_ptr, x_ptr, start, 64, None, x_dtype, None)
    return values


@device_function
def raise_nonfinite(flag_ptr: int) -> None:
    """Set the int32 at an address, where there is one, to 1; threads may do so at the same time."""
    if flag_ptr != 0:
        array_at(flag_ptr, 0, 1, NONFINITE)[0] = 1


@device_function
def _advance(
    x_ptr: int, g_ptr: int, start: int, count: int, values: Any, beta2: tuple[float, float], x_dtype: Any, g_dtype: Any
) -> None:
    """The momentum of elements whose update, in ``values``, is finite moves on."""
    m, g = array_at(x_ptr, start, count, x_dtype), array_at(g_ptr, start, count, g_dtype)
    kept, new = np.float32(beta2[0]), np.float32(beta2[1])
    for j in range(count):
        state = widen(m[j])
        m[j] = narrow(ema(kept, new, state, widen(g[j])) if is_finite(values[j]) else state, x_dtype)


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
) -> None:
    undecided = parity_word(parity)
    values = scratch(64, FLOATS)
    before = 0
    for row in range(table.shape[0]):
        size, x_ptr, g_ptr, out_ptr, flag_ptr = (
            table[row, 0],
            table[row, 1],
            table[row, 2],
            table[row, 3],
            table[row, 4],
        )
        begin, end = share(size, before, first, last)
        before += size
        if g_dtype is None:
            for start in range(begin, end, 64):
                out = array_at(out_ptr, start >> 6, 1, WORDS)
                count = min(64, end - start)
                if count == 64:
                    out[0] = pack_word(word_of(values, x_ptr, start, x_dtype), 0, undecided)
                else:
                    # a pad code is 0, the code of any negative number
                    values[:] = -1.0
                    load_values(values, x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)
                    out[0] = pack_word(values, 0, undecided)
        else:
            nonfinite = np.uint8(0)
            for word in range((end - begin + 63) >> 6):
                start = nth_word(word, begin, end)
                count = min(64, end - start)
                # the next word of this place in memory
                prefetch_values(x_ptr, g_ptr, start + 64, x_dtype, g_dtype)
                if count == 64:
                    load_values(values, x_ptr, g_ptr, start, 64, beta1, x_dtype, g_dtype)
                    if beta2 is not None:
                        _advance(x_ptr, g_ptr, start, 64, values, beta2, x_dtype, g_dtype)
                else:
                    values[:] = -1.0
                    load_values(values, x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)
                    if beta2 is not None:
                        _advance(x_ptr, g_ptr, start, count, values, beta2, x_dtype, g_dtype)
                array_at(out_ptr, start >> 6, 1, WORDS)[0] = pack_word(values, 0, undecided)
                nonfinite |= any_nonfinite(values, 0)
            if nonfinite:
                raise_nonfinite(flag_ptr)


@kernel
def _unpack_kernel(first: int, last: int, packed_ptr: int, out_ptr: int, out_dtype: Any) -> None:
    values = scratch(64, FLOATS)
    for start in range(first, last, 64):
        count = min(64, last - start)
        word = array_at(packed_ptr, start >> 6, 1, WORDS)[0]
        out = array_at(out_ptr, start, count, out_dtype)
        unpack_word(word, np.float32(1.0), np.float32(-1.0), values, 0)
        for j in range(count):
            out[j] = narrow(values[j], out_dtype)
