"""bf16 and fp16 parameters that learn: stochastic rounding, fp32 masters and bf16 momentum in both optimizers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import everyone, on_ranks, same_on_all
from nets import Net, all_bits, batch_of, bits_of, groups_of, train
from optimizers import Lion, LionCub
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lioncub import (
    MomentumSync,
    Quantized,
    SignMean,
    SignVote,
    TernaryVote,
    simulate,
)

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])
STOCHASTIC: dict[str, Any] = {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "rounding_seed": 5}
WAYS: dict[str, dict[str, Any]] = {
    "stochastic": {"param_rounding": "stochastic"},
    "stochastic, bf16 momentum": STOCHASTIC,
    "masters": {"master_weights": True},
    "masters, bf16 momentum": {"master_weights": True, "momentum_dtype": torch.bfloat16},
}
each_way = pytest.mark.parametrize("way", list(WAYS))


def descend(net: Net, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        net(*batch_of(step), use_all=step % 3 == 0).backward()
        opt.step()


@each_way
def test_one_worker_is_plain_lion_bit_for_bit(way: str) -> None:
    nets = Net(seed=0), Net(seed=0)
    # signs, which add nothing to the state
    signs = {"compression": SignVote()}
    opts = [Lion(groups_of(nets[0]), lr=1e-2, **WAYS[way]), LionCub(groups_of(nets[1]), lr=1e-2, **WAYS[way], **signs)]
    for net, opt in zip(nets, opts, strict=True):
        descend(net, opt, range(6))
    assert all_bits(opts[0]) == all_bits(opts[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_the_parameters_of_an_fp32_run(optimizer: type, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 9), (65,), (4, 3, 3, 3), (0,))]
    low[2] = low[2].to(memory_format=torch.channels_last)
    full = [p.float().requires_grad_() for p in low]
    low = [p.requires_grad_() for p in low]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    one, other = optimizer(full, **options), optimizer(low, master_weights=True, **options)
    for step in range(7):
        for p, q in zip(full, low, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype).to(memory_format=torch.preserve_format)
            p.grad = None if step == 3 and p.dim() == 2 else q.grad.float()
            q.grad = None if p.grad is None else q.grad
        one.step()
        other.step()
    for p, q in zip(full, low, strict=True):
        assert torch.equal(other.state[q]["master"], p)
        assert other.state[q]["master"].stride() == q.stride()
        assert torch.equal(q, p.to(dtype))
        assert torch.equal(other.state[q]["exp_avg"], one.state[p]["exp_avg"])


@BOTH
def test_fp32_parameters_have_no_master_and_are_not_rounded(optimizer: type) -> None:
    results = []
    for options in ({}, {"param_rounding": "stochastic"}, {"master_weights": True}):
        p = torch.randn(70, generator=torch.Generator().manual_seed(0)).requires_grad_()
        opt = optimizer([p], lr=1e-3, **options)
        for _ in range(3):
            p.grad = p.detach().clone()
            opt.step()
        assert set(opt.state[p]) - {"scale"} == {"exp_avg"}
        results.append(all_bits(opt))
    assert results == [results[0]] * 3


@BOTH
def test_what_is_stuck_when_rounded_to_nearest_learns(optimizer: type) -> None:
    """Weights of 1 whose best value is 0.9, with steps a twentieth of what bf16 can hold there."""
    ends = {}
    for name, options in {"nearest": {}, **WAYS}.items():
        p = torch.ones(200, dtype=torch.bfloat16).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "nearest" else "error")
            opt = optimizer([p], lr=2e-4, **options)
        for _ in range(500):
            p.grad = p.detach() - 0.9
            opt.step()
        ends[name] = p.detach().float().mean().item()
    assert ends.pop("nearest") == 1.0
    # 500 steps of 2e-4 lead exactly there; half a spacing of bf16, 2^-9, is what masters lose to rounding
    assert ends == pytest.approx(dict.fromkeys(ends, 0.9), abs=4e-3)


def with_masters(optimizer: type, value: float) -> tuple[Tensor, Any]:
    p = torch.full((5,), value, dtype=torch.bfloat16).requires_grad_()
    opt = optimizer([p], lr=1e-4, master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    return p, opt


@BOTH
def test_a_parameter_that_was_changed_takes_its_master_along(optimizer: type) -> None:
    p, opt = with_masters(optimizer, 1.0)
    moved = torch.full((5,), 1.0) - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], moved)
    with torch.no_grad():
        # a change that changes nothing
        p.mul_(1)
    opt.step()
    moved = moved - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], moved)
    with torch.no_grad():
        p[2] = 3.0
    opt.step()
    # the others still have what bf16 cannot hold
    moved[2] = 3.0
    expected = moved - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], expected)
    assert torch.equal(p, expected.bfloat16())


def copy_data(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value)


def swap(params: Sequence[Tensor]) -> None:
    kept = [p.detach().clone() for p in params]
    copy_data(params, [torch.zeros_like(p) for p in params])
    copy_data(params, kept)


WRITES: dict[str, Callable[[Sequence[Tensor]], object]] = {
    "data": lambda params: copy_data(params, [2 * p.detach() for p in params]),
    "vector": lambda params: vector_to_parameters(1.5 * parameters_to_vector(params), params),
    "list": lambda params: torch._foreach_mul_(params, -2.0),
    "average, for an evaluation": swap,
    "average": lambda params: copy_data(params, [torch.full_like(p, 0.3) for p in params]),
}


def check_writes(optimizer: type, rank: int = 0) -> None:
    """A master moves as an fp32 parameter into which is written what its parameter got, where that differs."""
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in ((7, 9), (65,), (130, 3))]
    full = [p.detach().float().requires_grad_() for p in low]
    one, other = optimizer(full, lr=1e-3), optimizer(low, lr=1e-3, master_weights=True)
    generator.manual_seed(1 + rank)
    for name, write in [("nothing", lambda params: None), *WRITES.items()]:
        with torch.no_grad():
            write(low)
            for p, q in zip(full, low, strict=True):
                p.copy_(torch.where(p.bfloat16() == q, p, q.float()))
        if optimizer is LionCub:
            other.check_replicas()
        for p, q in zip(full, low, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).bfloat16()
            p.grad = q.grad.float()
        one.step()
        other.step()
        for p, q in zip(full, low, strict=True):
            assert torch.equal(other.state[q]["master"], p), name
            assert torch.equal(q, p.bfloat16()), name


@BOTH
def test_what_is_written_in_any_way_reaches_the_master(optimizer: type) -> None:
    check_writes(optimizer)


@on_ranks(2)
def test_what_is_written_on_all_ranks_reaches_their_masters(rank: int, world_size: int) -> None:
    check_writes(LionCub, rank)


@BOTH
def test_added_groups_have_masters_and_the_step(optimizer: type) -> None:
    _, opt = with_masters(optimizer, 1.0)
    q = torch.full((5,), 2.0, dtype=torch.float16).requires_grad_()
    opt.add_param_group({"params": [q]})
    q.grad = torch.ones_like(q)
    opt.step()
    assert torch.equal(opt.state[q]["master"], torch.full((5,), 2.0) - torch.tensor(1e-4))
    assert [int(group["step"]) for group in opt.param_groups] == [2, 2]


CASES: list[dict[str, Any]] = [
    STOCHASTIC | {"overlap": True},
    STOCHASTIC | {"overlap": False},
    STOCHASTIC | {"compression": Quantized(stochastic=True)},
    STOCHASTIC | {"compression": SignMean(), "momentum_sync": MomentumSync(every=2), "drift_every": 2},
    {"master_weights": True, "compression": TernaryVote(), "momentum_dtype": torch.bfloat16},
    {"master_weights": True, "broadcast": True, "overlap": True},
]


@on_ranks(2, 3)
def test_replicas_stay_bit_identical(rank: int, world_size: int) -> None:
    """Every option with compressions, synchronization and overlap."""
    found = []
    # where there are more workers, one with momentum averaged and one with masters
    for options in CASES if world_size == 2 else CASES[3:5]:
        net = Net(seed=rank)
        opt = LionCub(groups_of(net), lr=1e-2, bucket_mb=1e-5, **options)
        train(net, opt, rank, range(4))
        opt.check_replicas()
        found.append(bits_of(net))
        weight = net.mix.weight
        momentum = opt.state[weight]["exp_avg"]
        assert momentum.dtype == options.get("momentum_dtype", torch.float32)
        if options.get("master_weights"):
            assert torch.equal(opt.state[weight]["master"].bfloat16(), weight)
        momenta = everyone(momentum.float())
        if "momentum_sync" not in options:
            assert not torch.equal(momenta[0], momenta[1]), "momentum is a worker's own"
        opt.sync_momentum()
        total = momenta[0]
        for other in momenta[1:]:
            total = total + other
        assert torch.equal(momentum, (total / world_size).to(momentum.dtype))
    assert same_on_all(found)
    if world_size == 2:
        assert found[0] == found[1], "overlap changes no bits"


def test_momentum_that_is_averaged_is_rounded_to_nearest() -> None:
    """Simulated, so that the momentum before the step can be seen."""
    params = [torch.ones(130, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    with simulate.Workers(2) as workers:
        opts = workers.run(
            lambda rank, group: LionCub(
                [params[rank]], lr=0.1, process_group=group, momentum_sync=MomentumSync(every=2), **STOCHASTIC
            )
        )
        for step in range(2):
            before = [opt.state[p]["exp_avg"].float() for opt, p in zip(opts, params, strict=True)]
            for rank, p in enumerate(params):
                p.grad = torch.randn(130, generator=torch.Generator().manual_seed(2 * step + rank)).bfloat16()
            workers.run(lambda rank, group: opts[rank].step())
        b2, b2c = torch.tensor(0.99), torch.tensor(1 - 0.99)
        to_come = [b2 * m + b2c * p.grad.float() for m, p in zip(before, params, strict=True)]
        mean = ((to_come[0] + to_come[1]) / 2).bfloat16()
        for opt, p in zip(opts, params, strict=True):
            assert torch.equal(opt.state[p]["exp_avg"], mean)


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "low-precision.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "LionCub": LionCub, "model": nn.Linear(16, 4)}
    exec(block, names)
    small, opt = names["small"], names["cheap"]
    before = small.weight.detach().clone()
    for p in small.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert not torch.equal(small.weight, before)
    assert opt.state[small.weight]["exp_avg"].dtype == torch.bfloat16
