"""Slices of work on as many threads as torch uses, in a pool that survives os.fork."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

# below this many elements per thread, waking a thread costs more than it saves
MIN_SLICE = 65536


class _Pool:
    """Worker threads, started when first needed; the calling thread is one more."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over: after a fork the child has neither the parent's threads nor, perhaps, its lock released."""
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._size = 0

    def at_least(self, size: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._executor is None or self._size < size:
                # a replaced executor finishes what it has; its threads end with its last reference
                self._executor = ThreadPoolExecutor(size, thread_name_prefix="lioncub")
                self._size = size
            return self._executor


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def slices(total: int, multiple: int = 64, min_slice: int = MIN_SLICE) -> list[tuple[int, int]]:
    """(first, last) of each thread's part of ``total`` items, cut at multiples of ``multiple``."""
    workers = min(torch.get_num_threads(), total // min_slice)
    if workers <= 1:
        return [(0, total)]
    bounds = [total * i // workers // multiple * multiple for i in range(workers)]
    return list(zip(bounds, [*bounds[1:], total], strict=True))


def run_slices(kernel: Callable[..., Any], parts: list[tuple[int, int]], *args: Any) -> list[Any]:
    """``kernel(first, last, *args)`` for each part at once, and what they returned."""
    if len(parts) == 1:
        return [kernel(*parts[0], *args)]
    pool = _POOL.at_least(len(parts) - 1)
    others = [pool.submit(kernel, *part, *args) for part in parts[1:]]
    try:
        mine = kernel(*parts[0], *args)
    finally:
        # they write through plain addresses, so whatever happens here they must end before memory is freed
        wait(others)
    return [mine, *[other.result() for other in others]]
