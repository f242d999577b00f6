"""NCCL's code paths in a group of one, since it takes no two ranks on one GPU; on a CPU those of Gloo."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu.workbench import Workbench
from lioncub import broadcast_module
from lioncub.collectives import ProcessGroups, Voter, average_, find_topology, vote
from lioncub.membership import CAPTURABLE


def run(bench: Workbench) -> None:
    """Every collective once, and votes captured in a graph."""
    if not bench.is_dry:
        torch.cuda.set_device(bench.device)
    packed = torch.randint(0, 256, (4096,), dtype=torch.uint8, device=bench.device)
    with tempfile.TemporaryDirectory() as folder:
        backend, store = bench.real("nccl", "gloo"), f"file://{folder}/store"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        for algorithm in CAPTURABLE:
            bench.attempt(f"vote by {algorithm}", partial(_vote, packed, algorithm))
            bench.attempt(f"captured vote by {algorithm}", partial(_captured, bench, packed, algorithm))
        for dtype in ("fp32", "bf16", "int8"):
            bench.attempt(f"average in {dtype}", partial(_average, bench, dtype))
        bench.attempt("topology", lambda: {"workers": find_topology().workers})
        bench.attempt("broadcast", lambda: broadcast_module(torch.nn.Linear(3, 5).to(bench.device)))
        dist.destroy_process_group()


def _same(got: Tensor, expected: Tensor) -> None:
    if not torch.equal(got.int(), expected.int()):
        raise AssertionError(f"expected {expected.flatten()[:8].tolist()}..., got {got.flatten()[:8].tolist()}...")


def _vote(packed: Tensor, algorithm: str) -> None:
    _same(vote(packed, algorithm=algorithm), packed)


def _average(bench: Workbench, dtype: str) -> dict[str, Any]:
    values = torch.linspace(-1, 1, 1000, device=bench.device)
    mean = values.clone()
    average_(mean, dtype=dtype)
    error = float((mean - values).abs().max())
    # half a step of the coarser of bf16's fraction and int8's levels
    if error > {"fp32": 0.0, "bf16": 2**-9, "int8": 1 / 254}[dtype] * 1.01:
        raise AssertionError(f"the average of one worker is off by {error}")
    return {"largest_error": error}


def _captured(bench: Workbench, packed: Tensor, algorithm: str) -> None:
    groups = ProcessGroups.flat()
    voter = Voter(packed.numel(), groups=groups, device=bench.device, algorithm=algorithm, functional=True)
    parity = torch.ones((), dtype=torch.int64, device=bench.device)
    # a graph reads from where it was captured
    codes = packed.clone()
    replay = bench.clock.capture(lambda: voter.start(codes, parity).result())
    codes.copy_(packed.flip(0))
    _same(replay().packed, packed.flip(0))
