"""What times are divided by, and what else tells how fast a core can be: streams, reads, random words alone."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from lioncub.kernels.numba_cpu.arithmetic import random_words

# twice as much is read, four times the last-level cache of the machines in mind
_WASH_BYTES = 2**26
_UNRELATED = np.ones(2 * _WASH_BYTES // 8, dtype=np.int64)


@numba.njit(nogil=True)
def stream(a: Any, b: Any, s: np.float32, times: int) -> None:
    """Add s*b to a in place, so many times: each reads 8 bytes and writes 4 per element."""
    for _ in range(times):
        for j in range(a.size):
            a[j] += s * b[j]


@numba.njit(nogil=True)
def read(a: Any, b: Any) -> int:
    """Read two int64 arrays and write nothing, each in four places by turns, the fastest order found."""
    # short of a quarter, as in the kernels, so that the places are not a power of two apart
    size = max(a.size // 4 - 160, 0)
    a0, a1, a2, a3 = a[:size], a[size : 2 * size], a[2 * size : 3 * size], a[3 * size : 4 * size]
    b0, b1, b2, b3 = b[:size], b[size : 2 * size], b[2 * size : 3 * size], b[3 * size : 4 * size]
    seen = 0
    for j in range(size):
        seen |= a0[j] | a1[j] | a2[j] | a3[j] | b0[j] | b1[j] | b2[j] | b3[j]
    for j in range(4 * size, a.size):
        seen |= a[j] | b[j]
    return int(seen)


@numba.njit(nogil=True)
def philox(n: int) -> int:
    """Draw the random words of n elements, a multiple of 64, by the kernels' own function; writes nothing."""
    words = np.empty(64, dtype=np.uint32)
    seen = np.uint32(0)
    for start in range(0, n, 64):
        random_words((1, 2, 3, 4), 5, start, words)
        for i in range(64):
            seen ^= words[i]
    return int(seen)


def wash_caches() -> None:
    """Fill the caches with unrelated data that need no writing back, whatever ran before."""
    half = _UNRELATED.size // 2
    read(_UNRELATED[:half], _UNRELATED[half:])
