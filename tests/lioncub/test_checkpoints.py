"""state_dict and load_state_dict: bit-exact resume, dtypes and views, averaged momentum for any number of workers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from gloo_workers import results_of
from nets import Net, bits_of, groups_of, momentum_of, train
from optimizers import Lion, LionCub
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


def stop_and_go(rank: int, world_size: int, folder: str) -> bool:
    straight, broken = Net(seed=0), Net(seed=0)
    one, two = (LionCub(groups_of(net), lr=1e-2) for net in (straight, broken))
    train(straight, one, rank, range(5))
    train(broken, two, rank, range(5))
    torch.save({"net": broken.state_dict(), "opt": two.state_dict()}, Path(folder) / f"{rank}.pt")
    resumed = Net(seed=9)
    saved = torch.load(Path(folder) / f"{rank}.pt")
    resumed.load_state_dict(saved["net"])
    three = LionCub(groups_of(resumed), lr=1e-2)
    three.load_state_dict(state_dict=saved["opt"])
    assert three.stats().steps == 5
    for group, of in zip(one.param_groups, three.param_groups, strict=True):
        group["lr"] = of["lr"] = 5e-3
    for net, opt in ((straight, one), (resumed, three)):
        train(net, opt, rank, range(5, 9))
    assert bits_of(straight) == bits_of(resumed)
    assert momentum_of(one) == momentum_of(three)
    return True


def test_resume_gives_the_bits_of_never_stopping(tmp_path: Path) -> None:
    assert results_of(stop_and_go, 2, str(tmp_path)) == [True] * 2


def average_and_save(rank: int, world_size: int, path: str) -> tuple[bytes, bool]:
    net = Net(seed=0)
    opt = LionCub(groups_of(net), lr=1e-2)
    train(net, opt, rank, range(4))
    mine = opt.state[net.table.weight]["exp_avg"].clone()
    everyone = [torch.empty_like(mine) for _ in range(world_size)]
    torch.distributed.all_gather(everyone, mine)
    total = everyone[0]
    for other in everyone[1:]:
        total = total + other
    opt.sync_momentum()
    assert torch.equal(opt.state[net.table.weight]["exp_avg"], total / world_size)
    if rank == 0:
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)
    return momentum_of(opt), bool((mine != everyone[1 - rank if rank < 2 else 0]).any())


def load_and_go_on(rank: int, world_size: int, path: str) -> bytes:
    net = Net(seed=1)
    saved = torch.load(path)
    net.load_state_dict(saved["net"])
    opt = LionCub(groups_of(net), lr=1e-2)
    opt.load_state_dict(saved["opt"])
    train(net, opt, rank, range(4, 7))
    opt.check_replicas()
    assert opt.stats().steps == 7
    return bits_of(net)


def test_averaged_momentum_serves_any_number_of_workers(tmp_path: Path) -> None:
    path = str(tmp_path / "one.pt")
    saved = results_of(average_and_save, 3, path)
    assert [momentum for momentum, _ in saved] == [saved[0][0]] * 3
    assert any(drifted for _, drifted in saved), "momentum must have differed before it was averaged"
    for world_size in (1, 2, 4):
        ends = results_of(load_and_go_on, world_size, path)
        assert ends == [ends[0]] * world_size


@pytest.mark.parametrize("optimizer", [Lion, LionCub])
def test_momentum_keeps_its_dtype_its_strides_and_its_views(optimizer: type) -> None:
    params = [torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last), torch.randn(65)]
    params = [p.to(torch.bfloat16).requires_grad_() for p in params]
    opt = optimizer(params, lr=0.1)
    for p in params:
        p.grad = torch.randn_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    addresses = [opt.state[p]["exp_avg"].data_ptr() for p in params]
    opt.step()
    opt.load_state_dict(saved)
    for i, p in enumerate(params):
        exp_avg = opt.state[p]["exp_avg"]
        assert exp_avg.dtype == torch.float32
        assert exp_avg.stride() == p.stride()
        assert exp_avg.data_ptr() == addresses[i]
        assert torch.equal(exp_avg, saved["state"][i]["exp_avg"])
    before = [p.detach().clone() for p in params]
    momenta = [opt.state[p]["exp_avg"].clone() for p in params]
    opt.step()
    for p, x, m in zip(params, before, momenta, strict=True):
        assert not torch.equal(p, x)
        expected = torch.tensor(0.99) * m + torch.tensor(1 - 0.99) * p.grad.float()
        assert torch.equal(opt.state[p]["exp_avg"], expected), "steps must use the loaded momentum"


@pytest.mark.parametrize("optimizer", [Lion, LionCub])
def test_a_state_dict_that_does_not_fit_is_refused_whole(optimizer: type) -> None:
    params = [torch.randn(3, 3).requires_grad_(), torch.randn(5).requires_grad_()]
    opt = optimizer(params)
    good = copy.deepcopy(opt.state_dict())
    good["state"][0]["exp_avg"] += 1
    good["param_groups"][0]["lr"] = 0.5
    cases = []
    wrong = copy.deepcopy(good)
    wrong["state"][1]["exp_avg"] = torch.zeros(6)
    cases.append((wrong, ValueError, r"exp_avg of parameter .*\[1\] of shape \(5,\), got \(6,\)"))
    wrong = copy.deepcopy(good)
    wrong["state"][1]["exp_avg"] = torch.zeros(5, dtype=torch.bfloat16)
    cases.append((wrong, TypeError, "of dtype torch.float32, got torch.bfloat16"))
    wrong = copy.deepcopy(good)
    del wrong["state"][1]
    cases.append((wrong, ValueError, "expected exp_avg of parameter .* got none"))
    wrong = copy.deepcopy(good)
    wrong["param_groups"][0]["params"].pop()
    cases.append((wrong, ValueError, r"expected param groups of \[2\] parameters, got \[1\]"))
    wrong = copy.deepcopy(good)
    wrong["param_groups"][0]["betas"] = (0.9, 1.5)
    cases.append((wrong, ValueError, r"betas\[1\]: expected a number in \[0, 1\), got 1.5"))
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            opt.load_state_dict(wrong)
        assert opt.param_groups[0]["lr"] == 1e-4
        assert not opt.state[params[0]]["exp_avg"].any()


def test_load_hooks_are_honoured() -> None:
    p = torch.randn(3).requires_grad_()
    opt = LionCub([p])
    seen = []
    opt.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {0: {"exp_avg": torch.full((3,), 2.0)}}})
    opt.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[p]["exp_avg"][0])))
    opt.load_state_dict(opt.state_dict())
    assert seen == [2.0]


def through_distributed_checkpointing(rank: int, world_size: int) -> bool:
    net, other = Net(seed=0), Net(seed=0)
    for n in (net, other):
        n.conv.requires_grad_(False)
    opt, fresh = (LionCub(groups_of(n), lr=1e-2) for n in (net, other))
    train(net, opt, rank, range(3))
    other.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other, fresh, get_optimizer_state_dict(net, opt))
    assert momentum_of(fresh) == momentum_of(opt)
    assert fresh.stats().steps == 3
    fresh.step()
    return True


def test_distributed_checkpointing_works_with_frozen_parameters() -> None:
    assert results_of(through_distributed_checkpointing, 2) == [True] * 2
