"""Replicas under torchft's manager, in real processes: some are killed and come back, and all stay bit-identical."""

from __future__ import annotations

import warnings
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchft
from elastic import KILLED_IN, Rank, run
from optimizers import Lion, LionCub
from torchft.coordination import LighthouseServer

from lioncub.integrations.torchft import FaultTolerant


def assert_bit_identical(everyone: list[Rank]) -> None:
    """After every step that was taken, all ranks of one place have the same parameters."""
    found: dict[tuple[int, int], set[str]] = {}
    for rank in everyone:
        assert rank.said in ("done", ""), rank.said
        for step in rank.taken:
            found.setdefault((rank.place, step.number), set()).add(step.bits)
    assert {key: len(bits) for key, bits in found.items() if len(bits) > 1} == {}


def assert_came_back(everyone: list[Rank], replicas: int, size: int) -> str:
    """The survivors have one process each and took every step, the killed replica came back; returns times."""
    lives = {i: [rank for rank in everyone if rank.replica == i] for i in range(replicas)}
    killed = replicas - 1
    assert [len(lives[i]) for i in range(replicas)] == [size] * killed + [2 * size]
    survivors = [rank for rank in everyone if rank.replica != killed]
    for rank in survivors:
        numbers = [step.number for step in rank.taken]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "a survivor takes every step, once"
        # and the one in which it lost a rank at another try, with those that were left
        assert [step.workers for step in rank.taken if step.number == KILLED_IN] == [killed]
    again = [rank for rank in lives[killed] if rank.said]
    assert len(again) == size
    for rank in again:
        assert rank.taken[0].number > KILLED_IN
        assert {step.workers for step in rank.taken} == {replicas}
    last = {rank.taken[-1].number for rank in (*survivors, *again)}
    assert len(last) == 1
    pause = max(b.at - a.at for rank in survivors for a, b in pairwise(rank.taken) if b.number == KILLED_IN)
    rejoin = max(rank.taken[0].at - rank.started for rank in again)
    return f"pause of {pause:.2f} s, rejoined {rejoin:.2f} s after its start"


@pytest.mark.parametrize(
    ("how", "options"),
    [
        ("between steps", {"use_async_quorum": False}),
        ("after its votes left", {"share_scales_every": 2}),
        ("after answering one peer", {"algorithm": "all_gather"}),
    ],
)
def test_a_killed_replica_comes_back(how: str, options: dict[str, Any]) -> None:
    everyone = run(3, ends=how, **options)
    assert_bit_identical(everyone)
    print(f"killed {how}: {assert_came_back(everyone, 3, 1)}")
    for rank in everyone:
        # nobody took the step in which the rank was lost
        tries = [step for step in rank.steps if step.number == KILLED_IN and rank.replica < 2]
        tried = [step.is_taken for step in tries]
        # between steps, the lighthouse may know already that it is gone
        possible = [[False, True], [True]] if how == "between steps" else [[False, True]]
        assert rank.replica == 2 or tried in possible, how


def test_replicas_of_several_ranks() -> None:
    everyone = run(2, size=2, ends="after its votes left")
    assert_bit_identical(everyone)
    print(f"sharded replicas: {assert_came_back(everyone, 2, 2)}")


def test_a_replica_that_lost_the_last_message_heals() -> None:
    """The others have committed: it is a step behind, and takes their parameters and momentum."""
    everyone = run(3, ends="after the last message")
    assert_bit_identical(everyone)
    assert len(everyone) == 3
    for rank in everyone:
        numbers = [step.number for step in rank.taken]
        missed = [KILLED_IN] if rank.replica == 2 else []
        assert numbers == [n for n in range(numbers[0], numbers[-1] + 1) if n not in missed]


@pytest.fixture
def manager() -> Any:
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, quorum_tick_ms=10)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    made = []

    def make(**changes: Any) -> Any:
        options: dict[str, Any] = {
            "pg": torchft.ProcessGroupGloo(timeout=timedelta(seconds=20)),
            "load_state_dict": None,
            "state_dict": None,
            "min_replica_size": 1,
            "store_addr": "localhost",
            "store_port": store.port,
            "rank": 0,
            "world_size": 1,
            "lighthouse_addr": lighthouse.address(),
        }
        made.append(torchft.Manager(**options | changes))
        return made[-1]

    with warnings.catch_warnings():
        # torchft's loggers call deprecated methods
        warnings.simplefilter("ignore", DeprecationWarning)
        yield make
        for one in made:
            one.shutdown(wait=False)
    lighthouse.shutdown()


def test_one_replica_alone_takes_plain_lion_steps(manager: Any) -> None:
    p, q = (torch.linspace(-1, 1, 9).requires_grad_() for _ in range(2))
    opt, lion = FaultTolerant(LionCub([p], lr=0.1), manager()), Lion([q], lr=0.1)
    assert not opt.committed
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step in range(4):
        for param, each in ((p, opt), (q, lion)):
            each.zero_grad()
            param.grad = torch.linspace(-1, 2, 9) * (step - 1.5)
        if step == 2:
            # a scaler hands its scale over
            p.grad = p.grad * 4
            scaler.scale(torch.ones(()))
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()
        lion.step()
        assert opt.committed
        assert torch.equal(p, q), step
    assert opt.param_groups is opt.optim.param_groups
    assert opt.state_dict()["param_groups"][0]["step"] == 4
    assert opt.manager.current_step() == 4


def test_what_is_refused(manager: Any) -> None:
    def opt(**options: Any) -> LionCub:
        return LionCub([torch.zeros(9).requires_grad_()], **options)

    good = manager()
    adam = torch.optim.Adam([torch.zeros(9).requires_grad_()])
    for wrong, kind, message in [
        ((adam, good), TypeError, "opt: expected LionCub, got Adam"),
        ((opt(), "manager"), TypeError, "manager: expected torchft.Manager, got str"),
        ((opt(overlap=True), good), ValueError, r"opt: expected LionCub\(overlap=False\), got overlap=True"),
        ((opt(capturable=True), good), ValueError, r"opt: expected LionCub\(capturable=False\), got capturable=True"),
    ]:
        with pytest.raises(kind, match=message):
            FaultTolerant(*wrong)
    wrapped = FaultTolerant(opt(), good)
    with pytest.raises(
        ValueError, match="manager: expected one that decides for no other optimizer, got the same again"
    ):
        FaultTolerant(opt(), good)
    with pytest.raises(ValueError, match="closure: expected None, got "):
        wrapped.step(lambda: 0.0)
    other = manager(pg=torchft.process_group.ProcessGroupBabyGloo())
    message = r"manager: expected Manager\(pg=ProcessGroupGloo\(...\)\), got pg=ProcessGroupBabyGloo"
    with pytest.raises(TypeError, match=message):
        FaultTolerant(opt(), other)
    with pytest.raises(ValueError, match="opt: expected parameters sharded over the 2 ranks of a replica, got whole"):
        FaultTolerant(opt(), manager(world_size=2))
