"""The end of optimizers, groups and processes: nothing is left behind, nobody waits for ever."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Died, on_ranks, outcomes_of, said_by, same_on_all
from nets import Net, all_bits, batch_of, bits_of, give_gradients, train
from optimizers import LionCub
from torch import Tensor

import lioncub
from lioncub import MomentumSync
from lioncub.collectives import algorithms
from lioncub.simulate import Workers

SMALL = 2e-5


def ones(*sizes: int) -> list[Tensor]:
    return [torch.ones(n).requires_grad_() for n in sizes]


def test_one_worker_can_be_closed() -> None:
    params = ones(3)
    opt = LionCub(params, overlap=True)
    give_gradients(params)
    opt.step()
    opt.close()
    opt.close()
    assert opt.state_dict()["param_groups"][0]["step"] == 1
    opt.zero_grad()
    calls: list[Callable[[], Any]] = [
        opt.step,
        opt.propose,
        opt.stats,
        opt.explain,
        opt.verify,
        opt.sync_momentum,
        opt.check_replicas,
        lambda: opt.load_state_dict(opt.state_dict()),
        lambda: opt.add_param_group({"params": ones(2)}),
    ]
    for call in calls:
        assert "RuntimeError: " in said_by(call)
        assert "expected an open optimizer, got one after close()" in said_by(call)


def test_nothing_keeps_an_optimizer_alive() -> None:
    gc.collect()
    gc.disable()
    threads = threading.active_count()
    options: dict[str, Any] = {"momentum_sync": MomentumSync(), "drift_every": 2}
    try:
        with Workers(2) as workers:
            opts = workers.run(lambda rank, group: LionCub(ones(3, 2000), process_group=group, **options))
            give_gradients([p for opt in opts for p in opt.param_groups[0]["params"]])
            workers.run(lambda rank, _, opts=opts: opts[rank].step())  # type: ignore[misc]
            seen = weakref.ref(opts[0])
            del opts
        alone = weakref.ref(LionCub(ones(3)))
        assert seen() is None
        assert alone() is None
    finally:
        gc.enable()
    assert threading.active_count() == threads


def resources(params: list[Tensor]) -> tuple[int, int, int]:
    """Descriptors, threads and hooks."""
    hooks = sum(len(p._post_accumulate_grad_hooks or {}) for p in params)  # type: ignore[attr-defined]
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), hooks


def settle(params: list[Tensor]) -> None:
    """Wait until nothing has changed for a second: the backend closes descriptors later than it is told to."""
    found, since = resources(params), time.monotonic()
    while time.monotonic() < since + 1:
        time.sleep(0.05)
        if resources(params) != found:
            found, since = resources(params), time.monotonic()
    dist.barrier()


@on_ranks(1, 2, 4, alone=True)
def test_threads_descriptors_and_hooks_end_with_the_optimizer(rank: int, world_size: int) -> None:
    if world_size == 4:
        # which has two levels
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    params = ones(9, 9, 9)

    def use(*, close: bool) -> None:
        options: dict[str, Any] = {"algorithm": "hierarchical"} if world_size == 4 else {}
        opt = LionCub(params, lr=0.1, overlap=True, bucket_mb=1e-5, momentum_sync=MomentumSync(), **options)
        for _ in range(3):
            opt.zero_grad()
            torch.stack(params).sum().backward()
            opt.step()
        if close:
            opt.close()
            opt.close()
            assert "after close()" in said_by(opt.step)

    # what is made once, and kept
    use(close=True)
    gc.collect()
    settle(params)
    for close in (True, False):
        before = resources(params)
        for _ in range(4):
            use(close=close)
            assert resources(params)[2] == 0, "hooks end at once"
        gc.collect()
        deadline = time.monotonic() + 10
        # threads end on their own time
        while resources(params) != before and time.monotonic() < deadline:
            time.sleep(0.05)
        dist.barrier()
        assert resources(params) == before
    os.environ.pop("LOCAL_WORLD_SIZE", None)


@on_ranks(2, alone=True)
def test_an_optimizer_may_outlive_its_groups(rank: int, world_size: int) -> None:
    opts = [LionCub(ones(9), overlap=True) for _ in range(2)]
    dist.destroy_process_group()
    opts[0].close()
    del opts


@on_ranks(2, alone=True)
def test_no_thread_of_the_group_outlives_it(rank: int, world_size: int) -> None:
    params = ones(9)
    opt = LionCub(params, lr=0.5)
    give_gradients(params)
    opt.step()
    opt.check_replicas()
    dist.destroy_process_group()
    threads = [thread.read_text() for thread in Path("/proc/self/task").glob("*/comm")]
    assert threads
    assert not any("gloo" in thread for thread in threads)


@on_ranks(2)
def test_closing_one_optimizer_leaves_others_and_the_users_groups_alone(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    first, second = (LionCub(net.named_parameters(), lr=1e-2, overlap=True, bucket_mb=SMALL) for _ in range(2))
    for step in range(4):
        second.zero_grad()
        net(*batch_of(10 * step + rank), use_all=True).backward()
        second.step()
        if step == 1:
            first.close()
    lioncub.broadcast_module(net)
    assert same_on_all(bits_of(net))


def killed_in_mid_step(rank: int, world_size: int, algorithm: str, moment: str) -> tuple[str, float, bool]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm)
    train(net, opt, rank, range(2))
    before = all_bits(opt)
    if rank == 1 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rank == 1:
        # what the second phase starts with
        algorithms._reply = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    said = said_by(opt.step)
    return said, time.monotonic() - started, before == all_bits(opt)


@pytest.mark.parametrize(
    ("algorithm", "moment"),
    [("all_gather", "before"), ("reduce_scatter", "before"), ("reduce_scatter", "between phases")],
)
def test_a_dead_worker_makes_the_others_fail_within_the_timeout(algorithm: str, moment: str) -> None:
    timeout = 10.0
    answers = outcomes_of(killed_in_mid_step, 3, algorithm, moment, timeout=timeout)
    assert isinstance(answers[1], Died)
    for said, seconds, unchanged in (answers[0], answers[2]):
        if algorithm == "reduce_scatter":
            # also by a rank that lost one which ended for having lost it
            assert said.startswith("PeerLostError: rank 1 of the process group was lost: "), said
        assert said != "no error"
        assert seconds < 2 * timeout
        assert unchanged
