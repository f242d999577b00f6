"""Compiled steps: one graph, with the bits of eager ones; what must be verified first, and what cannot be compiled."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from gloo_workers import on_ranks
from nets import Net, all_bits, batch_of
from optimizers import PRECISIONS, LionCub
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lioncub import SignVote


@pytest.fixture(autouse=True)
def _fresh() -> None:
    reset()


def reset() -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # importing it warns of torch's own use of torch.jit
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")


def compiled(function: Callable[..., Any], backend: str) -> tuple[Callable[..., Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


class Small(nn.Module):
    """What machine code is made for in a few seconds."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((9, 33), 1.0 + seed))
        self.bias = nn.Parameter(torch.zeros(33))

    def forward(self, images: Tensor, tokens: Tensor, use_all: bool) -> Tensor:
        return (images[:, 0, :, :].reshape(-1, 9) @ self.weight + self.bias).square().mean()


def assert_one_graph_and_the_eager_steps(rank: int, backend: str, nets: Any = Net, **options: Any) -> None:
    """An ordinary, a capturable and a compiled optimizer under a schedule."""
    reset()
    nets = [nets(seed=rank) for _ in range(3)]
    options = {"bucket_mb": 1e-4, "compression": SignVote(), **options}
    opts = [
        LionCub(net.named_parameters(), lr=torch.tensor(0.01), capturable=i > 0, **options)
        for i, net in enumerate(nets)
    ]
    assert len(opts[2].stats().buckets) > 1 or torch.distributed.get_world_size() == 1
    traced, counter = compiled(opts[2].step, backend)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t)) for opt in opts]
    for t in range(10):
        nets[0].zero_grad()
        nets[0](*batch_of(100 * (t % 3) + rank), use_all=rank != 1).backward()
        for net in nets[1:]:
            for p, q in zip(nets[0].parameters(), net.parameters(), strict=True):
                q.grad = None if p.grad is None else p.grad.clone()
        for step in (opts[0].step, opts[1].step, traced):
            step()
        with warnings.catch_warnings():
            # a scheduler sees only calls of the step that it wrapped, which a compiled one is not
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for schedule in schedules:
                schedule.step()
    assert counter.frame_count == 1
    for opt in opts:
        assert all_bits(opt) == all_bits(opts[0])
        assert opt.stats().steps == 10
        opt.check_replicas()


@on_ranks(1)
def test_steps_of_one_rank(rank: int, world_size: int) -> None:
    assert_one_graph_and_the_eager_steps(rank, "aot_eager", algorithm="auto")
    assert_one_graph_and_the_eager_steps(rank, "eager", **PRECISIONS["stochastic, bf16 momentum"])


@on_ranks(2)
def test_steps_of_several_ranks(rank: int, world_size: int) -> None:
    # one rank alone makes machine code; the compiler sets variables, and headers and processes made in advance take
    # longer than the few kernels here
    from torch._inductor import config

    with mock.patch.dict(os.environ), config.patch(cpp_cache_precompile_headers=False, compile_threads=1):
        assert_one_graph_and_the_eager_steps(rank, "eager" if rank else "inductor", nets=Small, bucket_mb=2e-5)
    assert_one_graph_and_the_eager_steps(rank, "eager", algorithm="all_gather", **PRECISIONS["stochastic"])
    assert_one_graph_and_the_eager_steps(rank, "eager", algorithm="all_reduce", **PRECISIONS["masters, bf16 momentum"])


@on_ranks(2)
def test_a_whole_training_step_is_one_graph(rank: int, world_size: int) -> None:
    reset()
    torch._dynamo.config.trace_autograd_ops = True
    nets = [nn.Sequential(nn.Linear(9, 33), nn.GELU(), nn.Linear(33, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [LionCub(net.parameters(), lr=torch.tensor(0.01), capturable=True) for net in nets]

    def train(net: nn.Module, opt: LionCub, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    # in machine code, forward and backward differ in the last bits
    fast, counter = compiled(lambda x, y: train(nets[1], opts[1], x, y), "aot_eager")
    for t in range(20):
        x = torch.randn(8, 9, generator=torch.Generator().manual_seed(100 * t + rank))
        y = x[:, :2].tanh()
        train(nets[0], opts[0], x, y)
        fast(x, y)
        for opt in opts:
            opt.zero_grad()
            opt.param_groups[0]["lr"].mul_(0.99)
    opts[1].check_replicas()
    assert counter.frame_count == 1
    assert all_bits(opts[0]) == all_bits(opts[1])


def test_a_compiled_step_asks_for_verification_first() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([param], lr=torch.tensor(0.1), capturable=True)
    param.grad = torch.ones(3)
    step, _ = compiled(opt.step, "eager")
    step()
    opt.load_state_dict(opt.state_dict())
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"expected verify\(\) before a compiled or captured step"):
        step()
    opt.verify()
    torch._dynamo.reset()
    step()
    assert torch.allclose(param, torch.full((3,), 0.8))


def test_an_ordinary_step_is_not_compiled() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([param])
    param.grad = torch.ones(3)
    message = r"capturable: expected LionCub\(capturable=True\) for a step that torch.com"
    with pytest.raises(RuntimeError, match=message):
        torch.compile(opt.step, backend="eager")()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"expected LionCub\(capturable=True\)"):
        torch.compile(opt.step, backend="eager", fullgraph=True)()
