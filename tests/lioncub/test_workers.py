"""LionCub over real Gloo processes: replicas, equality with Lion, transactions, disagreement, dead workers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from gloo_workers import results_of
from nets import Net, batch_of, bits_of, groups_of, momentum_of, train
from optimizers import Lion, LionCub

import lioncub
from lioncub import SignVote


def train_fifty_steps(rank: int, world_size: int, algorithm: str, bucket_mb: float) -> bytes:
    net = Net(seed=rank)
    opt = LionCub(groups_of(net), lr=1e-2, algorithm=algorithm, bucket_mb=bucket_mb, compression=SignVote())
    before = [p.detach().clone() for p in net.never.parameters()]
    train(net, opt, rank, range(50))
    opt.check_replicas()
    assert all(torch.equal(a, b) for a, b in zip(net.never.parameters(), before, strict=True))
    stats = opt.stats()
    assert stats.steps == 50
    assert stats.skipped_steps == 0
    sent = sum(bucket.bytes_sent for bucket in stats.buckets)
    assert stats.bytes_sent_per_step == sent + opt._engine.control.bytes_sent
    assert (stats.tied == 0) == (world_size % 2 == 1)
    assert 0 < stats.unanimous < 1
    if algorithm != "auto":
        assert {bucket.algorithm for bucket in stats.buckets} == {algorithm}
    return bits_of(net)


def train_in_every_way(rank: int, world_size: int) -> list[bytes]:
    ways = [("all_gather", 1.0), ("reduce_scatter", 1.0), ("all_reduce", 1.0), ("auto", 1e-5)]
    return [train_fifty_steps(rank, world_size, *way) for way in ways]


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_replicas_stay_equal_and_do_not_depend_on_buckets_or_algorithm(world_size: int) -> None:
    ends = results_of(train_in_every_way, world_size)
    assert all(bits == ends[0][0] for end in ends for bits in end)


def same_data_as_lion(rank: int, world_size: int, algorithm: str) -> int:
    generator = torch.Generator().manual_seed(5)
    shapes = [(33, 7), (64,), (5, 3, 2), (1009,)]
    mine = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    plain = [p.detach().clone().requires_grad_() for p in mine]
    cub = LionCub(mine, lr=1e-2, weight_decay=0.1, algorithm=algorithm, compression=SignVote())
    lion = Lion(plain, lr=1e-2, weight_decay=0.1)
    for _ in range(20):
        for p, q in zip(mine, plain, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
            assert p.grad.all(), "the comparison needs updates without exact zeros"
        cub.step()
        lion.step()
    for p, q in zip(mine, plain, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(cub.state[p]["exp_avg"], lion.state[q]["exp_avg"])
    assert cub.stats().unanimous == 1
    assert cub.stats().tied == 0
    return cub.stats().steps


def vote_with_own_momentum(rank: int, world_size: int) -> None:
    """Against the rule itself, in plain torch, with zeros, a missing gradient and ties."""
    p = torch.zeros(130).requires_grad_()
    idle = torch.ones(9).requires_grad_()
    opt = LionCub([p, idle], lr=0.5, weight_decay=0.1, compression=SignVote())
    x, m = torch.zeros(130), torch.zeros(world_size, 130)
    for t in range(6):
        grads = torch.stack(
            [
                torch.randint(-1, 2, (130,), generator=torch.Generator().manual_seed(10 * t + r)).float()
                for r in range(world_size)
            ]
        )
        if t == 3:
            grads[1] = 0
        p.grad = None if t == 3 and rank == 1 else grads[rank].clone()
        update = torch.tensor(0.9) * m + torch.tensor(1 - 0.9) * grads
        abstain = torch.stack([(torch.arange(130) + t + (r + t // 4) % world_size) % 2 for r in range(world_size)])
        codes = torch.where(update > 0, 1, torch.where(update < 0, 0, abstain))
        ones = codes.sum(dim=0)
        parity = (torch.arange(130) + t // 2) % 2
        up = torch.where(2 * ones == world_size, parity, (2 * ones > world_size).long())
        x = x * torch.tensor(1 - 0.5 * 0.1) - torch.where(up == 1, 0.5, -0.5)
        m = torch.tensor(0.99) * m + torch.tensor(1 - 0.99) * grads
        opt.step()
        assert torch.equal(p, x), f"step {t}"
        assert torch.equal(opt.state[p]["exp_avg"], m[rank]), f"step {t}"
    assert torch.equal(idle, torch.ones(9))
    assert not opt.state[idle]["exp_avg"].any()


def follow_rules(rank: int, world_size: int) -> list[int]:
    if world_size > 1:
        vote_with_own_momentum(rank, world_size)
    return [same_data_as_lion(rank, world_size, algorithm) for algorithm in ("all_gather", "reduce_scatter")]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_steps_follow_the_rules_and_are_those_of_lion_with_the_same_data(world_size: int) -> None:
    assert results_of(follow_rules, world_size) == [[20, 20]] * world_size


def nan_on_one_worker(rank: int, world_size: int, policy: str) -> tuple[str, bool, int, int]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, on_nonfinite=policy)
    train(net, opt, rank, range(2))
    before = bits_of(net), momentum_of(opt)
    net(*batch_of(rank), use_all=True).backward()
    if rank == 1:
        net.sometimes.weight.grad[3, 3] = float("nan")
    message = ""
    try:
        opt.step()
    except lioncub.NonFiniteError as error:
        message = str(error)
    unchanged = before == (bits_of(net), momentum_of(opt))
    counts = opt.stats().steps, opt.stats().skipped_steps
    net.zero_grad()
    net(*batch_of(rank), use_all=True).backward()
    opt.step()
    opt.check_replicas()
    return message, unchanged, *counts


def overflow_under_a_scaler(rank: int, world_size: int) -> tuple[bool, int]:
    p = torch.ones(100).requires_grad_()
    opt = LionCub([p], lr=0.25)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    weights = torch.linspace(-1, 1, 100) + 0.001 * (rank + 1)
    for step in range(3):
        opt.zero_grad()
        scaler.scale((p * weights).sum()).backward()
        if step == 1 and rank == 0:
            p.grad[7] = float("inf")
        before = p.detach().clone(), opt.state[p]["exp_avg"].clone()
        scaler.step(opt)
        scaler.update()
        if step == 1:
            assert torch.equal(p, before[0])
            assert torch.equal(opt.state[p]["exp_avg"], before[1])
    opt.check_replicas()
    expected = torch.zeros(100)
    for _ in range(2):
        expected = torch.tensor(0.99) * expected + torch.tensor(1 - 0.99) * weights
    assert torch.equal(opt.state[p]["exp_avg"], expected), "the scale must not reach the momentum"
    return torch.equal(p, 1 - 0.5 * torch.sign(weights)), opt.stats().skipped_steps


def stopped_on_one_rank(rank: int, world_size: int) -> tuple[Any, Any, tuple[bool, int]]:
    raised, skipped = (nan_on_one_worker(rank, world_size, policy) for policy in ("raise", "skip"))
    return raised, skipped, overflow_under_a_scaler(rank, world_size)


def test_what_is_not_finite_on_one_rank_stops_the_step_on_all() -> None:
    answers = results_of(stopped_on_one_rank, 3)
    for (message, *rest), skipped, overflow in answers:
        assert message == answers[0][0][0]
        assert "first in parameter sometimes.weight on rank 1" in message
        assert rest == [True, 2, 0]
        assert skipped == ("", True, 3, 1)
        assert overflow == (True, 1)


def disagree(rank: int, world_size: int, how: str, algorithm: str) -> tuple[str, bool]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm, bucket_mb=2e-5)
    assert len(opt.stats().buckets) >= 3
    train(net, opt, rank, range(2))
    before = bits_of(net), momentum_of(opt)
    if rank == 1:
        if how == "lr":
            opt.param_groups[0]["lr"] = 0.5
        elif how == "bad lr":
            opt.param_groups[0]["lr"] = -1.0
        elif how == "step":
            opt.param_groups[0]["step"] = 7
        elif how == "group":
            opt.add_param_group({"params": [("extra", torch.zeros(4).requires_grad_())]})
        elif how == "no betas":
            del opt.param_groups[0]["betas"]
        elif how == "scale":
            opt.grad_scale = torch.tensor(0.0)
        elif how == "state":
            opt.state[net.table.weight] = {}
        elif how == "gradient":
            net.table.weight.grad = net.table.weight.detach().clone().to_sparse()
        before = bits_of(net), b"" if how == "state" else momentum_of(opt)
    try:
        opt.step()
    except (lioncub.WorkersDisagreeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", before[0] == bits_of(net) and (
            how == "state" or before[1] == momentum_of(opt)
        )
    return "no error", False


# what rank 1 does, and what all raise
DIFFERENT = {
    "lr": r"workers disagree on the hyperparameters \(lr of param group 0\) at step 2: ranks 0, 2: .*; rank 1: 0.5",
    "step": r"workers disagree on the step at step .: ranks 0, 2: 2; rank 1: 7",
    "group": r"workers disagree on the bucket layout at step 2: ranks 0, 2: hash",
}
# what rank 1 does, and what it raises itself
WRONG = {
    "bad lr": "ValueError: lr: expected a finite number >= 0, got -1.0",
    "gradient": "TypeError: gradient of table.weight: expected a dense tensor, got layout torch.sparse_coo",
    "no betas": "KeyError: 'betas'",
    "scale": "ValueError: grad_scale: expected a finite scale > 0, got 0.0",
    "state": "RuntimeError: state of parameter table.weight: expected the exp_avg made at construction, got another "
    "object; change it in place or through load_state_dict",
}


def every_disagreement(rank: int, world_size: int) -> dict[tuple[str, str], tuple[str, bool]]:
    different = [(how, algorithm) for how in DIFFERENT for algorithm in ("all_gather", "reduce_scatter")]
    cases = [*different, *((how, "reduce_scatter") for how in WRONG)]
    return {case: disagree(rank, world_size, *case) for case in cases}


def test_what_one_rank_does_otherwise_or_wrongly_is_an_error_on_all() -> None:
    answers = results_of(every_disagreement, 3)
    told = "WorkersDisagreeError: step 2 was taken by no worker, because of an error on rank 1 (reported there)"
    for (how, algorithm), first in answers[0].items():
        said = [answer[how, algorithm] for answer in answers]
        if how in WRONG:
            assert said == [(told, True), (WRONG[how], True), (told, True)]
        else:
            assert said == [first] * 3
            assert first[1], "nothing may have changed"
            assert re.search(DIFFERENT[how], first[0]), first[0]
