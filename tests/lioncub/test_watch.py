"""What must not stay silent: averaged gradients, gradients that never come, ranges of the profiler."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_workers import on_ranks
from optimizers import LionCub
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lioncub import Quantized, SignMean, SignVote, keep_gradients_local

AVERAGED = "all votes of the last 5 steps were unanimous, so {} workers have the same gradients"


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in found]


def train(net: nn.Module, opt: Any, seed: int, steps: int = 12) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        net(torch.randn(8, 40, generator=generator)).square().sum().backward()
        opt.step()


@on_ranks(2, 3)
def test_averaged_gradients_warn_once(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 40))
    opt = LionCub(model.parameters(), lr=1e-3)
    said = warnings_of(lambda: train(model, opt, rank))
    assert len(said) == int(rank == 0), said
    if rank == 0:
        assert said[0].startswith(AVERAGED.format(world_size))
        assert "lioncub.keep_gradients_local(model)" in said[0]
        assert "fully_shard" in said[0]
        assert "the same data" in said[0]


@pytest.mark.parametrize("compression", [None, SignVote(), SignMean(), Quantized(bits=4)], ids=str)
@on_ranks(2)
def test_local_gradients_do_not(rank: int, world_size: int, compression: Any) -> None:
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(40, 40))
    keep_gradients_local(model)
    opt = LionCub(model.parameters(), lr=1e-3, compression=compression)
    assert warnings_of(lambda: train(model, opt, rank)) == []


@on_ranks(2)
def test_the_same_data_on_all_ranks_warns(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    net = nn.Linear(40, 40)
    opt = LionCub(net.parameters(), lr=1e-3)
    assert len(warnings_of(lambda: train(net, opt, seed=5))) == int(rank == 0)


def test_gradients_that_never_come_warn_once() -> None:
    net = nn.Linear(40, 3)
    opt = LionCub(net.parameters())

    def steps() -> None:
        for _ in range(6):
            opt.step()

    (said,) = warnings_of(steps)
    assert said.startswith("no parameter had a gradient on any worker in the last 3 steps, so nothing moved.")
    train(net, opt, seed=0)


@on_ranks(2)
def test_stages_are_ranges_of_the_profiler(rank: int, world_size: int) -> None:
    net = nn.Linear(40, 40)
    opt = LionCub(net.parameters(), lr=1e-3)
    train(net, opt, rank, steps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(net, opt, rank, steps=2)
    found = {event.key: event.count for event in profile.key_averages() if event.key.startswith("lioncub::")}
    buckets = len(opt.stats().buckets)
    stages = {name: found[f"lioncub::{name}"] for name in ("encode", "exchange", "apply")}
    assert stages == {"encode": 2 * buckets, "exchange": 2, "apply": 2 * buckets}
