"""pack_signs and unpack_signs in Numba."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from torch import Tensor

from lioncub.kernels.numba_cpu.bits import pack_word, unpack_word
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.floats import narrow, widen
from lioncub.kernels.numba_cpu.memory import STORAGE, WORDS, array_at
from lioncub.kernels.numba_cpu.threads import run_slices, slices


def pack_signs(x: Tensor, parity: int, out: Tensor) -> None:
    """out[packed_bytes(n)] = one bit per element of x[n]; see the reference."""
    n = x.numel()
    run_slices(_pack_kernel, slices(n), x.data_ptr(), STORAGE[x.dtype], parity, out.data_ptr())


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """out[n] = +1 where the bit is set, else -1."""
    n = out.numel()
    run_slices(_unpack_kernel, slices(n), packed.data_ptr(), out.data_ptr(), STORAGE[out.dtype])


@device_function
def parity_word(parity: int) -> np.uint64:
    """Bit k is (k + parity) & 1 (rule 3)."""
    return np.uint64(0x5555555555555555) if parity & 1 else np.uint64(0xAAAAAAAAAAAAAAAA)


@device_function
def widen_into(values: Any, x: Any, count: int) -> None:
    """values[:count] = x[:count] in float32."""
    for j in range(count):
        values[j] = widen(x[j])


def word_in_float32(x: Any, values: Any) -> Any:
    """x itself where it is float32, else ``values``, filled with its 64 elements."""
    raise NotImplementedError("word_in_float32: runs in compiled code alone")


@overload(word_in_float32, jit_options={"forceinline": True})
def _overload_word_in_float32(x: Any, values: Any) -> Any:
    if x.dtype == types.float32:
        return _itself
    return _widened


def _itself(x: Any, values: Any) -> Any:
    return x


def _widened(x: Any, values: Any) -> Any:
    widen_into(values, x, 64)
    return values


@kernel
def _pack_kernel(first: int, last: int, x_ptr: int, x_dtype: Any, parity: int, out_ptr: int) -> None:
    values = np.empty(64, np.float32)
    undecided = parity_word(parity)
    for start in range(first, last, 64):
        count = min(64, last - start)
        x = array_at(x_ptr, start, count, x_dtype)
        out = array_at(out_ptr, start >> 6, 1, WORDS)
        if count == 64:
            out[0] = pack_word(word_in_float32(x, values), 0, undecided)
        else:
            # a pad code is 0, the code of any negative number
            values[:] = -1.0
            widen_into(values, x, count)
            out[0] = pack_word(values, 0, undecided)


@kernel
def _unpack_kernel(first: int, last: int, packed_ptr: int, out_ptr: int, out_dtype: Any) -> None:
    values = np.empty(64, np.float32)
    for start in range(first, last, 64):
        count = min(64, last - start)
        word = array_at(packed_ptr, start >> 6, 1, WORDS)[0]
        out = array_at(out_ptr, start, count, out_dtype)
        unpack_word(word, np.float32(1.0), np.float32(-1.0), values, 0)
        for j in range(count):
            out[j] = narrow(values[j], out_dtype)
