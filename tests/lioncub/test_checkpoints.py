"""state_dict and load_state_dict: bit-exact resume, any kind of optimizer and number of workers, what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo_workers import everyone, on_ranks, results_of, said_by, same_on_all, shared_folder
from nets import Net, all_bits, bits_of, give_gradients, groups_of, momentum_of, train, two_groups
from optimizers import PRECISIONS, Lion, LionCub
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lioncub import Quantized, SignMean
from lioncub.simulate import Workers

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])


def assert_resumes(optimizer: type, rank: int, path: Path, options: dict[str, Any]) -> None:
    """A run that is saved and goes on in new objects has the bits of one that never stopped."""
    nets = [Net(seed=seed) for seed in (0, 0, 9)]
    straight, broken, resumed = (optimizer(groups_of(net), lr=1e-2, **options) for net in nets)
    train(nets[0], straight, rank, range(3))
    train(nets[1], broken, rank, range(3))
    torch.save({"net": nets[1].state_dict(), "opt": broken.state_dict()}, path)
    saved = torch.load(path)
    # in either order, by keyword as distributed checkpointing does
    resumed.load_state_dict(state_dict=saved["opt"])
    nets[2].load_state_dict(saved["net"])
    for net, opt in ((nets[0], straight), (nets[2], resumed)):
        for group in opt.param_groups:
            group["lr"] = 5e-3
        train(net, opt, rank, range(3, 6))
    assert all_bits(straight) == all_bits(resumed)
    assert [int(group["step"]) for group in resumed.param_groups] == [6, 6]


@BOTH
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resume_gives_the_bits_of_never_stopping(optimizer: type, precision: str, tmp_path: Path) -> None:
    assert_resumes(optimizer, 0, tmp_path / "saved.pt", PRECISIONS[precision])


@on_ranks(2)
def test_workers_resume_with_the_bits_of_never_stopping(rank: int, world_size: int) -> None:
    for precision in ("fp32", "stochastic, bf16 momentum", "masters, bf16 momentum"):
        assert_resumes(LionCub, rank, shared_folder() / f"{precision} {rank}.pt", PRECISIONS[precision])


@BOTH
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_alone_can_be_copied_and_pickled(optimizer: type, precision: str) -> None:
    net = Net(seed=0)
    opt = optimizer(groups_of(net), lr=1e-2, **PRECISIONS[precision])
    train(net, opt, 0, range(2))
    twins = copy.deepcopy((net, opt)), pickle.loads(pickle.dumps((net, opt)))
    train(net, opt, 0, range(2, 4))
    for twin_net, twin in twins:
        train(twin_net, twin, 0, range(2, 4))
        assert (bits_of(twin_net), all_bits(twin)) == (bits_of(net), all_bits(opt))
        assert repr(twin) == repr(opt)


def test_a_copy_keeps_all_options() -> None:
    net = Net(seed=0)
    first, *others = groups_of(net)
    groups = [{**first, "compression": SignMean()}, *others]
    opt = LionCub(groups, lr=torch.tensor(1e-2), capturable=True, on_nonfinite="skip", maximize=True)
    train(net, opt, 0, range(2))
    twin_net, twin = copy.deepcopy((net, opt))
    assert repr(twin) == repr(opt)
    assert twin.param_groups[0]["lr"] is not opt.param_groups[0]["lr"]
    train(net, opt, 0, range(2, 4))
    train(twin_net, twin, 0, range(2, 4))
    assert (bits_of(twin_net), all_bits(twin)) == (bits_of(net), all_bits(opt))


@on_ranks(2)
def test_one_of_several_says_that_it_cannot_be_copied(rank: int, world_size: int) -> None:
    opt = LionCub([torch.ones(3).requires_grad_()])
    for way in (copy.deepcopy, pickle.dumps):
        said = said_by(lambda way=way: way(opt))
        assert said.startswith("TypeError: LionCub cannot be copied or pickled, since its process group cannot;")
        assert "load_state_dict(opt.state_dict())" in said


@pytest.mark.parametrize("options", [{"master_weights": True}, {"overlap": True}, {"capturable": True}], ids=str)
@on_ranks(2)
def test_state_can_leave_the_device_and_come_back(rank: int, world_size: int, options: dict[str, Any]) -> None:
    net, twin = Net(seed=0), Net(seed=0)
    opt, other = (LionCub(groups_of(n), lr=1e-2, impl="reference", **options) for n in (net, twin))
    train(net, opt, rank, range(3))
    train(twin, other, rank, range(3))
    held = dict(opt.state[net.table.weight])
    # memory that numpy has seen, as by the kernels of the CPU, cannot be given back
    with mock.patch("lioncub.optimizer._is_on_host", return_value=False):
        opt.offload()
    assert all(bucket.exp_avg.untyped_storage().size() == 0 for bucket in opt._buckets.all)
    assert opt.stats().steps == 3
    assert "2 worker(s)" in repr(opt)
    gone = "RuntimeError: LionCub: expected its state in place, got one after offload(); call reload() first"
    for call in (opt.state_dict, opt.offload, opt.sync_momentum, lambda: opt.rebind(None)):
        assert said_by(call) == gone
    opt.reload()
    before = all_bits(opt)
    assert before == all_bits(other)
    assert all(opt.state[net.table.weight][name] is value for name, value in held.items())
    # of one rank that forgets it, the others are told
    if rank == 0:
        opt.offload()
    said = said_by(lambda: (opt.step(), opt.raise_errors()))
    assert said == gone if rank == 0 else "because of an error on rank 0" in said, said
    if rank == 0:
        opt.reload()
    if not options.get("capturable"):
        assert all_bits(opt) == before
        train(net, opt, rank, range(3, 5))
        train(twin, other, rank, range(3, 5))
        assert all_bits(opt) == all_bits(other)
    assert said_by(opt.reload).startswith("RuntimeError: reload: expected an optimizer after offload()")
    opt.close()
    other.close()


def average_and_save(rank: int, world_size: int, path: str) -> None:
    net = Net(seed=0)
    opt = LionCub(groups_of(net), lr=1e-2)
    train(net, opt, rank, range(4))
    momentum = opt.state[net.table.weight]["exp_avg"]
    all_of_them = everyone(momentum.clone())
    assert not torch.equal(all_of_them[0], all_of_them[1]), "momentum must differ before it is averaged"
    total = all_of_them[0]
    for other in all_of_them[1:]:
        total = total + other
    opt.sync_momentum()
    assert torch.equal(momentum, total / world_size)
    assert same_on_all(momentum_of(opt))
    if rank == 0:
        torch.save({"net": net.state_dict(), "opt": opt.state_dict()}, path)


def load_and_go_on(rank: int, world_size: int, path: str) -> None:
    net = Net(seed=1)
    saved = torch.load(path)
    net.load_state_dict(saved["net"])
    opt = LionCub(groups_of(net), lr=1e-2)
    opt.load_state_dict(saved["opt"])
    train(net, opt, rank, range(4, 7))
    opt.check_replicas()
    assert opt.stats().steps == 7
    assert same_on_all(bits_of(net))


def test_averaged_momentum_serves_any_number_of_workers(tmp_path: Path) -> None:
    path = str(tmp_path / "one.pt")
    results_of(average_and_save, 3, path)
    for world_size in (1, 2, 4):
        results_of(load_and_go_on, world_size, path)


@BOTH
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
        assert (exp_avg.dtype, exp_avg.stride()) == (torch.float32, p.stride())
        assert exp_avg.data_ptr() == addresses[i]
        assert torch.equal(exp_avg, saved["state"][i]["exp_avg"])
    before = [(p.detach().clone(), opt.state[p]["exp_avg"].clone()) for p in params]
    opt.step()
    for p, (x, m) in zip(params, before, strict=True):
        assert not torch.equal(p, x)
        expected = torch.tensor(0.99) * m + torch.tensor(1 - 0.99) * p.grad.float()
        assert torch.equal(opt.state[p]["exp_avg"], expected), "steps must use the loaded momentum"


def test_load_hooks_are_honoured() -> None:
    p = torch.randn(3).requires_grad_()
    opt = LionCub([p])
    seen = []
    opt.register_load_state_dict_pre_hook(lambda _, state: {**state, "state": {0: {"exp_avg": torch.full((3,), 2.0)}}})
    opt.register_load_state_dict_post_hook(lambda o: seen.append(float(o.state[p]["exp_avg"][0])))
    opt.load_state_dict(opt.state_dict())
    assert seen == [2.0]


@on_ranks(2)
def test_distributed_checkpointing_works_with_frozen_parameters(rank: int, world_size: int) -> None:
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


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_checkpoints_serve_capturable_and_ordinary_optimizers(first: bool, second: bool) -> None:
    nets = Net(seed=0), Net(seed=0)
    lr = torch.tensor(0.01)
    whole, opt = LionCub(groups_of(nets[0]), lr=lr), LionCub(groups_of(nets[1]), lr=lr.clone(), capturable=first)
    train(nets[0], whole, 0, range(2))
    train(nets[1], opt, 0, range(2))
    resumed = LionCub(groups_of(nets[1]), lr=lr.clone(), capturable=second)
    clock, held = resumed.param_groups[0]["step"], resumed.param_groups[0]["lr"]
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    if second:
        # what a graph may hold stays where it was
        assert resumed.param_groups[0]["step"] is resumed.param_groups[1]["step"] is clock
        assert resumed.param_groups[0]["lr"] is held
    train(nets[0], whole, 0, range(2, 4))
    train(nets[1], resumed, 0, range(2, 4))
    assert all_bits(whole) == all_bits(resumed)
    assert int(resumed.param_groups[0]["step"]) == resumed.stats().steps == 4


def with_master(optimizer: type, value: float, **options: Any) -> tuple[torch.Tensor, Any]:
    p = torch.full((5,), value, dtype=torch.bfloat16).requires_grad_()
    opt = optimizer([p], **{"lr": 1e-4, "master_weights": True} | options)
    p.grad = torch.ones_like(p)
    opt.step()
    return p, opt


@BOTH
def test_checkpoints_without_and_with_masters(optimizer: type) -> None:
    (p, opt), (q, other) = with_master(optimizer, 1.0), with_master(optimizer, 2.0)
    saved = copy.deepcopy(opt.state_dict())
    without = copy.deepcopy(saved)
    del without["state"][0]["master"]
    other.load_state_dict(without)
    assert torch.equal(other.state[q]["master"], q.float())
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(saved)
    assert torch.equal(other.state[q]["master"], opt.state[p]["master"])
    opt.step()
    other.step()
    assert torch.equal(other.state[q]["master"], opt.state[p]["master"])
    _, plain = with_master(optimizer, 1.0, lr=0.5, master_weights=False)
    said = said_by(lambda: plain.load_state_dict(saved))
    assert re.search(r"expected no master of parameter .*without master_weights=True, got one", said)
    _, half = with_master(optimizer, 1.0, lr=0.5, master_weights=False, momentum_dtype=torch.bfloat16)
    said = said_by(lambda: half.load_state_dict(plain.state_dict()))
    assert re.match(r"TypeError: .*exp_avg of parameter .* of dtype torch.bfloat16, got torch.float32", said)


# what is refused


def of_adamw(saved: dict[str, Any]) -> None:
    params, groups = two_groups()
    other = torch.optim.AdamW(groups)
    give_gradients(params)
    other.step()
    saved.update(other.state_dict())


Spoil = Callable[[dict[str, Any]], Any]


def of_group(i: int, **changes: Any) -> Spoil:
    return lambda saved: saved["param_groups"][i].update(changes)


def of_state(i: int, **changes: Any) -> Spoil:
    return lambda saved: saved["state"][i].update(changes)


def of_both_groups(**changes: Any) -> Spoil:
    return lambda saved: [group.update(changes) for group in saved["param_groups"]]


def without_memory(entry: str, make: Callable[[torch.Tensor], Any]) -> Spoil:
    return lambda saved: saved["state"][2].update({entry: make(saved["state"][2][entry])})


NOT_OURS: dict[str, tuple[Spoil, str]] = {
    **{
        f"step {step}": (of_both_groups(step=step), ".*step: expected an integer")
        for step in (None, math.nan, -5, 2**63, 1.0, True, torch.tensor(2.0))
    },
    "two steps": (of_group(1, step=3), r".*expected one step counter in all param groups, got \[0, 3\]"),
    "no step": (lambda saved: saved["param_groups"][1].pop("step"), ".*that of Lion or LionCub, with a step"),
    "adamw": (of_adamw, ".*state_dict: expected that of Lion or LionCub, with a step counter in every param group"),
    "adamw's state": (
        of_state(2, exp_avg_sq=torch.zeros(9)),
        ".*state_dict: expected that of Lion or LionCub, .* got exp_avg_sq of parameter c",
    ),
    "no state": (lambda saved: saved.pop("state"), ".*expected keys 'state' and 'param_groups', got"),
    "state of None": (lambda saved: saved["state"].update({1: None}), ".*state of parameter b as a dictionary"),
    "state of one": (lambda saved: saved["state"].pop(1), "ValueError: .*expected exp_avg of parameter b.* got none"),
    "shape": (
        of_state(1, exp_avg=torch.zeros(6)),
        r"ValueError: .*exp_avg of parameter b of shape \(300,\), got \(6,\)",
    ),
    "dtype": (
        of_state(1, exp_avg=torch.zeros(300, dtype=torch.bfloat16)),
        "TypeError: .*exp_avg of parameter b of dtype torch.float32, got torch.bfloat16",
    ),
    "fewer": (
        lambda saved: saved["param_groups"][0]["params"].pop(),
        r"ValueError: .*expected param groups of \[2, 1\] parameters, got \[1, 1\]",
    ),
    "betas": (of_group(0, betas=(0.9, 1.5)), r"ValueError: .*betas\[1\]: expected a number in \[0, 1\), got 1.5"),
    "maximize": (of_group(1, maximize="no"), ".*maximize: expected True or F"),
    **{
        f"{entry} {kind}": (
            without_memory(entry, make),
            f"TypeError: state_dict: expected {entry} of parameter c as a dense tensor with memory, got {kind}",
        )
        for entry in ("exp_avg", "master")
        for kind, make in (
            ("meta", lambda t: t.to("meta")),
            ("torch.sparse_coo", lambda t: t.to_sparse()),
            ("list", lambda t: t.tolist()),
        )
    },
}


@pytest.mark.parametrize("what", NOT_OURS)
@pytest.mark.parametrize("kind", ["Lion", "LionCub", "capturable"])
def test_a_checkpoint_that_is_not_its_own_changes_nothing(kind: str, what: str) -> None:
    params, groups = two_groups()
    options: dict[str, Any] = {"lr": 0.1, "master_weights": True}
    opt = Lion(groups, **options) if kind == "Lion" else LionCub(groups, capturable=kind == "capturable", **options)
    saved = copy.deepcopy(opt.state_dict())
    for state in saved["state"].values():
        state["exp_avg"] += 1
    saved["param_groups"][0]["lr"] = 0.7
    spoil, message = NOT_OURS[what]
    spoil(saved)
    before = all_bits(opt)
    said = said_by(lambda: opt.load_state_dict(saved))
    assert re.match(message, said), said
    assert all_bits(opt) == before
    assert opt.param_groups[0]["lr"] == 0.1
    give_gradients(params)
    opt.step()
    assert [int(group["step"]) for group in opt.state_dict()["param_groups"]] == [1, 1]


@pytest.mark.parametrize("entry", ["scale", "drift"])
def test_what_votes_keep_is_checked_before_anything_is_loaded(entry: str) -> None:
    options: dict[str, Any] = {"compression": Quantized(share_scales_every=1), "drift_every": 1}
    with Workers(2) as workers:
        made = [two_groups() for _ in range(2)]
        opts = workers.run(lambda rank, group: LionCub(made[rank][1], process_group=group, **options))
        saved = copy.deepcopy(opts[0].state_dict())
        saved["state"][0]["exp_avg"] += 1
        without_memory(entry, lambda t: t.to("meta"))(saved)
        said = said_by(lambda: opts[0].load_state_dict(saved))
        assert f"expected {entry} of parameter c as a dense tensor with memory, got meta" in said
        assert not opts[0].state[made[0][0][0]]["exp_avg"].any()
