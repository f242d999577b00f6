"""Whole training iterations in a CUDA graph, and compiled steps: the same bits as eager ones, and their speed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from demo.gpt import GPT
from demo.text import Text, load_text, training_windows
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from gpu.workbench import Workbench
from lioncub import LionCub

_CONTEXT = 512
_SHAPE = {"layers": 12, "heads": 12, "width": 768, "context": _CONTEXT}
_SMALL = {"layers": 2, "heads": 4, "width": 128, "context": _CONTEXT}
_TINY = {"layers": 1, "heads": 2, "width": 32, "context": 32}
Make = Callable[[nn.Module], torch.optim.Optimizer]


def run(bench: Workbench) -> None:
    """Captured iterations of LionCub and of AdamW, and a compiled step."""
    text = load_text(None, _CONTEXT)
    for name, make in {"LionCub": _lion_cub, "torch AdamW, fused": _adamw}.items():
        bench.attempt(f"captured iteration, {name}", partial(_captured, bench, text, make))
    bench.attempt("compiled step", partial(_compiled, bench, text))


def _lion_cub(net: nn.Module) -> LionCub:
    """A capturable optimizer whose lr is on the device."""
    lr = torch.tensor(1e-4, dtype=torch.float64, device=next(net.parameters()).device)
    return LionCub(net.named_parameters(), lr=lr, weight_decay=0.1, capturable=True)


def _adamw(net: nn.Module) -> torch.optim.Optimizer:
    lr = torch.tensor(3e-4, device=next(net.parameters()).device)
    return torch.optim.AdamW(net.parameters(), lr=lr, fused=True, capturable=True)


def _windows(bench: Workbench, text: Text, step: int) -> Tensor:
    options = {"batch": bench.real(16, 2), "context": bench.real(_CONTEXT, _TINY["context"])}
    return training_windows(text, **options, seed=0, rank=0, step=step).to(bench.device)


def _net(bench: Workbench, shape: dict[str, int]) -> GPT:
    torch.manual_seed(0)
    return GPT(**bench.real(shape, _TINY)).to(bench.device)


def _trained(bench: Workbench, text: Text, make: Make, is_captured: bool) -> tuple[list[Tensor], list[float], float]:
    """Return parameters and losses after three steps of warming up and some more, and seconds of an iteration."""
    net = _net(bench, _SHAPE)
    opt, windows = make(net), _windows(bench, text, 0)

    def iteration() -> Tensor:
        # in place: a graph holds the gradients' addresses
        opt.zero_grad(set_to_none=False)
        with torch.autocast(bench.device.type, torch.bfloat16):
            loss: Tensor = net(windows)
        loss.backward()
        opt.step()
        return loss.detach()

    if is_captured:
        step = bench.clock.capture(iteration, warmups=3)
    else:
        step = iteration
        for _ in range(3):
            step()
    losses = []
    for i in range(bench.real(20, 2)):
        windows.copy_(_windows(bench, text, i))
        losses.append(step().clone())
    params = [param.detach().clone() for param in net.parameters()]
    seconds = bench.clock.wall_seconds(step)
    if isinstance(opt, LionCub):
        opt.raise_errors()
    return params, torch.stack(losses).tolist(), seconds


def _captured(bench: Workbench, text: Text, make: Make) -> dict[str, Any]:
    train = partial(_trained, bench, text, make)
    (eager, losses, eager_seconds), (again, _, _), (captured, found, seconds) = train(False), train(False), train(True)
    # some kernels of backward add in any order
    repeats, equal = _are_equal(eager, again), _are_equal(eager, captured) and found == losses
    if repeats and not equal:
        raise AssertionError(f"a captured iteration differs from an eager one: losses {found} and {losses}")
    return {
        "eager_repeats_itself": repeats,
        "equal_to_eager": equal,
        "first_loss": found[0],
        "last_loss": found[-1],
        "graph_ms": 1e3 * seconds,
        "eager_ms": 1e3 * eager_seconds,
    }


def _compiled(bench: Workbench, text: Text) -> dict[str, Any]:
    """Eager and compiled steps of two optimizers, which get the same gradients."""
    net = _net(bench, _SMALL)
    twin, windows = copy.deepcopy(net), _windows(bench, text, 0)
    opt, other = _lion_cub(net), _lion_cub(twin)
    counter = CompileCounterWithBackend(bench.real("inductor", "eager"))
    step = torch.compile(other.step, fullgraph=True, backend=counter)
    for _ in range(3):
        net.zero_grad()
        net(windows).backward()
        for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
            theirs.grad = mine.grad
        opt.step()
        step()
        for optimizer in (opt, other):
            optimizer.param_groups[0]["lr"].mul_(0.9)
            optimizer.raise_errors()
    if not _are_equal(list(net.parameters()), list(twin.parameters())) or counter.frame_count != 1:
        raise AssertionError(f"expected the eager bits from one graph, got {counter.frame_count} graphs")
    return {"eager_ms": 1e3 * bench.clock.wall_seconds(opt.step), "compiled_ms": 1e3 * bench.clock.wall_seconds(step)}


def _are_equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))
