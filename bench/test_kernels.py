"""Speed of the CPU kernels, one thread, 16.8 M float32 elements. Before every round of a kernel the stream is timed.

So each round has its own baseline, however busy the machine; `report.py` makes the table from the medians of ratios.
Both start with caches full of unrelated, unmodified data: a kernel that only reads would else write back for its
predecessor. Times are CPU times of the one thread that runs, so that other processes' turns are not counted.
LIONCUB_BENCH_ELEMENTS sets another size (a multiple of 512).
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lion_pytorch
import numpy as np
import pytest
import torch
from baselines import foreach_lion_step, numpy_vote, read, stream, torch_apply, torch_encode

from lioncub import kernels
from lioncub.kernels import reference
from lioncub.kernels.scalars import Mix, round_to_float32

pytestmark = pytest.mark.benchmark(timer=time.thread_time)

N = int(os.environ.get("LIONCUB_BENCH_ELEMENTS", 16_777_216))
VOTERS = 8
# twice as much is read, four times the last-level cache of the machines in mind
WASH_BYTES = 2**26
LR, DECAY, BETA1, BETA2 = 1e-4, 0.1, 0.9, 0.99


class Workbench:
    """Tensors of N elements that all benchmarks share, and the baseline that each round is compared with."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.param, self.grad, self.exp_avg = (torch.randn(N, generator=generator) for _ in range(3))
        self.packed = torch.randint(0, 256, (N // 8,), dtype=torch.uint8, generator=generator)
        self.voters = torch.randint(0, 256, (VOTERS, N // 8), dtype=torch.uint8, generator=generator)
        self.status = torch.zeros(1, dtype=torch.int32)
        self.a, self.b = torch.zeros(N).numpy(), torch.ones(N).numpy()
        self.unrelated = np.ones(2 * WASH_BYTES // 8, dtype=np.int64)

    def wash_caches(self) -> None:
        """Fill the caches with unrelated data that need no writing back, whatever ran before."""
        half = self.unrelated.size // 2
        read(self.unrelated[:half], self.unrelated[half:])

    def stream_seconds(self) -> float:
        self.wash_caches()
        start = time.thread_time()
        stream(self.a, self.b, np.float32(0.5))
        return time.thread_time() - start

    def run(
        self,
        benchmark: Any,
        call: Callable[[], object],
        traffic: float,
        group: str,
        rounds: int = 21,
        prelude: Callable[[], object] | None = None,
    ) -> None:
        """Time ``call``, which moves ``traffic`` bytes per element, in rounds that begin with the stream.

        ``prelude``, the same call on next to nothing, brings the interpreter's own code back into the caches: that
        matters where a call takes a millisecond.
        """
        streams: list[float] = []

        def setup() -> None:
            streams.append(self.stream_seconds())
            self.wash_caches()
            if prelude is not None:
                prelude()

        call()
        self.stream_seconds()
        benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1, warmup_rounds=0)
        benchmark.group = group
        benchmark.extra_info.update(
            elements=N, bytes_per_element=traffic, stream_seconds=streams[-rounds:], machine=describe_machine()
        )


def describe_machine() -> dict[str, str]:
    """What a reader needs to place the figures."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numba", "numpy", "lion-pytorch")},
    }


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Workbench()
    torch.set_num_threads(before)


def test_stream(benchmark: Any, bench: Workbench) -> None:
    bench.run(benchmark, lambda: stream(bench.a, bench.b, np.float32(0.5)), 12, "baseline")


def test_read(benchmark: Any, bench: Workbench) -> None:
    a, b = bench.a.view(np.int64), bench.b.view(np.int64)
    bench.run(benchmark, lambda: read(a, b), 8, "baseline")


def test_lion_encode(benchmark: Any, bench: Workbench) -> None:
    bench.run(
        benchmark,
        lambda: kernels.lion_encode(bench.exp_avg, bench.grad, beta1=BETA1, out=bench.packed, status=bench.status),
        8.125,
        "encode",
    )


def test_lion_encode_(benchmark: Any, bench: Workbench) -> None:
    bench.run(
        benchmark,
        lambda: kernels.lion_encode_(
            bench.exp_avg, bench.grad, beta1=BETA1, beta2=BETA2, out=bench.packed, status=bench.status
        ),
        12.125,
        "encode",
    )


def test_torch_encode(benchmark: Any, bench: Workbench) -> None:
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    bench.run(benchmark, lambda: torch_encode(bench.exp_avg, bench.grad, BETA1, powers), 8.125, "encode", rounds=7)


def test_reference_encode(benchmark: Any, bench: Workbench) -> None:
    mix = Mix(round_to_float32(BETA1), round_to_float32(1 - BETA1))
    bench.run(
        benchmark,
        lambda: reference.lion_encode([bench.exp_avg], [bench.grad], mix, 0, [bench.packed], bench.status),
        8.125,
        "encode",
        rounds=3,
    )


def _run_vote(benchmark: Any, bench: Workbench, counts: torch.Tensor | None) -> None:
    def vote(voters: torch.Tensor, out: torch.Tensor) -> None:
        kernels.majority_vote(voters, out=out, counts=counts)

    out, few, tiny = torch.empty(N // 8, dtype=torch.uint8), bench.voters[:, :8].contiguous(), bench.packed[:8].clone()
    traffic = (VOTERS + 1) / 8
    bench.run(benchmark, lambda: vote(bench.voters, out), traffic, "vote", rounds=41, prelude=lambda: vote(few, tiny))


def test_majority_vote(benchmark: Any, bench: Workbench) -> None:
    _run_vote(benchmark, bench, None)


def test_majority_vote_counts(benchmark: Any, bench: Workbench) -> None:
    _run_vote(benchmark, bench, torch.zeros(2, dtype=torch.int64))


def test_numpy_vote(benchmark: Any, bench: Workbench) -> None:
    voters = bench.voters.numpy()
    bench.run(benchmark, lambda: numpy_vote(voters), (VOTERS + 1) / 8, "vote", rounds=5)


def test_apply_votes_(benchmark: Any, bench: Workbench) -> None:
    bench.run(
        benchmark,
        lambda: kernels.apply_votes_(bench.param, bench.packed, lr=LR, weight_decay=DECAY),
        8.125,
        "apply",
    )


def test_apply_votes_with_momentum_(benchmark: Any, bench: Workbench) -> None:
    bench.run(
        benchmark,
        lambda: kernels.apply_votes_(
            bench.param,
            bench.packed,
            lr=LR,
            weight_decay=DECAY,
            grad=bench.grad,
            exp_avg=bench.exp_avg,
            beta2=BETA2,
        ),
        20.125,
        "apply",
    )


def test_torch_apply(benchmark: Any, bench: Workbench) -> None:
    shifts = torch.arange(8, dtype=torch.uint8)
    bench.run(
        benchmark,
        lambda: torch_apply(bench.param, bench.packed, LR, 1 - LR * DECAY, shifts),
        8.125,
        "apply",
        rounds=7,
    )


def test_lion_step_(benchmark: Any, bench: Workbench) -> None:
    bench.run(
        benchmark,
        lambda: kernels.lion_step_(
            bench.param, bench.grad, bench.exp_avg, lr=LR, beta1=BETA1, beta2=BETA2, weight_decay=DECAY
        ),
        20,
        "step",
    )


def test_foreach_lion_step(benchmark: Any, bench: Workbench) -> None:
    lists = [bench.param], [bench.grad], [bench.exp_avg]
    bench.run(benchmark, lambda: foreach_lion_step(*lists, LR, BETA1, BETA2, DECAY), 20, "step", rounds=7)


def test_lion_pytorch_step(benchmark: Any, bench: Workbench) -> None:
    param = torch.nn.Parameter(bench.param.clone())
    param.grad = bench.grad
    optimizer = lion_pytorch.Lion([param], lr=LR, betas=(BETA1, BETA2), weight_decay=DECAY)
    bench.run(benchmark, optimizer.step, 20, "step", rounds=7)
