"""Simulated workers: bit for bit what real Gloo processes do, collectives, errors instead of hanging, many workers."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of
from nets import Net, all_bits, groups_of
from optimizers import LionCub

import lioncub
import lioncub.simulate
from lioncub import MomentumSync, NonFiniteError, Quantized, SignMean, SignVote, TernaryVote, WorkersDisagreeError
from lioncub.collectives import vote
from lioncub.collectives.transport import gather_objects, rank_of
from lioncub.simulate import SimulatedProcessGroup, Workers

# arguments of LionCub; those that need nodes are tried with 2 nodes of 2 workers
CONFIGURATIONS: list[dict[str, Any]] = [
    {"algorithm": "all_gather"},
    {"algorithm": "reduce_scatter", "weight_decay": 0.3},
    {"algorithm": "reduce_scatter", "bucket_mb": 1e-5},
    {"algorithm": "all_reduce"},
    {"algorithm": "hierarchical", "bucket_mb": 2e-5},
    {"algorithm": "reduce_scatter", "compression": SignMean(), "momentum_sync": MomentumSync(every=2)},
    {
        "algorithm": "all_gather",
        "compression": TernaryVote(),
        "momentum_sync": MomentumSync(every=3, schedule="staggered", dtype="int8"),
    },
    {"algorithm": "all_reduce", "compression": TernaryVote()},
    {
        "algorithm": "hierarchical",
        "compression": Quantized(bits=4, stochastic=True),
        "momentum_sync": MomentumSync(every=2, dtype="bf16"),
    },
    {
        "algorithm": "reduce_scatter",
        "compression": Quantized(bits=2, block=64, share_scales_every=2),
        "momentum_sync": MomentumSync(select="auto", budget=4.0),
        "drift_every": 2,
    },
]
Record = tuple[str, str, float, float, int]


def configurations_for(workers: int) -> list[dict[str, Any]]:
    return [kwargs for kwargs in CONFIGURATIONS if workers == 4 or kwargs["algorithm"] != "hierarchical"]


def records_of(rank: int, group: SimulatedProcessGroup | None, kwargs: dict[str, Any], steps: int = 6) -> list[Record]:
    """Train on random gradients; what a worker holds and reports after each step."""
    net = Net(seed=rank)
    opt = LionCub(groups_of(net), lr=1e-2, process_group=group, **kwargs)
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        for i, p in enumerate(net.parameters()):
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            # in the storage order of the parameter; now and then there is none
            p.grad = None if (i + step + rank) % 5 == 0 else torch.empty_like(p).copy_(grad)
        opt.step()
        if step == 3:
            opt.sync_momentum()
        digests = [hashlib.blake2b(bits, digest_size=8).hexdigest() for bits in all_bits(opt)]
        stats = opt.stats()
        found.append((*digests, stats.tied, stats.unanimous, stats.bytes_sent_per_step))
    opt.check_replicas()
    return found


def train_for_real(rank: int, world_size: int) -> list[list[Record]]:
    if world_size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert gather_objects("x" * rank, None, torch.device("cpu")) == ["x" * r for r in range(world_size)]
    real = [records_of(rank, None, kwargs) for kwargs in configurations_for(world_size)]
    if world_size == 2:
        # an initialised torch.distributed is left alone
        with Workers(2) as workers:
            assert workers.run(lambda r, group: records_of(r, group, CONFIGURATIONS[0]))[rank] == real[0]
        total = torch.ones(1)
        dist.all_reduce(total)
        assert (dist.get_world_size(), dist.get_rank(), total.item()) == (2, rank, 2)
    return real


@pytest.mark.parametrize("size", [2, 3, 4])
def test_simulated_workers_are_bit_identical_to_real_ones(size: int) -> None:
    real = results_of(train_for_real, size)
    with Workers(size, local_size=2 if size == 4 else None) as workers:
        for i, kwargs in enumerate(configurations_for(size)):
            simulated = workers.run(lambda rank, group, kwargs=kwargs: records_of(rank, group, kwargs))
            for rank in range(size):
                for step, (ours, theirs) in enumerate(zip(simulated[rank], real[rank][i], strict=True)):
                    assert ours == theirs, f"{kwargs}, rank {rank}, step {step}"
            momenta = {tuple(record[1] for record in records) for records in simulated}
            assert len(momenta) == size, "the comparison needs workers that differ"


@pytest.fixture
def workers() -> Iterator[Workers]:
    with Workers(3) as three:
        yield three


def collectives(rank: int, group: SimulatedProcessGroup) -> None:
    gathered = torch.full((3, 2), -1, dtype=torch.uint8)
    mine = torch.tensor([rank, 10 + rank], dtype=torch.uint8)
    work = dist.all_to_all_single(torch.empty(3), torch.arange(3.0) + 10 * rank, group=group, async_op=True)
    pending = lioncub.collectives.transport.all_gather(gathered.view(-1), mine, group)
    # posted messages have left
    mine.fill_(99)
    pending.wait()
    pending.wait()
    assert gathered.tolist() == [[0, 10], [1, 11], [2, 12]]
    work.wait()
    received = torch.empty(3, 2, dtype=torch.int32)
    dist.all_to_all_single(received, torch.arange(6, dtype=torch.int32).view(3, 2) + 10 * rank, group=group)
    assert received.tolist() == [[2 * rank + 10 * peer, 2 * rank + 1 + 10 * peer] for peer in range(3)]
    # in another order the large ones would swallow it
    values = torch.tensor([[1e8, -1e8, 1.0], [1e-3, 5.0, 0.0]]).t()[rank].clone()
    dist.all_reduce(values, group=group)
    assert torch.equal(values, torch.tensor([1.0, 5.001]))
    small = torch.tensor([100, 7], dtype=torch.uint8)
    dist.all_reduce(small, group=group)
    assert small.tolist() == [300 - 256, 21]
    largest = torch.tensor([float(rank)], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    assert largest.item() == 2
    spread = torch.full((2, 2), float(rank), requires_grad=rank == 1).detach()
    dist.broadcast(spread, group=group, group_src=1)
    assert spread.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    dist.barrier(group)
    empty = torch.empty(0)
    dist.all_reduce(empty, group=group)
    assert gather_objects({"rank": "r" * rank}, group, torch.device("cpu")) == [{"rank": "r" * r} for r in range(3)]
    assert (rank_of(group), dist.get_world_size(group)) == (rank, 3)


def test_collectives_of_torch_distributed(workers: Workers) -> None:
    workers.run(collectives)
    workers.run(collectives)


def test_votes_and_subgroups(workers: Workers) -> None:
    def job(rank: int, group: SimulatedProcessGroup) -> list[int]:
        packed = torch.tensor([0b1111, 0b0011, 0b0101], dtype=torch.uint8)[rank].repeat(8)
        assert vote(packed, group=group, algorithm="reduce_scatter").tolist() == [0b0111] * 8
        if rank == 1:
            return []
        pair = group.subgroup([2, 0])
        assert (pair.rank(), pair.size()) == (rank // 2, 2)
        both = torch.empty(2, dtype=torch.int64)
        lioncub.collectives.transport.all_gather(both, torch.tensor([rank]), pair).wait()
        return both.tolist()

    assert workers.run(job) == [[0, 2], [], [0, 2]]


def test_one_worker_runs_at_a_time_and_always_in_the_same_order(workers: Workers) -> None:
    order: list[tuple[int, int]] = []

    def job(rank: int, group: SimulatedProcessGroup) -> str:
        for part in range(3):
            order.append((part, rank))
            dist.barrier(group)
        return threading.current_thread().name

    names = workers.run(job)
    first = list(order)
    order.clear()
    assert workers.run(job) == names
    assert len(set(names)) == 3
    # the last to come keeps the turn
    assert order == first == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 0), (1, 1), (2, 1), (2, 2), (2, 0)]


def test_functions_run_in_the_grad_mode_of_the_caller(workers: Workers) -> None:
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert workers.run(lambda rank, group: torch.is_grad_enabled()) == [enabled] * 3


def parameters(n: int) -> list[list[torch.Tensor]]:
    return [[torch.linspace(-1, 1, 67).requires_grad_(), torch.ones(5).requires_grad_()] for _ in range(n)]


def set_gradients(models: list[list[torch.Tensor]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for params in models:
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)


def test_a_worker_that_raises_before_its_step_fails_all_and_a_new_run_works(workers: Workers) -> None:
    models = parameters(3)
    opts = workers.run(lambda rank, group: LionCub(models[rank], lr=0.1, process_group=group))
    seen: dict[int, BaseException] = {}

    def step(rank: int, group: SimulatedProcessGroup) -> None:
        if rank == 1:
            raise ZeroDivisionError("batch is empty")
        try:
            opts[rank].step()
        except Exception as error:
            seen[rank] = error
            raise

    set_gradients(models, 0)
    with pytest.raises(ZeroDivisionError, match="batch is empty") as caught:
        workers.run(step)
    assert sorted(seen) == [0, 2]
    assert all(isinstance(error, RuntimeError) for error in seen.values())
    assert all("worker 1 raised ZeroDivisionError: batch is empty" in str(error) for error in seen.values())
    assert any("raised by simulated worker 0: PeerFailedError" in note for note in caught.value.__notes__)
    workers.run(lambda rank, group: opts[rank].step())
    workers.run(lambda rank, group: opts[rank].check_replicas())
    assert {opt.stats().steps for opt in opts} == {1}


def test_errors_of_all_are_raised_once(workers: Workers) -> None:
    models = parameters(3)
    set_gradients(models, 0)

    def build(rank: int, group: SimulatedProcessGroup, **options: Any) -> LionCub:
        return LionCub(models[rank], process_group=group, **options)

    with pytest.raises(WorkersDisagreeError, match="on_nonfinite") as caught:
        workers.run(lambda rank, group: build(rank, group, on_nonfinite="skip" if rank == 2 else "raise"))
    assert caught.value.__notes__ == ["raised by simulated worker 0, 1, 2: this"]
    with pytest.raises(ValueError, match="overlap: expected False with simulated workers"):
        workers.run(lambda rank, group: build(rank, group, overlap=True))
    with pytest.raises(ValueError, match="process_group: expected real workers with capturable=True"):
        workers.run(lambda rank, group: build(rank, group, capturable=True))
    opts = workers.run(build)
    opts[1].param_groups[0]["lr"] = 0.5
    with pytest.raises(WorkersDisagreeError, match="hyperparameters"):
        workers.run(lambda rank, group: opts[rank].step())
    opts[1].param_groups[0]["lr"] = 1e-4
    models[2][1].grad[3] = torch.nan  # type: ignore[index]
    with pytest.raises(NonFiniteError, match="on rank 2") as not_finite:
        workers.run(lambda rank, group: opts[rank].step())
    assert not_finite.value.__notes__ == ["raised by simulated worker 0, 1, 2: this"]


def test_a_worker_that_never_calls(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match=r"worker 0 waits for worker 1 in barrier .*, but worker 1 has ended"):
        workers.run(lambda rank, group: None if rank == 1 else dist.barrier(group))
    # what it left behind does not meet the next calls
    workers.run(collectives)


def gather(n: int, dtype: torch.dtype = torch.float32) -> Callable[[SimulatedProcessGroup], None]:
    def call(group: SimulatedProcessGroup) -> None:
        lioncub.collectives.transport.all_gather(
            torch.empty(3 * n, dtype=dtype), torch.ones(n, dtype=dtype), group
        ).wait()

    return call


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda group: dist.all_reduce(torch.ones(2), group=group), "all_reduce of 2 torch.float32 by SUM"),
        (dist.barrier, "barrier"),
        (gather(3), "all_gather of 3 torch.float32"),
        (gather(2, torch.uint8), "all_gather of 2 torch.uint8"),
    ],
)
def test_different_collectives_raise_on_all(
    workers: Workers, other: Callable[[SimulatedProcessGroup], None], named: str
) -> None:
    with pytest.raises(RuntimeError, match="different collectives as number 0 of their group") as caught:
        workers.run(lambda rank, group: other(group) if rank == 1 else gather(2)(group))
    assert f"all_gather of 2 torch.float32 on worker 0, {named} on worker 1" in str(caught.value)
    assert caught.value.__notes__ == ["raised by simulated worker 0, 1, 2: this"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda group: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BAND, group=group),
            r"op: expected one of .*SUM",
        ),
        (lambda group: dist.all_to_all_single(torch.ones(4), torch.ones(4), group=group), "expected 3 equal splits"),
        (lambda group: group.all_gather_single(torch.ones(5), torch.ones(2)), "output: expected 6 elements"),
        (lambda group: dist.all_reduce(torch.ones(2, 3).t(), group=group), "expected contiguous tensors"),
    ],
)
def test_impossible_messages(workers: Workers, call: Callable[[SimulatedProcessGroup], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        workers.run(lambda rank, group: call(group))


def test_a_deadlock_names_who_waits_for_what(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="deadlock") as caught:
        workers.run(lambda rank, group: dist.barrier(group.subgroup([0, 1]) if rank == 1 else group))
    assert str(caught.value) == (
        "deadlock: worker 0 waits for worker 1 in barrier (call 0 of the group of 3); worker 1 waits for worker 0 in "
        "barrier (call 0 of the group of 2); worker 2 waits for worker 1 in barrier (call 0 of the group of 3)"
    )
    assert caught.value.__notes__ == ["raised by simulated worker 0, 1, 2: this"]


def test_groups_belong_to_their_worker(workers: Workers) -> None:
    with pytest.raises(RuntimeError, match="messages of simulated worker 0 from its own function"):
        dist.barrier(workers.groups[0])
    with pytest.raises(RuntimeError, match="messages of simulated worker 1 from its own"):
        workers.run(lambda rank, group: dist.barrier(workers.groups[1]))
    with pytest.raises(RuntimeError, match="one call at a time"):
        workers.run(lambda rank, group: workers.run(lambda rank, group: None))


def test_threads_end_with_close_and_with_the_last_reference() -> None:
    def alive() -> int:
        return sum(thread.name.startswith("lioncub-worker") for thread in threading.enumerate())

    before = alive()
    workers = Workers(5)
    assert alive() == before + 5
    workers.run(lambda rank, group: dist.barrier(group))
    workers.close()
    workers.close()
    assert alive() == before
    with pytest.raises(RuntimeError, match="closed"):
        workers.run(lambda rank, group: dist.barrier(group))
    workers = Workers(5)
    del workers
    assert alive() == before


def test_an_interrupt_reaches_the_caller_and_ends_the_workers(workers: Workers) -> None:
    ended: list[str] = []

    def job(rank: int, group: SimulatedProcessGroup) -> None:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGINT)
            # the caller, who is interrupted, gets to know it when it next runs
            deadline = time.monotonic() + 60
            while not workers._world.scheduler._is_closed and time.monotonic() < deadline:
                time.sleep(0.01)
        try:
            dist.barrier(group)
        except RuntimeError as error:
            ended.append(str(error))
            raise

    # who is started in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run(job)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == ["the workers were closed"] * 3
    assert not any(thread.is_alive() for thread in workers._world.scheduler._threads)


def test_closing_within_a_run_ends_it(workers: Workers) -> None:
    threads: list[threading.Thread] = []

    def job(rank: int, group: SimulatedProcessGroup) -> None:
        threads.append(threading.current_thread())
        if rank == 1:
            workers.close()
        dist.barrier(group)

    with pytest.raises(RuntimeError, match="the workers were closed"):
        workers.run(job)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_sixty_four_workers_take_a_step() -> None:
    models = parameters(64)
    set_gradients(models, 3)
    updates = torch.stack([params[0].grad for params in models])
    with Workers(64) as workers:
        opts = workers.run(
            lambda rank, group: LionCub(models[rank], lr=0.5, process_group=group, compression=SignVote())
        )
        workers.run(lambda rank, group: opts[rank].step())
        workers.run(lambda rank, group: opts[rank].check_replicas())
    ones = (updates > 0).sum(dim=0)
    up = torch.where(ones == 32, torch.arange(67) % 2, (ones > 32).long())
    assert torch.equal(models[5][0], torch.linspace(-1, 1, 67) - torch.where(up == 1, 0.5, -0.5))
    assert not any(
        torch.equal(opts[0].state[models[0][0]]["exp_avg"], opts[i].state[models[i][0]]["exp_avg"]) for i in (1, 63)
    )
