"""Timing: before every round of a call the stream is timed, so that each round has its own baseline.

Times are CPU times of the one thread that runs, so that other processes' turns are not counted; on a GPU, wall clock.
Where a call moves more than a few MB, both start with caches full of unrelated, unmodified data: a kernel that only
reads would else write back for its predecessor. Smaller calls are repeated within a round, with warm caches.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from reporting.records import Record

from speed.data import Call
from speed.streams import stream, wash_caches

STREAM_BYTES = 12
# beyond the caches a longer stream is no slower per byte
_LONGEST_STREAM = 2**26
_COLD_BYTES = 2**21
_FEW_ROUNDS = 5
# small calls need as much time as large ones, or one disturbance is all that they see
_MOST_ROUNDS = {True: 31, False: 201}
_ROUND_SECONDS = 1e-3
_MOST_CALLS = 1000
_TICK = 1e-7
# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _NEVER = -1, -4, 2**31 - 1


class Plan(NamedTuple):
    """How a call is timed: rounds, and calls and streams in each."""

    rounds: int
    calls: int
    streams: int
    is_cold: bool


def plan_rounds(bytes_moved: int, call_seconds: float, stream_seconds: float, budget: float) -> Plan:
    """Plan rounds for about ``budget`` seconds: at least 5, but 1 or 2 of a call that is very slow."""
    is_cold = bytes_moved >= _COLD_BYTES
    # a clock may not have moved
    call_seconds, stream_seconds = max(call_seconds, _TICK), max(stream_seconds, _TICK)
    calls = streams = 1
    if not is_cold:
        calls, streams = (
            min(math.ceil(_ROUND_SECONDS / seconds), _MOST_CALLS) for seconds in (call_seconds, stream_seconds)
        )
    per_round = calls * call_seconds + streams * stream_seconds
    fewest = min(_FEW_ROUNDS, math.ceil(2 * budget / per_round))
    return Plan(max(min(int(budget / per_round), _MOST_ROUNDS[is_cold]), fewest), calls, streams, is_cold)


def keep_freed_memory() -> None:
    """Let glibc give freed memory to later calls of this process instead of back to the system.

    What a call allocates would else be new pages or old ones by what ran before, and zeroing 4 MiB of new ones takes
    five times as long as filling them. Elsewhere nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def device_time() -> float:
    """Return the wall clock once the GPU has nothing left to do."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Timer:
    """Times calls on one device against its stream."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.clock = time.thread_time if device == "cpu" else device_time

    @cached_property
    def _arrays(self) -> tuple[Any, Any]:
        a, b = (torch.full((_LONGEST_STREAM,), value, device=self.device) for value in (0.0, 1.0))
        return (a.numpy(), b.numpy()) if self.device == "cpu" else (a, b)

    def stream_seconds(self, elements: int, times: int = 1) -> float:
        """Time the stream over so many elements, so many times."""
        a, b = (array[:elements] for array in self._arrays)
        start = self.clock()
        if self.device == "cpu":
            stream(a, b, np.float32(0.5), times)
        else:
            for _ in range(times):
                a.add_(b, alpha=0.5)
        return self.clock() - start

    def measure(
        self,
        call: Call,
        *,
        prelude: Callable[[], object] | None = None,
        estimate: float | None = None,
        budget: float = 0.5,
    ) -> Record:
        """Time ``call`` for about ``budget`` seconds; see `summary` for what is returned.

        ``prelude``, the same call on next to nothing, brings the interpreter's own code back into the caches: that
        matters where a call takes a millisecond. ``estimate``, in seconds, saves the calls that would find it out.
        """
        elements = min(max(call.bytes_moved // STREAM_BYTES, 1), _LONGEST_STREAM)
        if estimate is None:
            # the first call compiles
            call.run()
            estimate = self._seconds(call, 1)
        self.stream_seconds(elements)
        plan = plan_rounds(call.bytes_moved, estimate, self.stream_seconds(elements), budget)
        seconds, streams = [], []
        for _ in range(plan.rounds):
            self._begin(plan, prelude)
            streams.append(self.stream_seconds(elements, plan.streams) / plan.streams)
            self._begin(plan, prelude)
            seconds.append(self._seconds(call, plan.calls) / plan.calls)
        return summary(call.bytes_moved, seconds, elements * STREAM_BYTES, streams)

    def _seconds(self, call: Call, times: int) -> float:
        start = self.clock()
        for _ in range(times):
            call.run()
        return self.clock() - start

    def _begin(self, plan: Plan, prelude: Callable[[], object] | None) -> None:
        if plan.is_cold and self.device == "cpu":
            wash_caches()
            if prelude is not None:
                prelude()


def summary(n_bytes: int, seconds: Sequence[float], stream_bytes: int, streams: Sequence[float]) -> Record:
    """Return the bandwidth relative to the stream's: median ``ratio`` over rounds, quartiles ``low`` and ``high``."""
    pairs = zip(seconds, streams, strict=True)
    ratios = [(n_bytes / max(call, _TICK)) / (stream_bytes / max(base, _TICK)) for call, base in pairs]
    low, ratio, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    typical = max(median(seconds), _TICK)
    gb_per_s = n_bytes / typical / 1e9
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "gb_per_s": gb_per_s,
        "ms": 1e3 * typical,
        "rounds": len(ratios),
    }
