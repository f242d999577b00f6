"""Synchronization of momentum: what is due when, bits over real Gloo processes, budgets, drift, checkpoints."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from counting import Counting
from gloo_workers import results_of, together
from nets import Net, bits_of, groups_of, momentum_of, train
from optimizers import LionCub

from lioncub import MomentumSync, Quantized, SignVote, TernaryVote, WorkersDisagreeError
from lioncub.collectives import average_
from lioncub.collectives.average import average_bytes, payload_bytes, rank_order_mean
from lioncub.collectives.cost import ring_all_reduce_bytes


def gradient(rank: int, step: int, n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(100 * step + rank))


def momentum_by_the_rules(rank: int, world_size: int) -> list[bytes]:
    """Every k-th step in fp32, against rows of all workers' momentum averaged here in rank order."""
    n, every = 200, 3
    p = torch.zeros(n).requires_grad_()
    opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(every=every))
    rows = torch.zeros(world_size, n)
    seen = []
    for t in range(7):
        grads = torch.stack([gradient(r, t, n) for r in range(world_size)])
        rows = torch.tensor(0.99) * rows + torch.tensor(1 - 0.99) * grads
        if (t + 1) % every == 0:
            total = rows[0]
            for row in rows[1:]:
                total = total + row
            rows = (total / world_size).expand(world_size, n).clone()
        p.grad = grads[rank].clone()
        opt.step()
        assert torch.equal(opt.state[p]["exp_avg"], rows[rank]), f"step {t}"
        assert (opt.stats().sync_bytes_sent > 0) == ((t + 1) % every == 0)
        seen.append(momentum_of(opt))
    return seen


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_k_steps_momentum_is_the_mean_in_rank_order(world_size: int) -> None:
    answers = results_of(momentum_by_the_rules, world_size)
    for t in range(7):
        same = len({answer[t] for answer in answers}) == 1
        assert same == ((t + 1) % 3 == 0)


POLICIES = [
    MomentumSync(),
    MomentumSync(dtype="bf16"),
    MomentumSync(dtype="int8", every=2),
    MomentumSync(schedule="staggered", every=4, dtype="int8"),
    MomentumSync(select=["table*", "*.bias"]),
    MomentumSync(select=lambda name, p: p.dim() > 1, every=2),
    MomentumSync(select="auto", budget=8.0, dtype="int8"),
    MomentumSync(select="auto", budget=2.0, every=4, schedule="staggered"),
]


def train_every_policy(rank: int, world_size: int) -> list[list[tuple[bytes, bytes]]]:
    ends = []
    for policy in POLICIES:
        ways = []
        for options in (
            {"algorithm": "all_gather"},
            {"algorithm": "reduce_scatter", "bucket_mb": 1e-5},
            {"algorithm": "reduce_scatter", "bucket_mb": 1e-5, "overlap": True},
        ):
            net = Net(seed=rank)
            opt = LionCub(groups_of(net), lr=1e-2, momentum_sync=policy, drift_every=4, **options)
            train(net, opt, rank, range(11))
            opt.check_replicas()
            ways.append((bits_of(net), momentum_of(opt)))
        ends.append(ways)
    return ends


def test_results_depend_neither_on_buckets_nor_algorithm_nor_overlap(of_three: Answers) -> None:
    answers = of_three["train_every_policy"]
    for i, policy in enumerate(POLICIES):
        for answer in answers:
            assert len(set(answer[i])) == 1, policy
        assert len({answer[i][0][0] for answer in answers}) == 1, policy
    # every policy did something of its own
    assert len({answers[0][i][0] for i in range(len(POLICIES))}) == len(POLICIES)


def momentum_after_whole_periods(rank: int, world_size: int) -> dict[str, bytes]:
    found = {}
    for dtype in ("fp32", "bf16", "int8"):
        net = Net(seed=0)
        opt = LionCub(groups_of(net), lr=1e-2, momentum_sync=MomentumSync(dtype=dtype, every=5))
        train(net, opt, rank, range(5))
        found[dtype] = momentum_of(opt)
    return found


def test_synchronized_momentum_is_the_same_on_all_workers_in_every_dtype(of_three: Answers) -> None:
    answers = of_three["momentum_after_whole_periods"]
    assert all(answer == answers[0] for answer in answers)
    assert len(set(answers[0].values())) == 3


def staggered_pieces(rank: int, world_size: int) -> list[list[bool]]:
    """Which 64-element blocks are equal on all workers after each step."""
    sizes = [640, 64, 65, 1000]
    params = [torch.zeros(n).requires_grad_() for n in sizes]
    opt = LionCub(params, lr=0.1, momentum_sync=MomentumSync(schedule="staggered", every=4), bucket_mb=1e-4)
    equal = []
    for t in range(4):
        for i, p in enumerate(params):
            p.grad = gradient(rank, 10 * t + i, len(p))
        opt.step()
        blocks = [block for p in params for block in opt.state[p]["exp_avg"].split(64)]
        same = []
        for block in blocks:
            first = block.clone()
            torch.distributed.broadcast(first, src=0)
            flag = torch.tensor([int(torch.equal(first, block))])
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
            same.append(bool(flag))
        equal.append(same)
    return equal


def test_staggered_pieces_are_even_and_cover_everything(of_two: Answers) -> None:
    first, second = of_two["staggered_pieces"]
    assert first == second
    # 10 + 1 + 2 + 16 blocks of 64
    assert [sum(same) for same in first] == [7, 7, 7, 8]
    assert [sum(column) for column in zip(*first, strict=True)] == [1] * 29


def bytes_of_a_step(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    counting = Counting()
    found = []
    for dtype in ("fp32", "bf16", "int8"):
        p = torch.zeros(1000).requires_grad_()
        opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(dtype=dtype), algorithm="all_gather")
        p.grad = gradient(rank, 0, 1000)
        opt.step()
        p.grad = gradient(rank, 1, 1000)
        counting.sent.clear()
        opt.step()
        found.append((sum(counting.sent.values()), opt.stats().bytes_sent_per_step, opt.stats().sync_bytes_sent))
    return found


def test_bytes_are_those_that_were_told(of_three: Answers) -> None:
    for answer in of_three["bytes_of_a_step"]:
        for sent, told, _ in answer:
            assert sent == told
        # 3 chunks of 6 blocks of 64 values there and back to two others
        assert [sync for *_, sync in answer] == [2 * 2 * 384 * 4, 2 * 2 * 384 * 2, 2 * 2 * 6 * 68]
    assert average_bytes(1000, 3, "int8") == 2 * 2 * 6 * 68
    assert average_bytes(0, 3) == 0


def test_votes_and_staggered_bytes_are_a_25th_of_fp32() -> None:
    d, workers = 1 << 20, 16
    votes = 2 * (workers - 1) * (d // workers) // 8
    staggered = 2 * (workers - 1) * payload_bytes(d // workers, "int8") / 32
    assert (votes + staggered) / ring_all_reduce_bytes(d, workers) < 1 / 25


def means_of(rank: int, world_size: int) -> list[bytes]:
    found = []
    for dtype, n in (("fp32", 0), ("fp32", 1000), ("bf16", 65), ("int8", 1000)):
        values = gradient(rank, n, n)
        average_(values, dtype=dtype)
        everyone = torch.stack([gradient(r, n, n) for r in range(world_size)])
        if dtype == "fp32":
            assert torch.equal(values, rank_order_mean(everyone))
        # one rounding on the way there and one of the mean: half a unit of each
        unit = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 1 / 127}[dtype]
        largest = float(everyone.abs().max()) if n else 0.0
        assert (values - everyone.mean(dim=0)).abs().max() <= unit * largest + 1e-6 if n else True
        found.append(values.numpy().tobytes())
    return found


def test_average_in_every_dtype(of_three: Answers) -> None:
    answers = of_three["means_of"]
    assert all(answer == answers[0] for answer in answers)
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got 'fp8'"):
        average_(torch.zeros(3), dtype="fp8")


def drift_of(rank: int, world_size: int) -> list[dict[str, float] | None]:
    """Three parameters: the same gradients everywhere, opposite ones, and half of each."""
    names = ["same", "opposite", "mixed", "idle"]
    params = [(name, torch.zeros(640).requires_grad_()) for name in names]
    opt = LionCub(params, lr=0.1, drift_every=5)
    found = [opt.stats().drift]
    for t in range(6):
        shared, own = gradient(9, t, 640), gradient(8, t, 640) * (1 - 2 * (rank % 2))
        for (_, p), grad in zip(params, (shared, own, (shared + own) / 2), strict=False):
            p.grad = grad
        opt.step()
        found.append(opt.stats().drift)
    return found


def test_drift_is_the_share_of_the_variance(of_two: Answers) -> None:
    for answer in of_two["drift_of"]:
        assert answer[:6] == [None] * 6
        drift = answer[6]
        assert drift is not None
        assert set(drift) == {"same", "opposite", "mixed"}
        assert drift["same"] == 0
        assert drift["opposite"] == pytest.approx(1, rel=1e-6)
        assert 0.3 < drift["mixed"] < 0.7


def chosen_by_drift(rank: int, world_size: int) -> tuple[list[bool], list[bool], int, int]:
    """Three parameters drift; the budget has room for one of them."""
    params = [(name, torch.zeros(640).requires_grad_()) for name in ("calm", "wild", "wilder")]
    policy = MomentumSync(select="auto", budget=0.4 * 32)
    options = {"momentum_sync": policy, "drift_every": 3, "algorithm": "all_gather", "compression": SignVote()}
    opt = LionCub(params, lr=0.1, **options)
    assert opt.stats().sync_bytes_sent == 0

    def walk(opt: LionCub, steps: range) -> list[bool]:
        for t in steps:
            shared, own = gradient(9, t, 640), gradient(rank, t, 640)
            for (_, p), share in zip(params, (0.2, 0.5, 1.0), strict=True):
                p.grad = (1 - share) * shared + share * own
            opt.step()
        same = []
        for _, p in params:
            mean = opt.state[p]["exp_avg"].clone()
            torch.distributed.broadcast(mean, src=0)
            flag = torch.tensor([int(torch.equal(mean, opt.state[p]["exp_avg"]))])
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
            same.append(bool(flag))
        return same

    before = walk(opt, range(4))
    after = walk(opt, range(4, 6))
    sent = opt.stats().sync_bytes_sent
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again = LionCub(params, lr=0.1, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert again.stats().drift == opt.stats().drift
    for _, p in params:
        p.grad = gradient(rank, 6, 640)
    again.step()
    return before, after, sent, again.stats().sync_bytes_sent


def test_auto_synchronizes_what_drifts_most_within_its_budget(of_two: Answers) -> None:
    for before, after, sent, resumed in of_two["chosen_by_drift"]:
        # measured in the step of index 3, used from the next on
        assert before == [False, False, False]
        assert after == [False, False, True]
        assert average_bytes(640, 2) <= sent <= resumed


def test_bytes_of_drift_are_counted_in_its_steps_alone(of_two: Answers) -> None:
    assert [sent for _, _, sent, _ in of_two["chosen_by_drift"]] == [average_bytes(640, 2)] * 2


def policies_differ(rank: int, world_size: int) -> str:
    with pytest.raises(WorkersDisagreeError) as caught:
        LionCub([torch.zeros(8).requires_grad_()], momentum_sync=MomentumSync(every=1 + rank))
    return str(caught.value)


def test_workers_with_different_policies_all_raise(of_two: Answers) -> None:
    assert all("workers disagree on momentum_sync" in said for said in of_two["policies_differ"])


def bad_step(rank: int, world_size: int) -> bool:
    p = torch.zeros(70).requires_grad_()
    opt = LionCub([p], lr=0.1, momentum_sync=MomentumSync(), on_nonfinite="skip", compression=TernaryVote())
    p.grad = gradient(rank, 0, 70)
    opt.step()
    before = momentum_of(opt)
    p.grad = torch.full((70,), float("inf") if rank else 1.0)
    opt.step()
    assert opt.stats().skipped_steps == 1
    return momentum_of(opt) == before


def test_a_skipped_step_synchronizes_nothing(of_two: Answers) -> None:
    assert of_two["bad_step"] == [True, True]


def test_schedules() -> None:
    def due(policy: MomentumSync, steps: int = 20) -> list[int]:
        return [t for t in range(steps) if policy.piece(t)]

    assert due(MomentumSync(every=6)) == [5, 11, 17]
    assert [MomentumSync(every=3, schedule="staggered").piece(t) for t in range(4)] == [(0, 3), (1, 3), (2, 3), (0, 3)]


def test_impossible_arguments_are_named() -> None:
    p = torch.zeros(8).requires_grad_()
    for wrong, match in (
        ({"every": 0}, "every: expected a number of steps >= 1, got 0"),
        ({"schedule": "growing"}, r"schedule: expected one of \('fixed', 'staggered'\), got 'growing'"),
        ({"dtype": "fp16"}, "dtype: expected one of .*, got 'fp16'"),
        ({"select": "head"}, "select: expected 'auto', a list of patterns or a function, got 'head'"),
        ({"select": "auto"}, "budget: expected a fraction > 0 with select='auto', got None"),
        ({"budget": 0.5}, "budget: expected it with select='auto' only, got 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            MomentumSync(**wrong)
    with pytest.raises(TypeError, match=r"momentum_sync: expected None or MomentumSync\(...\), got int 4"):
        LionCub([p], momentum_sync=4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="select: expected it to choose at least one parameter"):
        LionCub([p], momentum_sync=MomentumSync(select=["head.*"]))
    with pytest.raises(ValueError, match="drift_every: expected a number of steps >= 1, got 0"):
        LionCub([p], drift_every=0)


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


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def of_two() -> Answers:
    return together(2, chosen_by_drift, staggered_pieces, drift_of, policies_differ, bad_step)


@pytest.fixture(scope="module")
def of_three() -> Answers:
    return together(3, train_every_policy, momentum_after_whole_periods, means_of, bytes_of_a_step)
