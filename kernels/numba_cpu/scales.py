"""block_scale and lion_block_scale in Numba: sums in float64, in an order that the number of threads does not change.

A block is summed in pieces of at most 65536 elements, a piece in 64 lanes; pieces are shared out to the threads and
added up in order at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.lion import mix_into
from lioncub.kernels.numba_cpu.memory import STORAGE, array_at
from lioncub.kernels.numba_cpu.signs import widen_into
from lioncub.kernels.numba_cpu.threads import MIN_SLICE, run_slices, slices
from lioncub.kernels.scalars import Mix

_PIECE = 65536
_SUMS, _SCALES = np.dtype(np.float64), np.dtype(np.float32)
_NORMS = {"linf": 0, "l1": 1, "l2": 2}
_LINF = 0
_L2 = 2


def block_scale(x: Tensor, norm: str, block: int, scale: Tensor) -> None:
    """scale[blocks] = norm of each block of |x|: mean ("l1"), root mean square ("l2") or maximum ("linf")."""
    _scale(_pieces_kernel, (x.data_ptr(), STORAGE[x.dtype]), x.numel(), norm, block, scale)


def lion_block_scale(
    exp_avg: Sequence[Tensor], grad: Sequence[Tensor], beta1: Mix, norm: str, block: int, scale: Sequence[Tensor]
) -> None:
    """block_scale of each update."""
    for m, g, s in zip(exp_avg, grad, scale, strict=True):
        source = (m.data_ptr(), STORAGE[m.dtype], g.data_ptr(), STORAGE[g.dtype], *beta1)
        _scale(_lion_pieces_kernel, source, g.numel(), norm, block, s)


def _scale(kernel: Callable[..., Any], source: tuple[Any, ...], n: int, norm: str, block: int, scale: Tensor) -> None:
    if not n:
        return
    size = min(block or _PIECE, _PIECE)
    sums = torch.empty(-(-n // size), dtype=torch.float64, device="cpu")
    parts = slices(sums.numel(), 1, -(-MIN_SLICE // size))
    run_slices(kernel, parts, *source, n, size, _NORMS[norm], sums.data_ptr())
    _finish_kernel(sums.data_ptr(), n, size, block or n, _NORMS[norm], scale.data_ptr(), scale.numel())


@kernel
def _pieces_kernel(
    first: int, last: int, x_ptr: int, x_dtype: Any, n: int, size: int, norm: int, sums_ptr: int
) -> None:
    values, lanes = np.empty(64, np.float32), np.empty(64, np.float64)
    for piece in range(first, last):
        lanes[:] = 0.0
        end = min((piece + 1) * size, n)
        for start in range(piece * size, end, 64):
            count = min(64, end - start)
            widen_into(values, array_at(x_ptr, start, count, x_dtype), count)
            _accumulate(lanes, values, count, norm)
        array_at(sums_ptr, piece, 1, _SUMS)[0] = _total(lanes, norm)


@kernel
def _lion_pieces_kernel(
    first: int,
    last: int,
    m_ptr: int,
    m_dtype: Any,
    g_ptr: int,
    g_dtype: Any,
    kept: float,
    new: float,
    n: int,
    size: int,
    norm: int,
    sums_ptr: int,
) -> None:
    values, lanes = np.empty(64, np.float32), np.empty(64, np.float64)
    for piece in range(first, last):
        lanes[:] = 0.0
        end = min((piece + 1) * size, n)
        for start in range(piece * size, end, 64):
            count = min(64, end - start)
            m, g = array_at(m_ptr, start, count, m_dtype), array_at(g_ptr, start, count, g_dtype)
            mix_into(values, m, g, count, np.float32(kept), np.float32(new))
            _accumulate(lanes, values, count, norm)
        array_at(sums_ptr, piece, 1, _SUMS)[0] = _total(lanes, norm)


@kernel
def _finish_kernel(sums_ptr: int, n: int, size: int, block: int, norm: int, scale_ptr: int, blocks: int) -> None:
    per_block = max(block // size, 1) if blocks > 1 else (n + size - 1) // size
    for i in range(blocks):
        pieces = min(per_block, (n + size - 1) // size - i * per_block)
        total = _total(array_at(sums_ptr, i * per_block, pieces, _SUMS), norm)
        mean = total / min(block, n - i * block)
        result = array_at(scale_ptr, i, 1, _SCALES)
        if norm == _LINF:
            result[0] = total
        else:
            result[0] = np.sqrt(mean) if norm == _L2 else mean


@device_function
def _accumulate(lanes: Any, values: Any, count: int, norm: int) -> None:
    """Add |v|, or v*v, of each value to its lane, or keep the lane's maximum."""
    if norm == _LINF:
        for j in range(count):
            lanes[j] = _maximum(lanes[j], np.float64(abs(values[j])))
    elif norm == _L2:
        for j in range(count):
            lanes[j] += np.float64(values[j]) * np.float64(values[j])
    else:
        for j in range(count):
            lanes[j] += np.float64(abs(values[j]))


@device_function
def _total(parts: Any, norm: int) -> float:
    total = 0.0
    for i in range(parts.size):
        total = _maximum(total, parts[i]) if norm == _LINF else total + parts[i]
    return total


@device_function
def _maximum(largest: float, value: float) -> float:
    """The larger one; NaN once one of them is."""
    return value if value > largest or value != value else largest
