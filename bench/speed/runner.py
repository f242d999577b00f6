"""Times everything: kernels on each implementation that can run, peers, and optimizers' steps, on one thread."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from reporting.records import Journal, Record, run_record

from speed.cases import Cell, cells
from speed.data import SIZES, Data
from speed.peers import PEERS
from speed.steps import STEPS, gpt2_shapes, make_step
from speed.timing import Timer, keep_freed_memory

# the reference is timed on a part first, since a call of the largest size can take half a minute
_PART = 64

Job = tuple[str, str, Callable[[], Record]]


def run(path: Path, only: Sequence[str]) -> int:
    """Time all whose name has every word of ``only`` and write a record of each; returns their number.

    Raises ValueError where there is none.
    """
    keep_freed_memory()
    torch.set_num_threads(1)
    chosen = [job for job in jobs() if all(word in job[1] for word in only)]
    if not chosen:
        raise ValueError(f"--only: expected words of a benchmark's name, got {' '.join(only)}")
    began = time.monotonic()
    gc.disable()
    with Journal(path) as journal:
        journal.write(run_record())
        for number, (kind, name, measure) in enumerate(chosen, 1):
            print(f"\r{time.monotonic() - began:4.0f} s, {number}/{len(chosen)} {name}\033[K", end="", flush=True)
            journal.write({"kind": kind, "name": name, **measure()})
            gc.collect()
    print(f"\r{path}: {len(chosen)} benchmarks in {time.monotonic() - began:.0f} s\033[K")
    return len(chosen)


def jobs() -> Iterator[Job]:
    """Yield kind, name and measurement of all."""
    timers = {device: Timer(device) for device in ("cpu", "cuda")}
    # tensors of one size and dtype at a time: the largest have gigabytes
    shared: dict[tuple[int, torch.dtype, str], Data] = {}

    def data_of(key: tuple[int, torch.dtype, str]) -> Data:
        if key not in shared:
            shared.clear()
            shared[key] = Data(*key)
        return shared[key]

    def kernel(cell: Cell) -> Record:
        data = data_of(cell.data_key())
        timer = timers[data.device]
        tiny = cell.case.make(Data(4096, data.dtype, data.device), cell.impl)
        tiny.run()
        estimate = None
        if cell.impl == "reference" and data.n >= 2**20:
            part = cell.case.make(Data(data.n // _PART, data.dtype), cell.impl)
            start = timer.clock()
            part.run()
            estimate = _PART * (timer.clock() - start)
        # nobody waits for the reference
        budget = 0.2 if cell.impl == "reference" else 0.5
        return timer.measure(cell.case.make(data, cell.impl), prelude=tiny.run, estimate=estimate, budget=budget)

    for impl in ("cpu", "torch", "reference", *(["triton"] if torch.cuda.is_available() else [])):
        for cell in cells(impl):
            yield "kernel", cell.name, lambda cell=cell: kernel(cell)
    large = (SIZES["16Mi"], torch.float32, "cpu")
    for peer in PEERS:
        yield "peer", peer.name, lambda peer=peer: timers["cpu"].measure(peer.make(data_of(large)))
    for step in STEPS:
        kind = "step" if step.is_ours else "peer"
        yield kind, step.name, lambda step=step: timers["cpu"].measure(make_step(step, gpt2_shapes()), budget=3.0)
