"""block_scale and lion_block_scale: sums in float64, in an order that the number of threads does not change.

A block is summed in pieces of at most 65536 elements, a piece in 64 lanes; the pieces of all tensors are shared out to
the threads, and added up in order at the end.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lioncub.kernels.lists import TensorList
from lioncub.kernels.numba_cpu.compiling import device_function, kernel
from lioncub.kernels.numba_cpu.launch import run_sliced, tables
from lioncub.kernels.numba_cpu.memory import FLOATS, array_at, scratch
from lioncub.kernels.numba_cpu.signs import load_values
from lioncub.kernels.scalars import Mix

_PIECE = 65536
_SUMS = np.dtype(np.float64)
_NORMS = {"linf": 0, "l1": 1, "l2": 2}
_LINF = 0
_L2 = 2


def lion_block_scale(
    exp_avg: TensorList, grad: TensorList | None, beta1: Mix, norm: str, block: int, scale: TensorList
) -> None:
    """scale[i] = norm of each block of |update i|, or of exp_avg itself; scales of empty tensors are not written."""
    size = min(block or _PIECE, _PIECE)
    for rows, dtypes, _ in tables((exp_avg, grad), (scale,)):
        pieces = int(((rows[:, 0] + (size - 1)) // size).sum())
        how = (size, block, _NORMS[norm], np.empty(pieces, _SUMS))
        run_sliced(_pieces_kernel, pieces, rows, *dtypes, tuple(beta1), *how, unit=size)
        _finish_kernel(rows, *how)


@kernel
def _pieces_kernel(
    first: int,
    last: int,
    table: Any,
    x_dtype: Any,
    g_dtype: Any,
    beta1: tuple[float, float],
    size: int,
    block: int,
    norm: int,
    sums: Any,
) -> None:
    values, lanes = scratch(64, FLOATS), scratch(64, _SUMS)
    before = 0
    for row in range(table.shape[0]):
        n, x_ptr, g_ptr = table[row, 0], table[row, 3], table[row, 4]
        pieces = (n + size - 1) // size
        begin, end = max(first - before, 0), min(last - before, pieces)
        for piece in range(begin, end):
            lanes[:] = 0.0
            piece_end = min((piece + 1) * size, n)
            for start in range(piece * size, piece_end, 64):
                count = min(64, piece_end - start)
                load_values(values, x_ptr, g_ptr, start, count, beta1, x_dtype, g_dtype)
                _accumulate(lanes, values, count, norm)
            sums[before + piece] = _total(lanes, norm)
        before += pieces


@kernel
def _finish_kernel(table: Any, size: int, block: int, norm: int, sums: Any) -> None:
    before = 0
    for row in range(table.shape[0]):
        n, scale_ptr = table[row, 0], table[row, 5]
        pieces = (n + size - 1) // size
        per_block = max(block // size, 1) if block else pieces
        for i in range((pieces + per_block - 1) // per_block if n else 0):
            begin = i * per_block
            total = _total(sums[before + begin : before + min(begin + per_block, pieces)], norm)
            result = array_at(scale_ptr, i, 1, FLOATS)
            if norm == _LINF:
                result[0] = total
            else:
                mean = total / min(block or n, n - begin * size)
                result[0] = np.sqrt(mean) if norm == _L2 else mean
        before += pieces


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
    """Return the larger one; NaN once one of them is."""
    return value if value > largest or value != value else largest
