"""Slices of work on as many threads as torch uses, in a pool that survives os.fork and whose work no signal leaves."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch

# below this many elements per thread, waking a thread costs more than it saves
MIN_SLICE = 65536


class _Task:
    """One slice for another thread: its result, or what it raised, once ``done``."""

    def __init__(self, kernel: Callable[..., Any], part: tuple[int, int], args: tuple[Any, ...]) -> None:
        self._kernel, self._part, self._args = kernel, part, args
        # its wait is one call of C++ that ends with the task alone; Python's locks let a signal's exception through
        self.done: torch.futures.Future[None] = torch.futures.Future()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._kernel(*self._part, *self._args)
        except BaseException as error:
            # raised by `result`, in the thread that asked for it
            self._error = error
        finally:
            self.done.set_result(None)

    def result(self) -> Any:
        """What the kernel returned; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


class _Pool:
    """Worker threads, started when first needed; the calling thread is one more."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over: after a fork the child has neither the parent's threads nor, perhaps, its lock released."""
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self.size = 0

    def at_least(self, size: int) -> queue.SimpleQueue[_Task]:
        """Where to put tasks for ``size`` threads or more."""
        with self._lock:
            while self.size < size:
                # they never end, and end the process for nobody
                threading.Thread(target=_work, args=(self._tasks,), name=f"lioncub_{self.size}", daemon=True).start()
                self.size += 1
            return self._tasks


def _work(tasks: queue.SimpleQueue[_Task]) -> None:
    while True:
        task = tasks.get()
        task.run()
        # while it waits for the next one, it keeps no tensor's memory
        del task


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
    """``kernel(first, last, *args)`` for each part at once, and what they returned; raises what one raised.

    Kernels write through plain addresses, so whatever happens here, Ctrl-C included, all of them have ended before the
    caller may free memory. Python raises the exceptions of signals only between its own instructions, after a call has
    returned: handing over is one call of C, and so is waiting.
    """
    if len(parts) == 1:
        return [kernel(*parts[0], *args)]
    others = [_Task(kernel, part, args) for part in parts[1:]]
    put = map(_POOL.at_least(len(others)).put, others)
    wait = map(torch._C.Future.wait, [other.done for other in others])
    try:
        list(put)
        mine = kernel(*parts[0], *args)
    finally:
        list(wait)
    return [mine, *[other.result() for other in others]]
