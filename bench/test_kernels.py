"""Speed of every op by every implementation that can run: the cases of `speed.cases`, on one thread or on a GPU."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from speed.cases import Cell, cells
from speed.data import Data
from speed.workbench import Workbench, device_time

# the reference is timed on a part first, since a call of the largest size can take half a minute
_PART = 64
# of one size and dtype at a time: the largest have gigabytes
_SHARED: dict[tuple[int, torch.dtype, str], Data] = {}


def _params() -> list[Any]:
    timers = {"cpu": time.thread_time, "torch": time.thread_time, "reference": time.thread_time}
    if torch.cuda.is_available():
        timers["triton"] = device_time
    return [
        pytest.param(cell, id=cell.name, marks=pytest.mark.benchmark(timer=timer))
        for impl, timer in timers.items()
        for cell in cells(impl)
    ]


def _data_of(cell: Cell) -> Data:
    key = cell.data_key()
    if key not in _SHARED:
        _SHARED.clear()
        _SHARED[key] = Data(*key)
    return _SHARED[key]


def _estimate(cell: Cell, data: Data, bench: Workbench) -> float | None:
    if cell.impl != "reference" or data.n < 2**20:
        return None
    call = cell.case.make(Data(data.n // _PART, data.dtype), cell.impl)
    start = bench.clock()
    call.run()
    return _PART * (bench.clock() - start)


@pytest.mark.parametrize("cell", _params())
def test_kernel(benchmark: Any, benches: dict[str, Workbench], cell: Cell) -> None:
    data = _data_of(cell)
    bench = benches[data.device]
    tiny = cell.case.make(Data(4096, data.dtype, data.device), cell.impl)
    tiny.run()
    estimate = _estimate(cell, data, bench)
    call = cell.case.make(data, cell.impl)
    # nobody waits for the reference
    budget = 0.2 if cell.impl == "reference" else 0.5
    bench.measure(benchmark, call, prelude=tiny.run, estimate=estimate, budget=budget, kind="kernel", name=cell.name)
