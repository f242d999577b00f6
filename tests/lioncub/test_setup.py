"""How LionCub is built over real Gloo processes: handshake, broadcast, DDP, added groups, dead workers."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from counting import Counting
from gloo_workers import Died, outcomes_of, results_of, together
from nets import Net, batch_of, bits_of, groups_of, train
from optimizers import Lion, LionCub
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub import SignVote
from lioncub.collectives import algorithms

# what rank 1 does otherwise, and what all ranks then say
ODD: list[tuple[dict[str, Any], str]] = [
    (
        {"shapes": [(3, 4), (6,)]},
        "workers disagree on parameter 1: ranks 0, 2: b of torch.float32, shape (5,), strides (1,), group 0; "
        "rank 1: b of torch.float32, shape (6,), strides (1,), group 0; shards, as of FullyShardedDataParallel, "
        "cannot be voted on: every rank needs whole parameters",
    ),
    ({"names": ["a"], "shapes": [(3, 4)]}, "workers disagree on the number of parameters: ranks 0, 2: 2; rank 1: 1"),
    ({"algorithm": "all_gather"}, "workers disagree on algorithm: ranks 0, 2: auto; rank 1: all_gather"),
    ({"on_nonfinite": "skip"}, "workers disagree on on_nonfinite: ranks 0, 2: raise; rank 1: skip"),
    ({"bucket_mb": 2}, "workers disagree on bucket_mb: ranks 0, 2: None; rank 1: 2.0"),
]


def built_otherwise(rank: int, world_size: int) -> list[str]:
    said = []
    for odd, _ in ODD:
        options = dict(odd) if rank == 1 else {}
        shapes, names = options.pop("shapes", [(3, 4), (5,)]), options.pop("names", ["a", "b"])
        params = [(name, torch.zeros(shape).requires_grad_()) for name, shape in zip(names, shapes, strict=True)]
        with pytest.raises(lioncub.WorkersDisagreeError) as caught:
            LionCub(params, **options)
        said.append(str(caught.value))
    return said


def start_from_own_seed(rank: int, world_size: int) -> tuple[bytes, bytes]:
    net = Net(seed=rank)
    before = bits_of(net)
    LionCub(net.named_parameters(), lr=1e-2)
    return before, bits_of(net)


def test_construction_broadcasts_the_first_ranks_parameters(of_three: Answers) -> None:
    answers = of_three["start_from_own_seed"]
    assert len({before for before, _ in answers}) == 3
    assert {after for _, after in answers} == {answers[0][0]}


def start_unequal(rank: int, world_size: int) -> tuple[str, bool]:
    net = Net(seed=rank)
    before = bits_of(net)
    opt = LionCub(net.named_parameters(), lr=1e-2, broadcast=False)
    net(*batch_of(rank), use_all=True).backward()
    with pytest.raises(lioncub.WorkersDisagreeError) as caught:
        opt.step()
    return str(caught.value), before == bits_of(net)


def test_without_broadcast_the_first_step_compares(of_two: Answers) -> None:
    answers = of_two["start_unequal"]
    assert answers[0] == answers[1]
    assert answers[0][0].startswith("parameter conv.weight differs between workers: rank 0: hash ")
    assert answers[0][1]


def find_the_odd_one(rank: int, world_size: int) -> str:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2)
    opt.check_replicas()
    if rank == 1:
        with torch.no_grad():
            net.mix.bias[4] += 1
    with pytest.raises(lioncub.WorkersDisagreeError) as caught:
        opt.check_replicas()
    return str(caught.value)


def test_check_replicas_names_the_first_parameter_that_differs(of_three: Answers) -> None:
    answers = of_three["find_the_odd_one"]
    assert answers == [answers[0]] * 3
    assert answers[0].startswith("parameter mix.bias differs between workers: ranks 0, 2: hash ")


def broadcast_everything(rank: int, world_size: int) -> tuple[bytes, float]:
    net = Net(seed=rank)
    net.norm.running_mean.fill_(rank + 0.5)
    lioncub.broadcast_module(net)
    return bits_of(net), float(net.norm.running_mean[0])


def test_broadcast_module_covers_parameters_and_buffers(of_three: Answers) -> None:
    answers = of_three["broadcast_everything"]
    assert answers == [answers[0]] * 3
    assert answers[0][1] == 0.5


def under_ddp(rank: int, world_size: int) -> tuple[bytes, list[float], list[float]]:
    torch.manual_seed(3)
    nets = [nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    wrapped = DistributedDataParallel(nets[1])
    lioncub.keep_gradients_local(wrapped)
    opts = [LionCub(net.parameters(), lr=1e-2) for net in nets]
    for step in range(5):
        data = torch.randn(8, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        for model, opt in zip((nets[0], wrapped), opts, strict=True):
            opt.zero_grad()
            model(data).square().mean().backward()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), "the gradient under DDP must be the local one"
        for opt in opts:
            opt.step()
    opts[1].check_replicas()
    # a forward in eval mode brings the buffers of the first rank and changes none
    wrapped.eval()(data)
    return bits_of(nets[1]), nets[0][1].running_mean.tolist(), nets[1][1].running_mean.tolist()


def test_under_ddp_gradients_stay_local_and_buffers_follow(of_two: Answers) -> None:
    first, second = of_two["under_ddp"]
    assert first[0] == second[0]
    assert first[1] != second[1], "without DDP buffers are each worker's own"
    assert first[2] == second[2]


def test_only_a_ddp_model_can_keep_gradients_local() -> None:
    with pytest.raises(TypeError, match="ddp_model: expected a DistributedDataParallel module, got Linear"):
        lioncub.keep_gradients_local(nn.Linear(2, 2))


def lion_under_ddp(rank: int, world_size: int) -> bytes:
    torch.manual_seed(3)
    net = nn.Linear(7, 9)
    wrapped, opt = DistributedDataParallel(net), Lion(net.parameters(), lr=1e-2)
    for step in range(5):
        opt.zero_grad()
        data = torch.randn(8, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        wrapped(data).square().mean().backward()
        opt.step()
    return bits_of(net)


def test_lion_under_ddp_keeps_replicas_equal(of_three: Answers) -> None:
    answers = of_three["lion_under_ddp"]
    assert answers == [answers[0]] * 3


def groups_added_in_mid_run(rank: int, world_size: int) -> bytes:
    net = Net(seed=0)
    groups = groups_of(net)
    late = [("late", torch.full((70,), float(rank)).requires_grad_())]
    opt = LionCub(groups, lr=1e-2)
    train(net, opt, rank, range(3))
    opt.add_param_group({"params": late, "lr": 0.5})
    assert opt.stats().buckets[-1].seconds == 0, "it has not travelled yet"
    late[0][1].grad = torch.ones(70)
    opt.step()
    assert torch.equal(late[0][1], torch.full((70,), -0.5)), "the first rank's value, moved by the vote"
    train(net, opt, rank, range(4, 6))
    opt.check_replicas()
    assert opt.param_groups[2]["step"] == 6
    return bits_of(net)


def test_groups_can_be_added_in_mid_run(of_two: Answers) -> None:
    answers = of_two["groups_added_in_mid_run"]
    assert answers[0] == answers[1]


def killed_in_mid_step(rank: int, world_size: int, algorithm: str, moment: str) -> tuple[str, float, bool]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm)
    train(net, opt, rank, range(2))
    before = bits_of(net)
    if rank == 1 and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rank == 1:
        # what the second phase starts with
        algorithms._reply = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        opt.step()
    except RuntimeError as error:
        return type(error).__name__, time.monotonic() - started, before == bits_of(net)
    return "no error", 0.0, False


@pytest.mark.parametrize(
    ("algorithm", "moment"),
    [("all_gather", "before"), ("reduce_scatter", "before"), ("reduce_scatter", "between phases")],
)
def test_a_dead_worker_makes_the_others_fail_within_the_timeout(algorithm: str, moment: str) -> None:
    timeout = 10.0
    answers = outcomes_of(killed_in_mid_step, 3, algorithm, moment, timeout=timeout)
    assert isinstance(answers[1], Died)
    for answer in (answers[0], answers[2]):
        kind, seconds, unchanged = answer
        assert kind != "no error"
        assert seconds < 2 * timeout
        assert unchanged


def says_what_runs(rank: int, world_size: int) -> list[str]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("lioncub")
    keep = Keep()
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    p = torch.zeros(6400).requires_grad_()
    opt = LionCub([p], algorithm="all_gather", impl="reference", compression=SignVote())
    for _ in range(3):
        p.grad = torch.ones(6400)
        opt.step()
    logger.removeHandler(keep)
    return lines


def test_the_active_path_is_logged_once(of_two: Answers) -> None:
    # one bit of 6400, and 13 words of control: 3, 5 hyperparameters, 4, and who has a gradient
    sent = 800 + 8 * 13
    line = (
        "LionCub(lr=0.0001): 2 worker(s), SignVote(); 1 bucket(s) by all_gather, "
        f"{sent:,} bytes sent per worker and step; reference kernels"
    )
    assert of_two["says_what_runs"] == [[line], []]


def built_before_init(rank: int, world_size: int) -> str:
    alone = dist.new_group([rank], use_local_synchronization=True)
    p = torch.zeros(3).requires_grad_()
    opt = LionCub([p], process_group=alone)
    opt._members.group = None
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    return str(caught.value)


def test_an_optimizer_older_than_the_group_refuses_to_pretend(of_two: Answers) -> None:
    for answer in of_two["built_before_init"]:
        assert answer.startswith("process_group: expected torch.distributed to be initialised before LionCub is built")


def two_groups_side_by_side(rank: int, world_size: int) -> float:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    p = torch.zeros(5).requires_grad_()
    opt = LionCub([p], lr=1.0, process_group=halves[rank // 2])
    p.grad = torch.full((5,), 1.0 if rank < 2 else -1.0)
    opt.step()
    opt.check_replicas()
    return float(p.detach()[0])


def test_a_process_group_votes_by_itself() -> None:
    assert results_of(two_groups_side_by_side, 4) == [-1.0, -1.0, 1.0, 1.0]


def drift_behind_equal_names(rank: int, world_size: int) -> str:
    twins = [torch.zeros(9).requires_grad_() for _ in range(2)]
    opt = LionCub([{"params": [("w", twins[0])]}, {"params": [("w", twins[1])]}])
    if rank == 1:
        twins[0].data[3] = 1.0
    with pytest.raises(lioncub.WorkersDisagreeError) as caught:
        opt.check_replicas()
    return str(caught.value)


def test_equal_names_hide_no_drift(of_two: Answers) -> None:
    answers = of_two["drift_behind_equal_names"]
    assert answers[0] == answers[1]
    assert answers[0].startswith("parameter w differs between workers: rank 0: hash ")


def load_on_one_worker_only(rank: int, world_size: int) -> str:
    p = torch.zeros(9).requires_grad_()
    opt = LionCub([("p", p)], lr=0.5)
    p.grad = torch.ones(9)
    opt.step()
    if rank == 1:
        opt.load_state_dict(opt.state_dict())
        p.data.fill_(3.0)
    with pytest.raises(lioncub.WorkersDisagreeError) as caught:
        opt.step()
    return str(caught.value)


def test_a_checkpoint_loaded_on_one_worker_alone_is_noticed(of_three: Answers) -> None:
    answers = of_three["load_on_one_worker_only"]
    assert answers == [answers[0]] * 3
    assert answers[0].startswith("parameter p differs between workers: ranks 0, 2: hash ")


def bytes_of_a_step(rank: int, world_size: int) -> list[tuple[int, int]]:
    found = []
    for algorithm in ("all_gather", "reduce_scatter", "all_reduce"):
        net = Net(seed=0)
        opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm, bucket_mb=1e-5)
        train(net, opt, rank, range(1))
        counting = Counting()
        opt.step()
        found.append((sum(counting.sent.values()), opt.stats().bytes_sent_per_step))
    return found


def test_stats_count_the_bytes_that_are_sent(of_three: Answers) -> None:
    for answer in of_three["bytes_of_a_step"]:
        for sent, stated in answer:
            assert sent == stated > 0


def destroy_the_group(rank: int, world_size: int) -> list[str]:
    p = torch.zeros(9).requires_grad_()
    opt = LionCub([p], lr=0.5)
    p.grad = torch.ones(9)
    opt.step()
    opt.check_replicas()
    dist.destroy_process_group()
    return [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]


def test_no_thread_of_the_group_outlives_it(of_two: Answers) -> None:
    for threads in of_two["destroy_the_group"]:
        assert threads
        assert not any("gloo" in thread for thread in threads)


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def of_two() -> Answers:
    workers = (start_unequal, under_ddp, groups_added_in_mid_run, built_before_init, drift_behind_equal_names)
    # what is logged, and the end of the group, come last
    return together(2, *workers, says_what_runs, destroy_the_group)


@pytest.fixture(scope="module")
def of_three() -> Answers:
    workers = (built_otherwise, start_from_own_seed, find_the_odd_one, broadcast_everything, lion_under_ddp)
    return together(3, *workers, load_on_one_worker_only, bytes_of_a_step)


def test_ranks_that_differ_are_told_so_when_built(of_three: Answers) -> None:
    for said in of_three["built_otherwise"]:
        assert said[:-1] == [message for _, message in ODD[:-1]]


def test_bucket_sizes_that_differ_are_told_in_mib(of_three: Answers) -> None:
    assert [said[-1] for said in of_three["built_otherwise"]] == [ODD[-1][1]] * 3


def test_one_rank_has_one_bucket() -> None:
    params = [nn.Parameter(torch.zeros(1000, 1000)) for _ in range(20)]
    assert len(LionCub(params, lr=0.01).stats().buckets) == 1
