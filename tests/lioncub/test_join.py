"""Ranks that abstain: those whose inputs have ended, in `torch.distributed.algorithms.Join`, and any that say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_workers import everyone, on_ranks, said_by, same_on_all
from nets import Net, all_bits, batch_of, groups_of
from optimizers import LionCub
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from lioncub import Quantized, SignVote, keep_gradients_local


def backward(net: Any, step: int, rank: int) -> None:
    images, tokens = batch_of(100 * step + rank)
    net(images, tokens, use_all=True).backward()


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"compression": SignVote()}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
@on_ranks(3)
def test_inputs_may_be_uneven(rank: int, world_size: int, wrapped: bool, options: dict[str, Any]) -> None:
    net: nn.Module = Net(seed=0)
    opt = LionCub(groups_of(net), lr=1e-2, **options)
    if wrapped:
        net = DistributedDataParallel(net, find_unused_parameters=True)
        keep_gradients_local(net)
    with Join([net, opt] if wrapped else [opt]):
        for step in range((3, 6, 4)[rank]):
            opt.zero_grad()
            backward(net, step, rank)
            opt.step()
    assert opt.stats().steps == 6
    opt.check_replicas()
    # and again, with all ranks from the start
    with Join([net, opt] if wrapped else [opt]):
        for step in range(6, 8):
            opt.zero_grad()
            backward(net, step, rank)
            opt.step()
    assert opt.stats().steps == 8
    opt.check_replicas()
    opt.close()


@pytest.mark.parametrize("compression", [SignVote(), Quantized(bits=8, norm="linf")], ids=str)
@on_ranks(3)
def test_a_rank_that_abstains_does_not_count(rank: int, world_size: int, compression: Any) -> None:
    """The others agree: all of them move their way, whatever the gradients and the momentum of the one."""
    p = torch.zeros(200).requires_grad_()
    opt = LionCub([p], lr=1.0, compression=compression)
    for step in range(4):
        p.grad = torch.ones(200) if rank else torch.full((200,), -5.0)
        opt.propose(abstain=rank == 0).commit()
        assert torch.equal(p.detach(), torch.full((200,), -1.0 - step))
    assert same_on_all(p.detach().tolist())
    # its momentum only decayed
    moved = everyone(float(opt.state[p]["exp_avg"][0]))
    assert moved[0] == 0.0
    assert moved[1] == moved[2] > 0


@on_ranks(2)
def test_abstaining_changes_nothing_by_itself(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    opt = LionCub(groups_of(net), lr=1e-2, overlap=True)
    for step in range(3):
        opt.zero_grad()
        backward(net, step, rank)
        opt.step()
    before = all_bits(opt)
    opt.zero_grad()
    backward(net, 3, rank)
    # what was sent during backward no longer holds
    pending = opt.propose(abstain=rank == 1)
    assert before == all_bits(opt)
    pending.commit()
    opt.check_replicas()
    assert said_by(lambda: opt.propose(abstain=1)) == "TypeError: abstain: expected True or False, got 1"
    # where all abstain, no parameter has a gradient
    before = all_bits(opt)
    opt.propose(abstain=True).commit()
    assert before == all_bits(opt)
    opt.close()
