"""What torch.compile makes of a step: eager against compiled time, number of graphs, seconds of compilation.

    python bench/compiling.py

One worker, and two over Gloo; the tensors have the shapes of GPT-2's, with fewer columns.
"""

from __future__ import annotations

import socket
import statistics
import time
import warnings
from collections.abc import Callable

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lioncub import LionCub

LAYERS, WIDTH, VOCABULARY, CONTEXT = 12, 192, 8192, 512
ROUNDS, STEPS = 7, 5


def parameters() -> list[nn.Parameter]:
    """148 tensors, as many as GPT-2 has, with gradients."""
    shapes: list[tuple[int, ...]] = [(VOCABULARY, WIDTH), (CONTEXT, WIDTH), (WIDTH,), (WIDTH,)]
    for _ in range(LAYERS):
        for columns, rows in ((3, 1), (1, 1), (4, 1), (1, 4)):
            shapes += [(columns * WIDTH, rows * WIDTH), (columns * WIDTH,)]
        shapes += [(WIDTH,)] * 4
    found = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in found:
        param.grad = torch.randn_like(param)
    return found


def seconds_of(step: Callable[[], object]) -> float:
    """Of one step."""
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - began) / STEPS


def measure(rank: int, workers: int, port: int, queue: mp.SimpleQueue) -> None:
    """Time the steps in turns, so that a busy machine slows all of them."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    warnings.simplefilter("ignore")
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers)
    lr = torch.tensor(1e-4)
    ordinary = LionCub(parameters(), lr=lr)
    capturable = LionCub(parameters(), lr=lr, capturable=True)
    traced = LionCub(parameters(), lr=lr, capturable=True)
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(traced.step, fullgraph=True, backend=counter)
    began = time.perf_counter()
    step()
    compilation = time.perf_counter() - began
    ways = {"ordinary": ordinary.step, "capturable": capturable.step, "compiled": step}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            times[name].append(seconds_of(way))
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        queue.put((len(parameters()), medians, compilation, counter.frame_count))
    if workers > 1:
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    """Print the table."""
    elements = sum(p.numel() for p in parameters())
    rows = []
    for workers in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        queue = mp.get_context("spawn").SimpleQueue()
        mp.spawn(measure, (workers, port, queue), nprocs=workers)
        tensors, medians, compilation, graphs = queue.get()
        times = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in medians.values())
        ratio = medians["compiled"] / medians["ordinary"]
        rows.append(f"| {workers} | {times} | {ratio:.2f} | {graphs} | {compilation:.0f} s |")
    print(f"{tensors} tensors, {elements / 1e6:.1f} M fp32 parameters, one thread per worker, medians of {ROUNDS}.\n")
    print("| workers | ordinary step | capturable, eager | compiled | compiled / ordinary | graphs | compilation |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
