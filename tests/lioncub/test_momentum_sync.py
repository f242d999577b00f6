"""Synchronization of momentum: what is due when, bits over real Gloo processes, budgets, drift, checkpoints."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from counting import Counting
from gloo_workers import everyone, on_ranks, same_on_all
from nets import Net, bits_of, groups_of, momentum_of, train
from optimizers import LionCub

from lioncub import MomentumSync, Quantized, SignVote, TernaryVote
from lioncub.collectives import average_
from lioncub.collectives.average import average_bytes, payload_bytes, rank_order_mean
from lioncub.collectives.cost import ring_all_reduce_bytes


def gradient(rank: int, step: int, n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(100 * step + rank))


@on_ranks(2, 3, 4)
def test_every_k_steps_momentum_is_the_mean_in_rank_order(rank: int, world_size: int) -> None:
    """In fp32, against rows of all workers' momentum averaged here in rank order."""
    n, every = 200, 3
    p = torch.zeros(n).requires_grad_()
    opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(every=every))
    rows = torch.zeros(world_size, n)
    for t in range(7):
        grads = torch.stack([gradient(r, t, n) for r in range(world_size)])
        rows = torch.tensor(0.99) * rows + torch.tensor(1 - 0.99) * grads
        is_due = (t + 1) % every == 0
        if is_due:
            total = rows[0]
            for row in rows[1:]:
                total = total + row
            rows = (total / world_size).expand(world_size, n).clone()
        p.grad = grads[rank].clone()
        opt.step()
        assert torch.equal(opt.state[p]["exp_avg"], rows[rank]), f"step {t}"
        assert (opt.stats().sync_bytes_sent > 0) == is_due
        assert same_on_all(momentum_of(opt)) == is_due


# which parameters are synchronized, by their dimensions
SELECTED: dict[str, tuple[MomentumSync, Callable[[str, torch.Tensor], bool]]] = {
    "fp32": (MomentumSync(every=3), lambda name, p: True),
    "bf16": (MomentumSync(every=3, dtype="bf16"), lambda name, p: True),
    "int8": (MomentumSync(every=3, dtype="int8"), lambda name, p: True),
    "patterns": (
        MomentumSync(select=["table*", "*.bias"]),
        lambda name, p: name.startswith("table") or name.endswith(".bias"),
    ),
    "function": (MomentumSync(select=lambda name, p: p.dim() > 1), lambda name, p: p.dim() > 1),
}


@on_ranks(3)
def test_what_is_selected_is_the_same_on_all_ranks(rank: int, world_size: int) -> None:
    found = set()
    for how, (policy, is_selected) in SELECTED.items():
        net = Net(seed=0)
        opt = LionCub(net.named_parameters(), lr=1e-2, momentum_sync=policy)
        train(net, opt, rank, range(3))
        momenta = everyone({name: opt.state[p]["exp_avg"].flatten().tolist() for name, p in net.named_parameters()})
        for name, p in net.named_parameters():
            if any(any(theirs[name]) for theirs in momenta):
                assert all(theirs[name] == momenta[0][name] for theirs in momenta) == is_selected(name, p), (how, name)
        found.add(momentum_of(opt))
    assert len(found) == len(SELECTED)


@on_ranks(2)
def test_staggered_pieces_are_even_and_cover_everything(rank: int, world_size: int) -> None:
    # 10 + 1 + 2 + 16 blocks of 64
    params = [torch.zeros(n).requires_grad_() for n in (640, 64, 65, 1000)]
    opt = LionCub(params, lr=0.1, momentum_sync=MomentumSync(schedule="staggered", every=4), bucket_mb=1e-4)
    equal = []
    for t in range(4):
        for i, p in enumerate(params):
            p.grad = gradient(rank, 10 * t + i, len(p))
        opt.step()
        blocks = everyone([block.tolist() for p in params for block in opt.state[p]["exp_avg"].split(64)])
        equal.append([mine == other for mine, other in zip(*blocks, strict=True)])
    assert [sum(same) for same in equal] == [7, 7, 7, 8]
    assert [sum(column) for column in zip(*equal, strict=True)] == [1] * 29


@on_ranks(3)
def test_bytes_are_those_that_were_told(rank: int, world_size: int) -> None:
    # 3 chunks of 6 blocks of 64 values there and back to two others
    expected = {"fp32": 2 * 2 * 384 * 4, "bf16": 2 * 2 * 384 * 2, "int8": 2 * 2 * 6 * 68}
    for dtype, sync_bytes in expected.items():
        p = torch.zeros(1000).requires_grad_()
        opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(dtype=dtype), algorithm="all_gather")
        p.grad = gradient(rank, 0, 1000)
        opt.step()
        with Counting() as counting:
            opt.step()
        assert sum(counting.sent.values()) == opt.stats().bytes_sent_per_step
        assert opt.stats().sync_bytes_sent == average_bytes(1000, 3, dtype) == sync_bytes
    assert average_bytes(0, 3) == 0


@on_ranks(3)
def test_average_in_every_dtype(rank: int, world_size: int) -> None:
    for dtype, n in (("fp32", 0), ("fp32", 1000), ("bf16", 65), ("int8", 1000)):
        values = gradient(rank, n, n)
        average_(values, dtype=dtype)
        rows = torch.stack([gradient(r, n, n) for r in range(world_size)])
        if dtype == "fp32":
            assert torch.equal(values, rank_order_mean(rows))
        # one rounding on the way there and one of the mean: half a unit of each
        unit = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 1 / 127}[dtype]
        assert n == 0 or (values - rows.mean(dim=0)).abs().max() <= unit * float(rows.abs().max()) + 1e-6
        assert same_on_all(values.tolist())


def test_votes_and_staggered_bytes_are_a_25th_of_fp32() -> None:
    d, workers = 1 << 20, 16
    votes = 2 * (workers - 1) * (d // workers) // 8
    staggered = 2 * (workers - 1) * payload_bytes(d // workers, "int8") / 32
    assert (votes + staggered) / ring_all_reduce_bytes(d, workers) < 1 / 25


@on_ranks(2)
def test_drift_is_the_share_of_the_variance(rank: int, world_size: int) -> None:
    """Three parameters: the same gradients everywhere, opposite ones, and half of each; one without gradient."""
    names = ["same", "opposite", "mixed", "idle"]
    params = [(name, torch.zeros(640).requires_grad_()) for name in names]
    opt = LionCub(params, lr=0.1, drift_every=5)
    for t in range(6):
        assert opt.stats().drift is None
        shared, own = gradient(9, t, 640), gradient(8, t, 640) * (1 - 2 * (rank % 2))
        for (_, p), grad in zip(params, (shared, own, (shared + own) / 2), strict=False):
            p.grad = grad
        opt.step()
    drift = opt.stats().drift
    assert drift is not None
    assert set(drift) == {"same", "opposite", "mixed"}
    assert drift["same"] == 0
    assert drift["opposite"] == pytest.approx(1, rel=1e-6)
    assert 0.3 < drift["mixed"] < 0.7


@on_ranks(2)
def test_auto_synchronizes_what_drifts_most_within_its_budget(rank: int, world_size: int) -> None:
    """Three parameters drift; the budget has room for one of them."""
    params = [(name, torch.zeros(640).requires_grad_()) for name in ("calm", "wild", "wilder")]
    policy = MomentumSync(select="auto", budget=0.4 * 32)
    options = {"momentum_sync": policy, "drift_every": 3, "algorithm": "all_gather", "compression": SignVote()}
    opt = LionCub(params, lr=0.1, **options)
    assert opt.stats().sync_bytes_sent == 0

    def synchronized_after(opt: LionCub, steps: range) -> list[bool]:
        for t in steps:
            shared, own = gradient(9, t, 640), gradient(rank, t, 640)
            for (_, p), share in zip(params, (0.2, 0.5, 1.0), strict=True):
                p.grad = (1 - share) * shared + share * own
            opt.step()
        return [same_on_all(opt.state[p]["exp_avg"].tolist()) for _, p in params]

    # measured in the step of index 3, used from the next on
    assert synchronized_after(opt, range(4)) == [False, False, False]
    assert synchronized_after(opt, range(4, 6)) == [False, False, True]
    # drift is not measured in this step, and sends nothing
    assert opt.stats().sync_bytes_sent == average_bytes(640, 2)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = LionCub(params, lr=0.1, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.stats().drift == opt.stats().drift
    synchronized_after(again, range(6, 7))
    assert again.stats().sync_bytes_sent >= average_bytes(640, 2)


@on_ranks(2)
def test_a_skipped_step_synchronizes_nothing(rank: int, world_size: int) -> None:
    p = torch.zeros(70).requires_grad_()
    opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(), on_nonfinite="skip", compression=TernaryVote())
    p.grad = gradient(rank, 0, 70)
    opt.step()
    before = momentum_of(opt)
    p.grad = torch.full((70,), float("inf") if rank else 1.0)
    opt.step()
    assert opt.stats().skipped_steps == 1
    assert momentum_of(opt) == before


def test_schedules() -> None:
    def due(policy: MomentumSync, steps: int = 20) -> list[int]:
        return [t for t in range(steps) if policy.piece(t)]

    assert due(MomentumSync(every=6)) == [5, 11, 17]
    assert [MomentumSync(every=3, schedule="staggered").piece(t) for t in range(4)] == [(0, 3), (1, 3), (2, 3), (0, 3)]


def test_one_worker_alone_sends_nothing() -> None:
    ends = []
    for policy in (None, MomentumSync(dtype="int8")):
        net = Net(seed=1)
        opt = LionCub(groups_of(net), lr=1e-2, momentum_sync=policy, compression=Quantized(), drift_every=2)
        train(net, opt, 0, range(4))
        assert opt.stats().bytes_sent_per_step == 0
        assert opt.stats().drift is None
        ends.append(bits_of(net))
    assert ends[0] == ends[1]
