"""What goes wrong on one rank in a step is told to all, changes nothing anywhere, and the next steps are as before."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import Undo, move, put
from gloo_workers import on_ranks, said_by
from nets import Net, all_bits, batch_of, train
from optimizers import LionCub
from torch import Tensor, nn

from lioncub import MomentumSync, NonFiniteError, Quantized, SignVote

SMALL = 2e-5
TOLD = "WorkersDisagreeError: step {} was taken by no worker, because of an error on rank 1 (reported there)"


# each does something wrong on the rank that calls it, before `step`


def nothing() -> None:
    """What `zero_grad` undoes."""


def nonfinite(net: Net, opt: LionCub) -> Undo:
    opt.zero_grad()
    images, tokens = batch_of(1)
    net(images * torch.inf, tokens, use_all=True).backward()
    return nothing


def sparse_gradient(net: Net, opt: LionCub) -> Undo:
    net.table.weight.grad = net.table.weight.detach().clone().to_sparse()
    return nothing


def changed_gradient(net: Net, opt: LionCub) -> Undo:
    net.table.weight.grad = net.table.weight.grad * 1.0  # type: ignore[operator]
    return nothing


def grown_gradient(net: Net, opt: LionCub) -> Undo:
    net.sometimes.bias.grad.data = torch.ones(9)  # type: ignore[union-attr]
    return nothing


def bad_scale(net: Net, opt: LionCub) -> Undo:
    opt.grad_scale = torch.tensor(0.0)
    return nothing


def no_betas(net: Net, opt: LionCub) -> Undo:
    betas = opt.param_groups[0].pop("betas")
    return lambda: opt.param_groups[0].update(betas=betas)


def option(name: str, value: Any) -> Callable[[Net, LionCub], Undo]:
    return lambda net, opt: put(opt.param_groups[0], name, value)


def no_state(net: Net, opt: LionCub) -> Undo:
    return put(opt.state, net.table.weight, {})


def moved_momentum(net: Net, opt: LionCub) -> Undo:
    return move(opt.state[net.table.weight]["exp_avg"])


def popped_group(net: Net, opt: LionCub) -> Undo:
    return put(opt.param_groups, slice(None), opt.param_groups[:1])


MOMENTUM = "RuntimeError: state of parameter table.weight: expected the exp_avg made at construction, got "
# what is wrong, and what the rank says whose fault it is
FAULTS: dict[str, tuple[Callable[[Net, LionCub], Undo], str]] = {
    "nonfinite": (nonfinite, "NonFiniteError: step 3: a gradient, momentum or update is not finite"),
    "lr": (
        option("lr", 0.5),
        r"WorkersDisagreeError: workers disagree on the hyperparameters \(lr of param group 0\) at step 3: "
        r"ranks? 0(, 2)?: 0.01; rank 1: 0.5",
    ),
    "step": (
        option("step", 7),
        "WorkersDisagreeError: workers disagree on the step at step .: ranks? 0(, 2)?: 3; rank 1: 7",
    ),
    "lr of another type": (option("lr", "fast"), "TypeError: lr: expected a number or a 0-dim tensor, got 'fast'"),
    "negative lr": (option("lr", -1.0), "ValueError: lr: expected a finite number >= 0, got -1.0"),
    "no step": (option("step", None), "TypeError: step: expected an integer >= 0, got None"),
    "no betas": (no_betas, "KeyError: 'betas'"),
    "scale": (bad_scale, "ValueError: grad_scale: expected a finite scale > 0, got 0.0|RuntimeError: overlap: "),
    "state": (no_state, MOMENTUM + "another object; change it in place or through load_state_dict"),
    "moved momentum": (moved_momentum, MOMENTUM),
    "popped group": (popped_group, "RuntimeError: param_groups: expected 2 groups"),
    "sparse gradient": (
        sparse_gradient,
        "TypeError: gradient of table.weight: expected a dense tensor, got layout torch.sparse_coo"
        "|RuntimeError: gradient of table.weight: expected it unchanged since backward",
    ),
    # with overlap the votes of it have been sent
    "changed gradient": (
        changed_gradient,
        "RuntimeError: gradient of table.weight: expected it unchanged since backward",
    ),
    "grown gradient": (
        grown_gradient,
        r"ValueError: gradient of sometimes.bias: expected the parameter's shape \(7,\)",
    ),
}
# all ranks raise the same
BY_ALL = ("nonfinite", "lr", "step")
ALSO_ON_ALL = ("nonfinite", "state", "changed gradient")
OPTIONS: dict[str, dict[str, Any]] = {
    "ordinary": {"momentum_sync": MomentumSync(), "algorithm": "all_gather"},
    "overlap": {"overlap": True, "momentum_sync": MomentumSync()},
    "overlap, staggered": {
        "overlap": True,
        "momentum_sync": MomentumSync(every=2, schedule="staggered", dtype="int8"),
        "compression": Quantized(share_scales_every=2),
    },
}


def build(**options: Any) -> tuple[Net, LionCub]:
    net = Net(seed=0)
    named = list(net.named_parameters())
    return net, LionCub([{"params": named[:6]}, {"params": named[6:]}], lr=1e-2, bucket_mb=SMALL, **options)


def backward(net: Net, opt: LionCub, seed: int) -> None:
    opt.zero_grad()
    net(*batch_of(seed), use_all=True).backward()


def train_with_fault(rank: int, options: dict[str, Any], fault: str | None, culprits: tuple[int, ...]) -> Any:
    """Five steps; before the fourth, something goes wrong on some ranks, is caught and undone."""
    net, opt = build(**options)
    said = ""
    for step in range(5):
        backward(net, opt, 10 * step + rank)
        if fault is not None and step == 3:
            before = all_bits(opt)
            undo = FAULTS[fault][0](net, opt) if rank in culprits else nothing
            said = said_by(opt.step)
            undo()
            assert before == all_bits(opt), (fault, culprits, said)
            backward(net, opt, 10 * step + rank)
        opt.step()
    opt.check_replicas()
    ended = all_bits(opt)
    opt.close()
    return ended, said


def assert_nothing_is_left(rank: int, world_size: int, name: str, faults: list[str]) -> None:
    expected, _ = train_with_fault(rank, OPTIONS[name], None, ())
    everywhere = tuple(range(world_size))
    for fault in faults:
        for culprits in ((1,), everywhere) if fault in ALSO_ON_ALL else ((1,),):
            ended, said = train_with_fault(rank, OPTIONS[name], fault, culprits)
            own = fault in BY_ALL or rank in culprits
            assert re.match(FAULTS[fault][1] if own else re.escape(TOLD.format(3)), said), (fault, culprits, said)
            assert ended == expected, (fault, culprits)


@on_ranks(3)
def test_a_step_that_raises_leaves_nothing_under_way(rank: int, world_size: int) -> None:
    faults = [fault for fault in FAULTS if fault != "changed gradient"]
    assert_nothing_is_left(rank, world_size, "ordinary", faults)


@on_ranks(2)
def test_a_step_that_raises_leaves_nothing_under_way_with_overlap(rank: int, world_size: int) -> None:
    # changes through .data after backward are not noticed: votes hold the old memory
    faults = [fault for fault in FAULTS if fault != "grown gradient"]
    assert_nothing_is_left(rank, world_size, "overlap", faults)
    assert_nothing_is_left(rank, world_size, "overlap, staggered", ["nonfinite", "no step", "popped group"])


@on_ranks(2)
def test_a_capturable_step_that_one_rank_cannot_take_is_told_by_the_next(rank: int, world_size: int) -> None:
    names = {
        "state": "state",
        "lr of another type": "lr of another type",
        "no step": "RuntimeError: step: expected the tensor made at construction",
        "grown gradient": "ValueError: gradient of sometimes.bias: expected",
        "moved momentum": "moved momentum",
        "popped group": "popped group",
    }
    for algorithm in ("all_gather", "reduce_scatter"):
        for fault, message in names.items():
            net, opt = build(capturable=True, algorithm=algorithm, compression=SignVote())
            backward(net, opt, rank)
            opt.step()
            before = all_bits(opt)
            undo = FAULTS[fault][0](net, opt) if rank == 1 else nothing
            said = said_by(opt.step)
            undo()
            assert re.match("no error" if rank == 0 else FAULTS.get(message, (None, message))[1], said), (fault, said)
            assert said_by(opt.step) == TOLD.format(1), fault
            assert before == all_bits(opt)
            backward(net, opt, rank + 10)
            opt.step()
            opt.raise_errors()
            assert all_bits(opt)[0] != before[0]
            opt.check_replicas()
            assert opt.stats().steps == 3


@on_ranks(3)
def test_what_is_not_finite_on_one_rank_stops_the_step_on_all(rank: int, world_size: int) -> None:
    for policy in ("raise", "skip"):
        net = Net(seed=0)
        opt = LionCub(net.named_parameters(), lr=1e-2, on_nonfinite=policy)
        train(net, opt, rank, range(2))
        before = all_bits(opt)
        backward(net, opt, rank)
        if rank == 1:
            net.sometimes.weight.grad[3, 3] = torch.nan
        said = said_by(opt.step)
        expected = "NonFiniteError: step 2: .* first in parameter sometimes.weight on rank 1;|no error"
        assert re.match(expected.split("|")[policy == "skip"], said), said
        assert before == all_bits(opt)
        assert (opt.stats().steps, opt.stats().skipped_steps) == ((2, 0) if policy == "raise" else (3, 1))
        backward(net, opt, rank)
        opt.step()
        opt.check_replicas()


@on_ranks(2)
def test_a_closure_that_fails_on_one_rank_is_told_to_all(rank: int, world_size: int) -> None:
    for capturable in (False, True):
        p = torch.ones(9).requires_grad_()
        opt = LionCub([p], lr=0.5, capturable=capturable)
        p.grad = torch.ones(9)

        def closure(p: Tensor = p) -> Tensor:
            if rank == 1:
                raise KeyError("broken")
            return p.sum()

        said = [said_by(functools.partial(opt.step, closure)), said_by(opt.step)]
        told = TOLD.format(0)
        if rank == 1:
            assert said == ["KeyError: 'broken'", told if capturable else "no error"]
        else:
            assert said == (["no error", told] if capturable else [told, "no error"])
        opt.step()
        opt.check_replicas()


CHANGED = {
    "group": "workers disagree on the bucket layout at step 1: rank 0: hash",
    "checkpoint": "workers disagree on the step at step",
    "bad checkpoint": "workers disagree on the step at step",
}


@pytest.mark.parametrize("how", CHANGED)
@on_ranks(2)
def test_what_one_rank_alone_adds_or_loads_is_noticed(rank: int, world_size: int, how: str) -> None:
    """First rank 1 alone does it, then the others too."""
    said = []
    every: list[dict[str, Any]] = [{}, {"overlap": True, "momentum_sync": MomentumSync()}, {"capturable": True}]
    for options in every:
        p, late = (torch.ones(9).requires_grad_() for _ in range(2))
        opt = LionCub([("p", p)], lr=0.5, **options)
        saved = copy.deepcopy(opt.state_dict())

        def change(opt: LionCub = opt, late: Tensor = late, saved: dict[str, Any] = saved) -> None:
            if how == "group":
                opt.add_param_group({"params": [("late", late)]})
            else:
                opt.load_state_dict(saved)

        def step(opt: LionCub = opt, p: Tensor = p, late: Tensor = late) -> None:
            opt.zero_grad()
            (p.sum() + late.sum()).backward()
            opt.step()

        step()
        if how == "bad checkpoint":
            wrong = copy.deepcopy(saved)
            wrong["state"][0]["exp_avg"] = torch.ones(7)
            failed = said_by(lambda opt=opt, state=wrong if rank == 1 else saved: opt.load_state_dict(state))  # type: ignore[misc]
            assert failed.startswith("ValueError: state_dict: expected exp_avg" if rank == 1 else "no error")
        elif rank == 1:
            change()
        said += [said_by(step), said_by(step)]
        if how != "group" or rank == 0:
            change()
        if "capturable" in options:
            # what the last one reported
            said.append(said_by(step))
        step()
        opt.check_replicas()
    assert all(CHANGED[how] in one for one in said[:4]), said
    assert "no error" not in said[4:6] or how != "bad checkpoint", said
    assert any(one.startswith("WorkersDisagreeError") for one in said[4:]), said


@on_ranks(3)
def test_a_checkpoint_loaded_on_one_rank_alone_is_noticed_by_the_parameters(rank: int, world_size: int) -> None:
    p = torch.zeros(9).requires_grad_()
    opt = LionCub([("p", p)], lr=0.5)
    p.grad = torch.ones(9)
    opt.step()
    if rank == 1:
        opt.load_state_dict(opt.state_dict())
        p.data.fill_(3.0)
    assert "parameter p differs between workers: ranks 0, 2: hash " in said_by(opt.step)


# under a GradScaler


@on_ranks(3)
def test_an_overflow_on_one_rank_skips_the_step_on_all(rank: int, world_size: int) -> None:
    p = torch.ones(100).requires_grad_()
    opt = LionCub([p], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = torch.linspace(-1, 1, 100) + 0.001 * (rank + 1)
    for step in range(3):
        opt.zero_grad()
        scaler.scale((p * weights).sum()).backward()
        if step == 1 and rank == 0:
            p.grad[7] = torch.inf
        before = all_bits(opt)
        scaler.step(opt)
        scaler.update()
        assert (all_bits(opt) == before) == (step == 1)
    opt.check_replicas()
    expected = torch.zeros(100)
    for _ in range(2):
        expected = torch.tensor(0.99) * expected + torch.tensor(1 - 0.99) * weights
    assert torch.equal(opt.state[p]["exp_avg"], expected), "the scale must not reach the momentum"
    assert torch.equal(p, 1 - 0.5 * torch.sign(weights))
    assert opt.stats().skipped_steps == 1


@on_ranks(2)
def test_a_scaler_on_a_rank_without_gradients_is_told_to_all(rank: int, world_size: int) -> None:
    p = torch.ones(9).requires_grad_()
    opt, scaler = LionCub([p], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = scaler.scale(p.sum())
    if rank == 0:
        loss.backward()
    own = "RuntimeError: GradScaler: expected a gradient on every worker, got none on this one"
    assert said_by(lambda: scaler.step(opt)).startswith(own if rank == 1 else TOLD.format(0))
    opt.zero_grad()
    scaler.scale(p.sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert p.tolist() == [0.5] * 9


def test_a_scaler_that_saw_no_gradient_says_so() -> None:
    for capturable in (False, True):
        opt = LionCub([torch.ones(3).requires_grad_()], capturable=capturable)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.zeros(()))
        with pytest.raises(RuntimeError, match="GradScaler: expected a gradient on every worker, got none on this one"):
            scaler.step(opt)
        assert opt.stats().steps == 0
        assert not hasattr(opt, "found_inf")


def test_a_step_that_raises_leaves_no_scale_behind() -> None:
    p = torch.ones(4).requires_grad_()
    opt = LionCub([p], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(p.sum()).backward()
    opt.state[p]["exp_avg"][1] = math.nan
    with pytest.raises(NonFiniteError):
        scaler.step(opt)
    opt.state[p]["exp_avg"].zero_()
    scaler.update()
    scaler.step(opt)
    assert opt.state[p]["exp_avg"].tolist() == torch.full((4,), 1 - 0.99).tolist()


# one worker alone


@pytest.mark.parametrize("where", ["gradient", "momentum"])
def test_nonfinite_numbers_stop_a_single_worker_too(where: str) -> None:
    p, q = nn.Parameter(torch.ones(100)), nn.Parameter(torch.ones(5))
    opt = LionCub([("p", p), ("q", q)], lr=0.5)
    for x in (p, q):
        x.grad = torch.ones_like(x)
    tensor = q.grad if where == "gradient" else opt.state[q]["exp_avg"]
    tensor[3] = math.nan if where == "momentum" else math.inf  # type: ignore[index]
    before = all_bits(opt)
    with pytest.raises(NonFiniteError, match=r"step 0: .* first in parameter q on rank 0"):
        opt.step()
    assert all_bits(opt) == before
    assert opt.stats().steps == 0


def test_a_later_bucket_that_is_wrong_changes_nothing() -> None:
    params = [torch.ones(100).requires_grad_() for _ in range(3)]
    opt = LionCub(params, lr=0.5, bucket_mb=1e-5)
    assert len(opt.stats().buckets) == 3
    for p in params:
        p.grad = torch.ones(100)
    params[2].data = torch.ones(50)
    with pytest.raises(ValueError, match=r"\[2\]: expected .*as when the optimizer was built"):
        opt.step()
    assert params[0].tolist() == [1.0] * 100
    assert not opt.state[params[0]]["exp_avg"].any()


def test_a_step_interrupted_while_writing_is_not_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(100).requires_grad_() for _ in range(2)]
    opt = LionCub(params, lr=0.5, bucket_mb=1e-5)
    saved = copy.deepcopy(opt.state_dict())
    for p in params:
        p.grad = torch.ones(100)
    moves = iter([None, KeyboardInterrupt()])

    def interrupted(*args: Any, **options: Any) -> None:
        if (event := next(moves)) is not None:
            raise event

    with monkeypatch.context() as patched:
        patched.setattr("lioncub.step.foreach_lion_step_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    with pytest.raises(RuntimeError, match=r"interrupted while it wrote parameters.*load a checkpoint"):
        opt.step()
    opt.load_state_dict(saved)
    opt.step()
    assert params[1].tolist() == [0.5] * 100
