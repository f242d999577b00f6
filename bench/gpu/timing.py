"""Times on the device without the host's share: calls are queued behind a kernel that sleeps, so none waits for Python.

A call that waits for the device empties the queue: its time is then the host's too. On a CPU all runs once, for a dry
run, and graphs are plain calls.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

Run = Callable[[], object]
Result = TypeVar("Result")
# cycles per second of `torch.cuda._sleep`: a slower GPU sleeps longer, which does no harm
_CLOCK = 2e9
_LONGEST_SLEEP = 0.2
_MOST_SETS = 8


class Timing(NamedTuple):
    """Of one call: the median on the device, the rounds' range relative to it, and the host's time to enqueue it."""

    seconds: float
    spread: float
    host_seconds: float


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_dry = device, device.type == "cpu"
        self._cache_bytes = 1 if self.is_dry else torch.cuda.get_device_properties(device).L2_cache_size

    def synchronize(self) -> None:
        """Wait for the device."""
        if not self.is_dry:
            torch.cuda.synchronize(self.device)

    def data_sets(self, n_bytes: int) -> int:
        """How many data sets of that size, tried in turn, leave nothing of one in the L2 cache until its next turn."""
        return max(1, min(_MOST_SETS, math.ceil(4 * self._cache_bytes / n_bytes)))

    def _loop_seconds(self, runs: Sequence[Run], calls: int, *, is_waiting: bool) -> float:
        """Seconds of the host for one call; ``is_waiting``: until the device is done."""
        calls = 1 if self.is_dry else calls
        self.synchronize()
        began = time.perf_counter()
        for i in range(calls):
            runs[i % len(runs)]()
        if is_waiting:
            self.synchronize()
        return (time.perf_counter() - began) / calls

    def wall_seconds(self, run: Run, steps: int = 20) -> float:
        """Seconds of one call in a loop, the device's work included; the first three calls do not count."""
        for _ in range(0 if self.is_dry else 3):
            run()
        return self._loop_seconds([run], steps, is_waiting=True)

    def device_seconds(self, runs: Sequence[Run], calls: int = 10, rounds: int = 5) -> Timing:
        """The time of one call on the device, where ``runs``, equal but for their data, take turns."""
        for run in [] if self.is_dry else runs:
            run()
        host = self._loop_seconds(runs, calls, is_waiting=False)
        found = [host] if self.is_dry else [self._round_seconds(runs, calls, host) for _ in range(rounds)]
        median = statistics.median(found)
        return Timing(median, (max(found) - min(found)) / median, host)

    def _round_seconds(self, runs: Sequence[Run], calls: int, host_seconds: float) -> float:
        self.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(_CLOCK * min(_LONGEST_SLEEP, 1.5 * host_seconds * calls + 2e-4)))
        start.record()
        for i in range(calls):
            runs[i % len(runs)]()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    def capture(self, run: Callable[[], Result], warmups: int = 3) -> Callable[[], Result]:
        """Call ``run`` so many times, then capture it in a CUDA graph; gives what replays it."""
        if self.is_dry:
            for _ in range(warmups):
                run()
            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(warmups):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay() -> Result:
            graph.replay()
            return result

        return replay
