"""Optimizers' steps over GPT-2's parameters: wall time, the device's, the host's, and replayed from a CUDA graph."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed.steps import STD, gpt2_shapes
from torch import nn

from gpu.workbench import Workbench
from lioncub import Lion, LionCub, SignVote
from lioncub.simulate import Workers

_SIZES = {"small": (12, 768), "xl": (48, 1600)}
_WORKERS = 4
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Params = list[nn.Parameter]
Make = Callable[[Params], torch.optim.Optimizer]


def _capturable_lr(params: Params, dtype: torch.dtype) -> dict[str, Any]:
    return {"lr": torch.tensor(1e-4, dtype=dtype, device=params[0].device), "capturable": True}


def _theirs(name: str, **options: Any) -> Make:
    """An optimizer of another package, imported when it is made."""
    return lambda p: pkgutil.resolve_name(name)(p, lr=1e-4, weight_decay=0.1, **options)


_AdamW = partial(torch.optim.AdamW, weight_decay=0.1, fused=True)
_LionCub = partial(LionCub, weight_decay=0.1)
# what each needs, and how it is made
OPTIMIZERS: dict[str, tuple[str, Make]] = {
    "LionCub, one worker": ("", lambda p: _LionCub(p, lr=1e-4)),
    "LionCub, capturable": ("", lambda p: _LionCub(p, **_capturable_lr(p, torch.float64))),
    "lioncub.Lion": ("", lambda p: Lion(p, lr=1e-4, weight_decay=0.1)),
    "torch AdamW, fused": ("", lambda p: _AdamW(p, lr=1e-4)),
    "torch AdamW, fused, capturable": ("", lambda p: _AdamW(p, **_capturable_lr(p, torch.float32))),
    "lion-pytorch": ("lion_pytorch", _theirs("lion_pytorch:Lion")),
    "lion-pytorch, Triton": ("lion_pytorch", _theirs("lion_pytorch:Lion", use_triton=True)),
    "bitsandbytes Lion32bit": ("bitsandbytes", _theirs("bitsandbytes.optim:Lion32bit")),
}


def run(bench: Workbench) -> None:
    """Each optimizer in each size and dtype; simulated workers and other packages on the small one."""
    for size, (layers, width) in list(_SIZES.items())[: bench.real(None, 1)]:
        # two blocks without the embedding, which has as many rows at any width
        shapes = gpt2_shapes(2, 8)[1:] if bench.is_dry else gpt2_shapes(layers, width)
        for label, dtype in _DTYPES.items():
            for name, (package, make) in OPTIMIZERS.items():
                if size == "small" or not package:
                    has_no_cpu = "Triton" in name or package == "bitsandbytes"
                    needs = "a GPU" if bench.is_dry and has_no_cpu else package
                    measure = partial(_measure, bench, shapes, dtype, make, name)
                    bench.attempt(f"{name}: {size}, {label}", measure, needs=needs)
            if size == "small":
                simulate = partial(_simulated, bench, shapes, dtype)
                bench.attempt(f"LionCub, {_WORKERS} simulated workers: {size}, {label}", simulate)


def _parameters(bench: Workbench, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Params:
    """Parameters of these shapes with gradients, on the device."""
    found = [nn.Parameter((STD * torch.randn(shape, device=bench.device)).to(dtype)) for shape in shapes]
    for param in found:
        param.grad = torch.randn_like(param)
    return found


def _measure(
    bench: Workbench, shapes: list[tuple[int, ...]], dtype: torch.dtype, make: Make, name: str
) -> dict[str, Any]:
    params = _parameters(bench, shapes, dtype)
    opt, clock = make(params), bench.clock
    found: dict[str, Any] = {"elements": sum(param.numel() for param in params), "tensors": len(params)}
    found["wall_ms"] = 1e3 * clock.wall_seconds(opt.step)
    timing = clock.device_seconds([opt.step], calls=5, rounds=3)
    found |= {"device_ms": 1e3 * timing.seconds, "host_ms": 1e3 * timing.host_seconds}
    if "capturable" in name:
        replay = clock.capture(opt.step)
        found["graph_device_ms"] = 1e3 * clock.device_seconds([replay], calls=5, rounds=3).seconds
        found["graph_wall_ms"] = 1e3 * clock.wall_seconds(replay)
    if isinstance(opt, LionCub):
        opt.raise_errors()
    return found


def _simulated(bench: Workbench, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    """All workers' steps together; they take turns on the device."""
    warmups, steps = bench.real((3, 10), (0, 1))

    def job(rank: int, group: Any) -> float:
        params = _parameters(bench, shapes, dtype)
        opt = LionCub(params, lr=1e-4, weight_decay=0.1, compression=SignVote(), process_group=group)
        began = 0.0
        for step in range(warmups + steps):
            if step == warmups:
                bench.clock.synchronize()
                began = time.perf_counter()
            opt.step()
        bench.clock.synchronize()
        return (time.perf_counter() - began) / steps

    torch.manual_seed(0)
    with Workers(_WORKERS) as workers:
        return {"wall_ms": 1e3 * max(workers.run(job))}
