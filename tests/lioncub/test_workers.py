"""LionCub over real Gloo processes: equal replicas by every algorithm, the vote by its rule, Lion on equal data."""

from __future__ import annotations

import warnings

import torch
from gloo_workers import on_ranks, same_on_all
from nets import Net, bits_of, groups_of, train
from optimizers import Lion, LionCub

from lioncub import SignVote

# that results depend on neither is also in tests/golden; by "auto" the first steps try plans
WAYS = (("all_gather", 1.0, 10), ("auto", 1e-5, 50))


@on_ranks(2, 3, 4, 5)
def test_replicas_stay_equal_and_do_not_depend_on_buckets_or_algorithm(rank: int, world_size: int) -> None:
    ends = []
    for algorithm, bucket_mb, steps in WAYS:
        net = Net(seed=rank)
        opt = LionCub(groups_of(net), lr=1e-2, algorithm=algorithm, bucket_mb=bucket_mb, compression=SignVote())
        before = [p.detach().clone() for p in net.never.parameters()]
        train(net, opt, rank, range(10))
        ends.append(bits_of(net))
        train(net, opt, rank, range(10, steps))
        opt.check_replicas()
        assert all(torch.equal(a, b) for a, b in zip(net.never.parameters(), before, strict=True))
        stats = opt.stats()
        assert (stats.steps, stats.skipped_steps) == (steps, 0)
        assert stats.bytes_sent_per_step > sum(bucket.bytes_sent for bucket in stats.buckets)
        assert (stats.tied == 0) == (world_size % 2 == 1)
        assert 0 < stats.unanimous < 1
        if algorithm != "auto":
            assert {bucket.algorithm for bucket in stats.buckets} == {algorithm}
    assert ends == [ends[0]] * len(WAYS)
    assert same_on_all(ends[0])


@on_ranks(2, 3, 4, 5)
def test_steps_follow_the_rule(rank: int, world_size: int) -> None:
    """Against the rule itself, in plain torch, with zeros, a missing gradient and ties."""
    p = torch.zeros(130).requires_grad_()
    idle = torch.ones(9).requires_grad_()
    opt = LionCub([p, idle], lr=0.5, weight_decay=0.1, compression=SignVote())
    x, m = torch.zeros(130), torch.zeros(world_size, 130)
    for t in range(6):
        generators = [torch.Generator().manual_seed(10 * t + r) for r in range(world_size)]
        grads = torch.stack([torch.randint(-1, 2, (130,), generator=g).float() for g in generators])
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


@on_ranks(1, 2, 3, 4, 5)
def test_steps_are_those_of_lion_with_the_same_data(rank: int, world_size: int) -> None:
    for algorithm in ("all_gather", "reduce_scatter"):
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
            with warnings.catch_warnings():
                # the same data on all ranks is what this is about
                warnings.filterwarnings("ignore", message="all votes of the last 5 steps were unanimous")
                cub.step()
            lion.step()
        for p, q in zip(mine, plain, strict=True):
            assert torch.equal(p, q)
            assert torch.equal(cub.state[p]["exp_avg"], lion.state[q]["exp_avg"])
        assert (cub.stats().steps, cub.stats().unanimous, cub.stats().tied) == (20, 1, 0)
