"""Other sets of ranks, over real Gloo processes: state stays, steps are those of a fresh optimizer, nothing is left."""

from __future__ import annotations

import copy
import gc
import threading
import time
from operator import le
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import everyone, on_ranks, said_by
from nets import Net, all_bits, batch_of, bits_of, groups_of, momentum_of
from optimizers import Lion, LionCub

from lioncub import MomentumSync, Quantized, SignVote

OPTIONS: dict[str, dict[str, Any]] = {
    "signs": {"compression": SignVote(), "algorithm": "reduce_scatter"},
    "default": {"algorithm": "all_gather", "master_weights": True},
    "momentum": {"momentum_sync": MomentumSync(every=2, schedule="staggered"), "algorithm": "reduce_scatter"},
    "levels": {"compression": Quantized(stochastic=True, share_scales_every=2), "drift_every": 2, "algorithm": "auto"},
    "overlap": {"overlap": True, "momentum_sync": MomentumSync(every=2), "algorithm": "reduce_scatter"},
}
Group = dist.ProcessGroup | None


def build(net: Net, group: Group, name: str, **changes: Any) -> LionCub:
    return LionCub(groups_of(net), lr=1e-2, bucket_mb=2e-5, process_group=group, **OPTIONS[name] | changes)


def train(net: Net, opt: LionCub | Lion, rank: int, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        net(*batch_of(100 * step + rank), use_all=rank != 1).backward()
        opt.step()


def assert_steps_of_a_fresh_one(net: Net, opt: LionCub, group: Group, name: str, rank: int, steps: range) -> None:
    """Train on with a rebound optimizer and with a new one that has its state, bit for bit the same."""
    twin = copy.deepcopy(net)
    # the bits are the same without overlap
    fresh = build(twin, group, name, overlap=False)
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert all_bits(opt) == all_bits(fresh)
    for step in steps:
        train(net, opt, rank, range(step, step + 1))
        train(twin, fresh, rank, range(step, step + 1))
        assert all_bits(opt) == all_bits(fresh), f"{name}, step {step}"
    mine, theirs = opt.stats(), fresh.stats()
    assert mine.steps == theirs.steps == steps.stop
    assert sum(bucket.bytes_sent for bucket in mine.buckets) == sum(bucket.bytes_sent for bucket in theirs.buckets)
    opt.check_replicas()
    fresh.close()


@on_ranks(4)
def test_from_four_ranks_to_three_and_back(rank: int, world_size: int) -> None:
    three = dist.new_group([0, 1, 2])
    for name in OPTIONS:
        net = Net(seed=0)
        opt = build(net, None, name)
        train(net, opt, rank, range(3))
        if rank < 3:
            before = all_bits(opt)
            opt.rebind(three)
            assert before == all_bits(opt)
            assert_steps_of_a_fresh_one(net, opt, three, name, rank, range(3, 6))
        # the fourth comes back with the parameters of the others
        for p in net.parameters():
            dist.broadcast(p.detach(), src=0)
        state = everyone(opt.state_dict())[0]
        if rank == 3:
            with pytest.warns(UserWarning, match="got the momentum of rank 0 of"):
                opt.load_state_dict(state)
        before = all_bits(opt)
        opt.rebind(None)
        assert before == all_bits(opt)
        assert_steps_of_a_fresh_one(net, opt, None, name, rank, range(6, 9))
        opt.close()


@on_ranks(2)
def test_to_one_rank_and_back(rank: int, world_size: int) -> None:
    alone = dist.new_group([rank], use_local_synchronization=True)
    for name in ("signs", "default", "overlap"):
        net = Net(seed=0)
        opt = build(net, None, name)
        train(net, opt, rank, range(3))
        opt.rebind(alone)
        plain = copy.deepcopy(net)
        lion = Lion(groups_of(plain), lr=1e-2, master_weights=OPTIONS[name].get("master_weights", False))
        saved = copy.deepcopy(opt.state_dict())
        for state in saved["state"].values():
            state.pop("drift", None)
        lion.load_state_dict(saved)
        train(net, opt, rank, range(3, 5))
        train(plain, lion, rank, range(3, 5))
        assert bits_of(net) == bits_of(plain)
        assert opt.stats().bytes_sent_per_step == 0
        # every rank has gone its own way
        # a scale that is no longer shared is the only thing that may change
        before = bits_of(net), momentum_of(opt)
        assert " differs between workers: rank 0: hash " in said_by(lambda opt=opt: opt.rebind(None))  # type: ignore[misc]
        assert before == (bits_of(net), momentum_of(opt))
        for p in net.parameters():
            dist.broadcast(p.detach(), src=0)
            if "master" in opt.state[p]:
                dist.broadcast(opt.state[p]["master"], src=0)
        opt.rebind(None)
        opt.zero_grad()
        assert_steps_of_a_fresh_one(net, opt, None, name, rank, range(5, 8))
        opt.close()


@on_ranks(2)
def test_what_cannot_be_rebound_changes_nothing_and_goes_on_with_the_old_ranks(rank: int, world_size: int) -> None:
    net, twin = Net(seed=0), Net(seed=0)
    opt, other = build(net, None, "signs"), build(twin, None, "signs")
    said = []
    for step in range(3):
        train(net, opt, rank, range(step, step + 1))
        train(twin, other, rank, range(step, step + 1))
        # a step is pending on all, then the counters differ, then a step is pending on rank 1 alone
        pending = opt.propose() if step != 1 else None
        if step == 1:
            opt.param_groups[0]["step"] += rank
        if step == 2 and rank == 0:
            pending = pending.discard() if pending else None
        said.append(said_by(lambda: opt.rebind(None)))
        if pending is not None:
            pending.discard()
        for group in (*opt.param_groups, *other.param_groups):
            group["step"] = step + 1
        assert all_bits(opt) == all_bits(other), step
    train(net, opt, rank, range(3, 4))
    train(twin, other, rank, range(3, 4))
    assert all_bits(opt) == all_bits(other)
    own = "RuntimeError: rebind: expected no step between propose and commit, got one"
    told = f"WorkersDisagreeError: no worker went on, because of an error on rank 1: {own}"
    differ = "WorkersDisagreeError: workers disagree on the step: rank 0: 2; rank 1: 3"
    assert said == [own, differ, own if rank else told]


@on_ranks(2)
def test_ranks_with_other_parameters_take_no_step(rank: int, world_size: int) -> None:
    p = torch.zeros(9).requires_grad_()
    opt = LionCub([p], lr=0.5)
    p.grad = torch.ones(9)
    opt.step()
    p.data[3] += rank
    assert said_by(lambda: opt.rebind(None)).startswith("WorkersDisagreeError")
    assert " differs between workers: rank 0: hash " in said_by(opt.step)


def resources() -> tuple[int, int, int]:
    """Threads of this process, those that carry messages, and open descriptors."""
    gc.collect()
    carriers = sum(thread.name == "lioncub-comm" for thread in threading.enumerate())
    return len(list(Path("/proc/self/task").iterdir())), carriers, len(list(Path("/proc/self/fd").iterdir()))


def settles(threads: int, carriers: int, descriptors: int) -> bool:
    """Whether there are soon no more than these; the backend's threads end a little later than it is told to."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if all(map(le, resources(), (threads, carriers, descriptors))):
            return True
        time.sleep(0.05)
    return False


@on_ranks(2, alone=True)
def test_nothing_is_left_of_the_old_ranks(rank: int, world_size: int) -> None:
    alone = dist.new_group([rank], use_local_synchronization=True)
    net = Net(seed=0)
    opt = build(net, None, "overlap")
    train(net, opt, rank, range(2))
    dist.barrier()
    time.sleep(0.2)
    threads, carriers, descriptors = resources()
    assert carriers == 1
    for step in range(2, 5):
        opt.rebind(None)
        train(net, opt, rank, range(step, step + 1))
        assert settles(threads, 1, descriptors), (threads, descriptors, resources())
        dist.barrier()
    opt.rebind(alone)
    assert settles(threads - 1, 0, descriptors - 1), (threads, descriptors, resources())
    opt.close()


@on_ranks(3)
def test_a_rank_comes_back_to_a_group_that_was_added_without_it(rank: int, world_size: int) -> None:
    two = dist.new_group([0, 1])
    params = [torch.ones(9).requires_grad_(), torch.ones(70).requires_grad_()]
    opt = LionCub(params[:1], lr=1e-2)

    def step() -> None:
        for p in params:
            p.grad = torch.full_like(p, float(rank + 1))
        opt.step()

    step()
    if rank < 2:
        opt.rebind(two)
        opt.add_param_group({"params": params[1:]})
        step()
    states = everyone((opt.state_dict(), [p.detach() for p in params]))
    if rank == 2:
        opt.add_param_group({"params": params[1:]})
        state, theirs = states[0]
        with torch.no_grad():
            for p, other in zip(params, theirs, strict=True):
                p.copy_(other)
        with pytest.warns(UserWarning, match="got the momentum of rank 0 of"):
            opt.load_state_dict(state)
    opt.rebind(None)
    step()
    opt.check_replicas()
    assert opt.stats().steps == 3
