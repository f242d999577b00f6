"""The stream whose time is the unit of all others, and reads that fill the caches."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

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
def read(a: Any) -> int:
    """Read an int64 array and write nothing."""
    seen = 0
    for j in range(a.size):
        seen |= a[j]
    return int(seen)


def wash_caches() -> None:
    """Fill the caches with unrelated data that need no writing back, whatever ran before."""
    read(_UNRELATED)
