"""Gradients that DDP leaves where they are, also where a framework wraps the model later."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by, same_on_all
from optimizers import LionCub
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub import keep_gradients_local, keep_gradients_local_once_wrapped, local_gradients_hook


def net_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=str)
@pytest.mark.parametrize("is_wrapped_later", [False, True])
@on_ranks(2)
def test_gradients_are_those_without_ddp(
    rank: int, world_size: int, is_wrapped_later: bool, options: dict[str, Any]
) -> None:
    net = net_of(seed=0)
    plain = copy.deepcopy(net)
    if is_wrapped_later:
        keep_gradients_local_once_wrapped(net)
    ddp_model = DistributedDataParallel(net, **options)
    if not is_wrapped_later:
        keep_gradients_local(ddp_model)
    opt, generator = LionCub(net.parameters(), lr=1e-3), torch.Generator().manual_seed(rank)
    for _ in range(3):
        x = torch.randn(8, 40, generator=generator)
        for model in (ddp_model, plain):
            model.zero_grad()
            model(x).square().sum().backward()
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert not net._forward_pre_hooks, "it must end with the first forward"
        opt.step()
        plain.load_state_dict(net.state_dict())
    assert opt.stats().unanimous < 0.9
    opt.check_replicas()


@on_ranks(2)
def test_a_forward_before_the_module_is_wrapped_changes_nothing(rank: int, world_size: int) -> None:
    net = net_of(seed=0)
    keep_gradients_local_once_wrapped(net)
    x = torch.full((2, 40), 1.0 + rank)
    net(x).sum().backward()
    mine = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    # without a name DDP would be gone before backward
    ddp_model = DistributedDataParallel(net)
    ddp_model(x).sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(net.parameters(), mine, strict=True))
    removed = net_of(seed=0)
    keep_gradients_local_once_wrapped(removed).remove()
    ddp_model = DistributedDataParallel(removed)
    ddp_model(x).sum().backward()
    assert same_on_all([p.grad.tolist() for p in removed.parameters()])


@on_ranks(2)
def test_a_compiled_model_is_found(rank: int, world_size: int) -> None:
    net = net_of(seed=0)
    keep_gradients_local_once_wrapped(net)
    model = torch.compile(DistributedDataParallel(net), backend="eager")
    for _ in range(2):
        net.zero_grad()
        model(torch.full((2, 40), 1.0 + rank)).sum().backward()
        assert not same_on_all([p.grad.tolist() for p in net.parameters()])


@on_ranks(2)
def test_what_would_send_gradients_is_refused(rank: int, world_size: int) -> None:
    python, builtin, late = (DistributedDataParallel(nn.Linear(3, 3)) for _ in range(3))
    python.register_comm_hook(None, fp16_compress_hook)
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    expected = "ValueError: ddp_model: expected DDP without a communication hook, since no gradients are sent, got "
    for model, got in ((python, "one with fp16_compress_hook"), (builtin, "one with a built-in hook")):
        for _ in range(2):
            assert said_by(lambda model=model: keep_gradients_local(model)) == expected + got
    keep_gradients_local(late)
    keep_gradients_local(late)
    assert "can only be called once" in said_by(lambda: late.register_comm_hook(None, fp16_compress_hook))
    net = nn.Linear(3, 3)
    delayed = DistributedDataParallel(
        net, delay_all_reduce_named_params=[("weight", net.weight)], param_to_hook_all_reduce=net.bias
    )
    assert "expected DDP without delay_all_reduce_named_params" in said_by(lambda: keep_gradients_local(delayed))
    own = DistributedDataParallel(nn.Linear(3, 3))
    own.register_comm_hook(None, local_gradients_hook)
    keep_gradients_local(own)
    assert said_by(lambda: keep_gradients_local_once_wrapped(own)).startswith(
        "TypeError: module: expected one that is not wrapped in DistributedDataParallel yet"
    )


def test_a_torch_that_does_not_tell_which_ddp_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DistributedDataParallel, "_active_ddp_module")
    with pytest.raises(RuntimeError, match="expected a torch whose DistributedDataParallel names the module"):
        lioncub.keep_gradients_local_once_wrapped(nn.Linear(2, 2))
