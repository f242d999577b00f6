"""Workers that share one GPU over Gloo with CUDA tensors train a GPT by each method, on links of 1 and 10 Gb/s.

A link is shaped between network namespaces where these can be made, else every TCP connection is paced to its share of
the rate (``pace.c``), else nothing is limited; rows say which.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo.gpt import GPT
from demo.text import Text, load_text, training_windows
from netlab.lab import Lab, LabError, worker_environment
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from gpu.driver import CARRIED, entry
from gpu.workbench import Workbench
from lioncub import LionCub

_WORKERS, _RATES = 4, (10**9, 10**10)
_SHAPE = {"layers": 8, "heads": 8, "width": 512, "context": 256}
_TINY = {"layers": 1, "heads": 2, "width": 32, "context": 32}
# of the time of a rate, beside the methods' own: to start, compile and end
_STARTING_SECONDS = 25.0
_STEPS_BETWEEN_CHECKS = 5
_TIMEOUT = timedelta(seconds=60)
NETNS, PACED, UNSHAPED = "netns", "paced", "unshaped"
# a module to the model to call and the optimizer
Make = Callable[[nn.Module], tuple[nn.Module, torch.optim.Optimizer]]


def _ours(net: nn.Module, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    return net, LionCub(net.named_parameters(), lr=3e-4, weight_decay=0.1, **options)


def _adamw(net: nn.Module, *, is_bf16: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    ddp = DistributedDataParallel(net)
    if is_bf16:
        # under its own name DDP takes torch's hook with NCCL alone
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return ddp, torch.optim.AdamW(net.parameters(), lr=6e-4, weight_decay=0.1, fused=True)


METHODS: dict[str, Make] = {
    "LionCub": _ours,
    "LionCub, overlap": partial(_ours, overlap=True),
    "LionCub, overlap, momentum synchronized": partial(
        _ours,
        overlap=True,
        comm=lioncub.Comm(algorithm="all_gather"),
        momentum_sync=lioncub.MomentumSync(every=4, dtype="int8"),
    ),
    "DDP bf16, AdamW fused": partial(_adamw, is_bf16=True),
    "DDP fp32, AdamW fused": _adamw,
}


def run(bench: Workbench) -> None:
    """Start the workers for each rate; the first of them records the rows."""
    for rate in _RATES[: 1 if bench.is_dry else None]:
        seconds = 0.0 if bench.is_dry else (bench.seconds / len(_RATES) - _STARTING_SECONDS) / len(METHODS)
        bench.attempt(f"all workers, {rate / 1e9:g} Gb/s", partial(_start, bench, rate, seconds))


def _start(bench: Workbench, rate: int, seconds: float) -> dict[str, Any]:
    workers = 2 if bench.is_dry else _WORKERS
    options = ["--device", str(bench.device), "--out", str(bench.out), "--seconds", f"{seconds:g}"]

    def command(link: str) -> list[str]:
        return [sys.executable, str(entry()), "worker", f"{link}, {rate / 1e9:g} Gb/s", *options]

    if not bench.is_dry:
        try:
            with Lab(workers, rate) as lab:
                environments = [worker_environment(rank, workers, 1) for rank in range(workers)]
                return _wait(NETNS, [lab.start(i, command(NETNS), e) for i, e in enumerate(environments)])
        except LabError as error:
            print(f"no network namespaces: {error}", flush=True)
    library = CARRIED / "pace.so"
    link = PACED if library.exists() and not bench.is_dry else UNSHAPED
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    local = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if link == PACED:
        local |= {"LD_PRELOAD": str(library), "PACE": str(rate // 8 // (workers - 1))}
    environments = [{**os.environ, **worker_environment(rank, workers, 1), **local} for rank in range(workers)]
    return _wait(link, [subprocess.Popen(command(link), env=environment) for environment in environments])


def _wait(link: str, processes: list[subprocess.Popen[Any]]) -> dict[str, Any]:
    """Wait for all: where one fails the others' group times out. Raises RuntimeError where one has failed."""
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"workers on {link} links: expected exit codes 0, got {codes}")
    return {"workers": len(processes)}


def work(out: Path, device: str, seconds: float, link: str) -> int:
    """One worker's part: train by each method for so many seconds; gives the exit code."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_TIMEOUT)
    bench = Workbench("dist", out, device, float("inf"))
    shape = _TINY if bench.is_dry else _SHAPE
    text = load_text(None, shape["context"])
    for name, make in METHODS.items():
        train = partial(_train, bench, shape, text, make, seconds)
        if dist.get_rank() == 0:
            bench.attempt(f"{name}: {link}", train)
        else:
            train()
        if bench.failed:
            break
    sys.stdout.flush()
    # leaving the group would join threads, which may be waiting for the interpreter's lock
    os._exit(int(bench.failed > 0))


def _train(bench: Workbench, shape: dict[str, int], text: Text, make: Make, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    net = GPT(**shape).to(bench.device)
    model, opt = make(net)
    times: list[float] = []
    losses: list[float] = []
    dist.barrier()
    began = time.perf_counter()
    while not _is_over(len(times), 2 if bench.is_dry else _STEPS_BETWEEN_CHECKS, began + seconds):
        windows = training_windows(
            text,
            batch=2 if bench.is_dry else 16,
            context=shape["context"],
            seed=0,
            rank=dist.get_rank(),
            step=len(times),
        ).to(bench.device)
        start = time.perf_counter()
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss = model(windows)
        opt.zero_grad()
        loss.backward()
        opt.step()
        bench.clock.synchronize()
        times.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    # compilation and DDP's first buckets are in the first third
    median = statistics.median(times[len(times) // 3 :])
    found = {"steps": len(times), "step_ms": 1e3 * median, "last_loss": statistics.mean(losses[-5:])}
    if isinstance(opt, LionCub):
        opt.check_replicas()
        stats = opt.stats()
        found |= {"bytes_per_step": stats.bytes_sent_per_step, "exposed_ms": 1e3 * stats.exposed_seconds}
    return found


def _is_over(step: int, every: int, deadline: float) -> bool:
    """Whether the first worker has no time left, which all ask together every so many steps."""
    if step % every or step == 0:
        return False
    over = torch.tensor(float(time.perf_counter() > deadline))
    dist.broadcast(over, 0)
    return bool(over)
