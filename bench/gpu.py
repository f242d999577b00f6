"""Achieved bandwidth of every kernel on a GPU against a copy on the same device, and whole steps against peers.

    python bench/gpu.py --out docs

writes gpu_speed.md and gpu_speed.json. With ``--device cpu`` and TRITON_INTERPRET=1 it runs, slowly and without
meaning, what it would run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lioncub
from lioncub import LionCub, kernels
from lioncub.kernels.layout import packed_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VOTERS = (2, 8, 64)
Run = Callable[[], object]


@dataclass(frozen=True)
class Job:
    """Something to time: what it is called, the bytes that it must move, and the call."""

    name: str
    dtype: str
    n_bytes: int
    run: Run


@dataclass(frozen=True)
class Row:
    """A result: median milliseconds, GB/s, and the ratio to a copy of as many bytes in the same run."""

    name: str
    dtype: str
    n_bytes: int
    milliseconds: float
    gigabytes_per_second: float
    of_copy: float


def seconds_of(run: Run, device: torch.device, repeats: int) -> float:
    """Median of one call; on a GPU of what its events say."""
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def kernel_jobs(n: int, device: torch.device) -> list[Job]:
    """Every op on ``n`` elements, with the bytes of its inputs and outputs."""
    jobs = []
    codes = packed_bytes(n)
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randint(0, 256, (codes,), generator=generator, dtype=torch.uint8, device=device)
    for dtype in DTYPES:
        x, g = (torch.randn(n, device=device).to(dtype) for _ in range(2))
        m = torch.zeros(n, device=device)
        status, scale = torch.zeros(1, dtype=torch.int32, device=device), torch.full((1,), 0.5, device=device)
        size, name = x.element_size(), str(dtype).removeprefix("torch.")
        out = torch.empty(codes, dtype=torch.uint8, device=device)

        def job(op: str, n_bytes: float, run: Run, dtype_name: str = name) -> None:
            jobs.append(Job(op, dtype_name, int(n_bytes), run))

        def encode(m: Tensor = m, g: Tensor = g, out: Tensor = out, status: Tensor = status) -> object:
            return kernels.lion_encode(m, g, beta1=0.9, out=out, status=status)

        def encode_(m: Tensor = m, g: Tensor = g, out: Tensor = out) -> object:
            return kernels.lion_encode_(m, g, beta1=0.9, beta2=0.99, out=out)

        def apply(x: Tensor = x, g: Tensor = g, m: Tensor = m) -> object:
            return kernels.apply_votes_(x, packed, grad=g, exp_avg=m, beta2=0.99, lr=1e-4, weight_decay=0.1)

        def apply_alone(x: Tensor = x) -> object:
            return kernels.apply_votes_(x, packed, lr=1e-4, weight_decay=0.1)

        def step(x: Tensor = x, g: Tensor = g, m: Tensor = m) -> object:
            return kernels.lion_step_(x, g, m, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1)

        levels = torch.empty(packed_bytes(n, 2), dtype=torch.uint8, device=device)

        def quantize(x: Tensor = x, scale: Tensor = scale, levels: Tensor = levels) -> object:
            return kernels.quantize(x, bits=2, norm="l1", scale=scale, out=levels)

        def quantize_stochastic(x: Tensor = x, scale: Tensor = scale, levels: Tensor = levels) -> object:
            return kernels.quantize(x, bits=2, norm="l1", scale=scale, stochastic=True, out=levels)

        job("encode", n * (4 + size) + codes, encode)
        job("encode, momentum advances", n * (8 + size) + codes, encode_)
        job("apply", n * (3 * size + 8) + codes, apply)
        job("apply, parameter alone", n * 2 * size + codes, apply_alone)
        job("whole step", n * (3 * size + 8), step)
        job("quantize 2 bits, given scale", n * size + 2 * codes, quantize)
        job("quantize 2 bits, stochastic", n * size + 2 * codes, quantize_stochastic)
        job("pack", n * size + codes, lambda x=x: kernels.pack_signs(x))  # type: ignore[misc]
    for voters in VOTERS:
        ballots = torch.randint(0, 256, (voters, codes), generator=generator, dtype=torch.uint8, device=device)
        n_bytes = (voters + 1) * codes
        jobs.append(Job(f"vote of {voters}", "", n_bytes, lambda b=ballots: kernels.majority_vote(b)))  # type: ignore[misc]
    return jobs


def parameters(device: torch.device, width: int, layers: int, vocabulary: int) -> list[nn.Parameter]:
    """As many tensors as GPT-2 has, of its shapes at width 768, with gradients."""
    shapes: list[tuple[int, ...]] = [(vocabulary, width), (1024, width), (width,), (width,)]
    for _ in range(layers):
        for columns, rows in ((3, 1), (1, 1), (4, 1), (1, 4)):
            shapes += [(columns * width, rows * width), (columns * width,)]
        shapes += [(width,)] * 4
    found = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for param in found:
        param.grad = torch.randn_like(param)
    return found


def step_jobs(device: torch.device, width: int, layers: int, vocabulary: int) -> list[Job]:
    """Whole steps of optimizers, peers where they are installed; bytes are those of one pass over x, g and m."""

    def new() -> list[nn.Parameter]:
        return parameters(device, width, layers, vocabulary)

    optimizers: dict[str, torch.optim.Optimizer] = {
        "LionCub, one worker": LionCub(new()),
        "LionCub, capturable": LionCub(new(), lr=torch.tensor(1e-4, device=device), capturable=True),
        "lioncub.Lion": lioncub.Lion(new()),
        "torch SGD with momentum, foreach": torch.optim.SGD(new(), lr=1e-4, momentum=0.9, foreach=True),
        "torch SGD with momentum, fused": torch.optim.SGD(new(), lr=1e-4, momentum=0.9, fused=True),
        "torch AdamW, fused": torch.optim.AdamW(new(), fused=True),
    }
    if importlib.util.find_spec("lion_pytorch") is not None:
        from lion_pytorch import Lion

        optimizers["lion-pytorch"] = Lion(new())
        if device.type == "cuda":
            optimizers["lion-pytorch, Triton"] = Lion(new(), use_triton=True)
    if device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        optimizers["bitsandbytes Lion"] = bitsandbytes.optim.Lion(new())
    n_bytes = 20 * sum(p.numel() for p in new())
    return [Job(name, "float32", n_bytes, optimizer.step) for name, optimizer in optimizers.items()]


def measure(jobs: Sequence[Job], device: torch.device, repeats: int) -> list[Row]:
    """Each job, and before it a copy of as many bytes."""
    rows = []
    for job in jobs:
        # a copy reads and writes
        source = torch.empty(max(job.n_bytes // 2, 1), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = seconds_of(lambda s=source, t=target: t.copy_(s), device, repeats)  # type: ignore[misc]
        seconds = seconds_of(job.run, device, repeats)
        rows.append(Row(job.name, job.dtype, job.n_bytes, 1e3 * seconds, job.n_bytes / seconds / 1e9, copy / seconds))
    return rows


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["| what | dtype | ms | GB/s | of a copy |", "|---|---|---:|---:|---:|"]
    return lines + [
        f"| {row.name} | {row.dtype} | {row.milliseconds:.3f} | {row.gigabytes_per_second:.0f} | {row.of_copy:.0%} |"
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--elements", type=int, default=2**26, help="of each kernel's tensors; default: 2^26")
    parser.add_argument("--width", type=int, default=768, help="of the GPT-2 layout; default: 768, GPT-2 small")
    parser.add_argument("--layers", type=int, default=12, help="of the GPT-2 layout; default: 12")
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the GPT-2 layout; default: 50257")
    parser.add_argument("--repeats", type=int, default=30, help="calls of which the median is taken; default: 30")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder; default: docs")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device: expected a machine with a GPU for cuda, got none", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, interpreted"
    measured = {
        "kernels": measure(kernel_jobs(options.elements, device), device, options.repeats),
        "steps": measure(step_jobs(device, options.width, options.layers, options.vocabulary), device, options.repeats),
    }
    facts = {"device": name, "torch": torch.__version__, "elements": options.elements, "width": options.width}
    options.out.mkdir(parents=True, exist_ok=True)
    found = {key: [asdict(row) for row in rows] for key, rows in measured.items()}
    (options.out / "gpu_speed.json").write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    text = ["# Speed on a GPU", "", f"{name}, PyTorch {torch.__version__}; medians of {options.repeats}.", ""]
    text += [f"Kernels, {options.elements} elements:", "", *table(measured["kernels"]), ""]
    text += [f"Whole steps, GPT-2's layout at width {options.width}:", "", *table(measured["steps"])]
    (options.out / "gpu_speed.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
