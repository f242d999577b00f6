"""One worker process of a cell: holds one model and times steps of the methods that it is asked for.

Only public names of lioncub are used, so that the library of another checkout can be measured as well.
"""

from __future__ import annotations

import gc
import inspect
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import lion_pytorch  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from demo.gpt import GPT, VOCABULARY
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from netlab.lab import DEVICE

SEED, CONTEXT = 1, 64
_WIDTHS = {"10M": 320, "25M": 512}
MODELS = {name: {"layers": 8, "heads": 8, "width": width, "context": CONTEXT} for name, width in _WIDTHS.items()}
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
ALGORITHMS = ("auto", "all_gather", "reduce_scatter", "all_reduce", "hierarchical")
OTHERS = ("no_communication", "ddp_fp32_lion_pytorch", "ddp_fp32", "ddp_bf16", "ddp_powersgd")
_STATISTICS = Path("/sys/class/net") / DEVICE / "statistics"


def under_ddp(model: nn.Module, name: str) -> DistributedDataParallel:
    """Wrap the model in DDP with the communication hook that the method's name asks for."""
    is_power = name == "ddp_powersgd"
    # PowerSGD takes all gradients in one bucket
    bucket_mb = 4096 if is_power else None
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False, bucket_cap_mb=bucket_mb)
    if is_power:
        state = PowerSGDState(process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook)
    elif name == "ddp_bf16":
        # DDP refuses torch's own hook on Gloo by its name
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return ddp


def lion_cub(params: Any, algorithm: str, bucket_mb: float | None, overlap: bool) -> torch.optim.Optimizer:
    """Make a LionCub with one-bit votes on all tensors, by the arguments that the measured version has."""
    transport: dict[str, Any] = {"algorithm": algorithm} | ({} if bucket_mb is None else {"bucket_mb": bucket_mb})
    if "comm" in inspect.signature(lioncub.LionCub).parameters:
        transport = {"comm": lioncub.Comm(**transport)}
    return lioncub.LionCub(params, compression=lioncub.SignVote(), overlap=overlap, **transport, **OPTIONS)


class Worker:
    """Requests of a cell. All ranks call them together; answers go to JSON."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        torch.manual_seed(SEED)
        self._shape = MODELS[model]
        # all methods train the same memory: what is timed does not depend on the values
        self._initial = GPT(**self._shape).state_dict()
        own = torch.Generator().manual_seed(SEED + 1 + dist.get_rank())
        self._windows = torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=own)

    def facts(self) -> dict[str, Any]:
        """Return where the library comes from and how many parameters the model has."""
        parameters = sum(tensor.numel() for tensor in self._initial.values())
        return {"library": str(Path(lioncub.__file__).resolve().parent), "parameters": parameters}

    def measure(self, method: str, untimed: int, steps: int, seconds: float) -> dict[str, Any]:
        """Time up to ``steps`` steps of ``method``, fewer where they would take more than ``seconds``, at least one.

        The bytes per step are those of the network interface, headers and acknowledgements included.
        """
        step = self._method(method)
        slowest = torch.zeros(1)
        for _ in range(untimed):
            dist.barrier()
            slowest.fill_(self._seconds(step))
        # all ranks take as many steps
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        steps = max(1, min(steps, int(seconds / slowest.item())))
        dist.barrier()
        sent, times = _sent_bytes(), []
        for _ in range(steps):
            dist.barrier()
            times.append(self._seconds(step))
        dist.barrier()
        sent = (_sent_bytes() - sent) / steps
        del step
        gc.collect()
        return {"seconds": times, "sent": sent}

    def carry(self, n_bytes: int) -> dict[str, Any]:
        """Time sending so many bytes to the next rank while as many come from the one before."""
        rank, size = dist.get_rank(), dist.get_world_size()
        data = [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(2)]
        dist.barrier()
        begin = perf_counter()
        pending = [dist.isend(data[0], (rank + 1) % size), dist.irecv(data[1], (rank - 1) % size)]
        for work in pending:
            assert work is not None
            work.wait()
        return {"seconds": perf_counter() - begin}

    def _seconds(self, step: Callable[[], None]) -> float:
        begin = perf_counter()
        step()
        return perf_counter() - begin

    def _method(self, name: str) -> Callable[[], None]:
        """Return one training step of the method."""
        model, optimizer = self._build(name)

        def step() -> None:
            optimizer.zero_grad()
            model(self._windows).backward()
            optimizer.step()

        return step

    def _build(self, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return module and optimizer on parameters of their own in the shared memory, so that hooks end with them."""
        with torch.device("meta"):
            model: nn.Module = GPT(**self._shape)
        model.load_state_dict(self._initial, assign=True)
        parsed = parse_method(name)
        if parsed is not None:
            return model, lion_cub(model.named_parameters(), *parsed)
        make = lion_pytorch.Lion if name.endswith("lion_pytorch") else lioncub.Lion
        optimizer = make(model.parameters(), **OPTIONS)
        return (under_ddp(model, name) if name.startswith("ddp") else model), optimizer


def parse_method(name: str) -> tuple[str, float | None, bool] | None:
    """Parse "lioncub_reduce_scatter_overlap:0.25" to algorithm, MiB of a bucket and overlap.

    Returns None for a method without votes. Raises ValueError for a name that does not exist.
    """
    if name in OTHERS:
        return None
    base, _, bucket_mb = name.partition(":")
    overlap = base.endswith("_overlap")
    algorithm = base.removesuffix("_overlap").removeprefix("lioncub").removeprefix("_") or "auto"
    if not base.startswith("lioncub") or algorithm not in ALGORITHMS:
        raise ValueError(
            f"method: expected {', '.join(OTHERS)} or lioncub[_ALGORITHM][_overlap][:BUCKET_MB] "
            f"with one of {', '.join(ALGORITHMS)}, got {name!r}"
        )
    return algorithm, float(bucket_mb) if bucket_mb else None, overlap


def _sent_bytes() -> int:
    return int((_STATISTICS / "tx_bytes").read_text())


def serve(channel_number: int, model: str) -> None:
    """Answer requests until the other end closes. Ends the process."""
    channel = Connection(channel_number)
    try:
        worker = Worker(model)
        while True:
            try:
                request = channel.recv()
            except EOFError:
                break
            channel.send(getattr(worker, request.pop("do"))(**request))
    except Exception as error:
        words = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        channel.send({"failure": {"rank": int(os.environ["RANK"]), "time": time.time(), **words}})
        traceback.print_exc()
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(1)
    os._exit(0)
