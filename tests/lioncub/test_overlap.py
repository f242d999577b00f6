"""Votes that are sent during backward: the same bits as without, whatever backward does, and what is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by, same_on_all
from nets import Net, all_bits, batch_of, bits_of, groups_of, momentum_of
from optimizers import Lion, LionCub
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub.collectives.algorithms import Done, Exchange
from lioncub.overlap import CommStream

SMALL = 2e-5
Loop = Callable[[Net, LionCub, int, int], None]


def backward(net: Net, seed: int, use_all: bool = True) -> None:
    net(*batch_of(seed), use_all=use_all).backward()


# what a training loop does in step ``step`` on ``rank`` before `LionCub.step`, after `zero_grad`


def one_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank)


def sometimes_unused(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank, use_all=step % 3 != 1 or rank == 1)


def two_backwards(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank)
    backward(net, 100 * step + rank + 50)


def more_backwards_on_one_worker(net: Net, opt: LionCub, rank: int, step: int) -> None:
    for i in range(1 + (step % 2 and rank == 0)):
        backward(net, 100 * step + 10 * i + rank)


def accumulated(net: Net, opt: LionCub, rank: int, step: int) -> None:
    with opt.no_sync():
        two_backwards(net, opt, rank, step)
    backward(net, 100 * step + rank + 30)


def only_within_no_sync(net: Net, opt: LionCub, rank: int, step: int) -> None:
    with opt.no_sync():
        backward(net, 100 * step + rank)


class _BreakError(Exception):
    pass


def backward_breaks(net: Net, opt: LionCub, rank: int, step: int) -> None:
    """On one worker backward fails half way, and what it did is thrown away."""
    if rank == 1 and step in (2, 3):

        def fail(grad: Tensor) -> Tensor:
            raise _BreakError

        handle = net.mix.register_forward_pre_hook(lambda module, inputs: inputs[0].register_hook(fail) and None)
        with pytest.raises(_BreakError):
            backward(net, 7777)
        handle.remove()
        if step == 2:
            opt.zero_grad()
        else:
            net.zero_grad()
    backward(net, 100 * step + rank)


def lr_set_after_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank)
    for group in opt.param_groups:
        group["lr"] = 1e-2 / (1 + step)
        group["betas"] = (0.9 - 0.01 * step, 0.99)


def momentum_changed_after_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank)
    if step % 2:
        opt.sync_momentum()


def checkpoint_between(net: Net, opt: LionCub, rank: int, step: int) -> None:
    backward(net, 100 * step + rank)
    if step == 3:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))


def grads_zeroed_in_place(net: Net, opt: LionCub, rank: int, step: int) -> None:
    if step:
        # without ``set_to_none`` gradients keep their memory
        backward(net, 1)
        opt.zero_grad(set_to_none=False)
    backward(net, 100 * step + rank)


def group_added(net: Net, opt: LionCub, rank: int, step: int) -> None:
    if step == 3:
        torch.manual_seed(0)
        net.more = nn.Linear(7, 7)
        opt.add_param_group({"params": [(f"more.{name}", p) for name, p in net.more.named_parameters()], "lr": 1e-3})
    backward(net, 100 * step + rank)
    if step >= 3:
        net.more(torch.ones(7)).square().sum().backward()


LOOPS: list[Loop] = [
    one_backward,
    sometimes_unused,
    two_backwards,
    more_backwards_on_one_worker,
    accumulated,
    only_within_no_sync,
    backward_breaks,
    lr_set_after_backward,
    momentum_changed_after_backward,
    checkpoint_between,
    grads_zeroed_in_place,
    group_added,
]


def end_of(loop: Loop, rank: int, **options: Any) -> tuple[bytes, bytes, int]:
    net = Net(seed=3)
    opt = LionCub(groups_of(net), lr=1e-2, bucket_mb=SMALL, **options)
    for step in range(6):
        opt.zero_grad()
        loop(net, opt, rank, step)
        opt.step()
    opt.check_replicas()
    found = bits_of(net), momentum_of(opt), opt.stats().steps
    opt.close()
    return found


@on_ranks(3)
def test_the_bits_are_those_without_overlap_whatever_backward_does(rank: int, world_size: int) -> None:
    for loop in LOOPS:
        plain, overlapped = (end_of(loop, rank, overlap=overlap) for overlap in (False, True))
        assert plain == overlapped, loop.__name__
        assert same_on_all(plain[0]), loop.__name__
        assert not same_on_all(plain[1]), loop.__name__


@on_ranks(4)
def test_the_bits_are_the_same_by_every_algorithm(rank: int, world_size: int) -> None:
    nodes = {"mesh": dist.device_mesh.DeviceMesh("cpu", [[0, 1], [2, 3]])}
    ways: list[dict[str, Any]] = [
        {"algorithm": name, "overlap": overlap, **(nodes if name == "hierarchical" else {})}
        for name in ("reduce_scatter", "all_gather", "all_reduce", "auto", "hierarchical")
        for overlap in (False, True)
    ]
    expected = end_of(one_backward, rank, **ways[0])
    for way in ways[1:]:
        assert end_of(one_backward, rank, **way) == expected, way
    assert same_on_all(expected[0])


def sent_early(net: Net, opt: LionCub, use_no_sync: bool = False) -> list[str]:
    """The parameters whose votes were taken during backward: gradients that change later, unnoticed, move them not."""
    opt.zero_grad()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    if use_no_sync:
        with opt.no_sync():
            backward(net, 5)
    else:
        backward(net, 5)
    for p in net.parameters():
        if p.grad is not None:
            p.grad.data.neg_()
    opt.step()
    found = []
    for name, p in net.named_parameters():
        if p.grad is not None and bool((moved := ((p.detach() - before[name]) * p.grad).sign()).any()):
            # each goes against the gradient of its vote, which has been negated since
            found += [name] if float(moved.float().sum()) > 0 else []
    return found


@on_ranks(2)
def test_buckets_leave_during_backward_once_the_order_is_learnt(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, betas=(0.0, 0.0), bucket_mb=SMALL, overlap=True)
    assert sent_early(net, opt) == []
    early = sent_early(net, opt)
    # the head and what follows it in the forward pass
    assert {"table.weight", "sometimes.weight"} <= set(early)
    assert len(sent_early(net, opt)) >= 2
    assert sent_early(net, opt, use_no_sync=True) == []
    # first both parameters of `sometimes`, then the convolution, and last what never has a gradient, `never.bias`
    sizes = [bucket.elements for bucket in opt.stats().buckets]
    assert sizes[0] == 49 + 7
    assert 5 * 3 * 3 * 3 in sizes[-3:]
    assert sizes[-1] == 3


# what needs all gradients before the first code is sent, and what is said of it


def clipping(net: Net, opt: LionCub) -> Any:
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    return opt.step()


def closure(net: Net, opt: LionCub) -> Any:
    return opt.step(lambda: torch.zeros(()))


def scaler(net: Net, opt: LionCub) -> Any:
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    return opt.step()


REFUSED: dict[Callable[[Net, LionCub], Any], str] = {
    clipping: "expected it unchanged since backward, as overlap=True has already sent its votes",
    closure: "overlap: expected False with a closure, got True: its backward would run within step",
    scaler: "overlap: expected False with a GradScaler, got True: votes are sent before",
}


@on_ranks(2)
def test_what_needs_all_gradients_first_is_refused(rank: int, world_size: int) -> None:
    told = "WorkersDisagreeError: step 2 was taken by no worker, because of an error on rank 1"
    for wrong, message in REFUSED.items():
        for culprits in ((0, 1), (1,)):
            net = Net(seed=0)
            opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True)
            for step in range(4):
                opt.zero_grad()
                backward(net, 100 * step + rank)
                if step == 2:
                    before = all_bits(opt)
                    said = said_by(functools.partial(wrong, net, opt) if rank in culprits else opt.step)
                    # where one rank alone does it, the others are told
                    assert message in said if rank in culprits else said.startswith(told), (wrong.__name__, said)
                    assert before == all_bits(opt)
                else:
                    opt.step()
            opt.check_replicas()
            opt.close()


@on_ranks(2)
def test_a_step_that_is_not_finite_is_skipped_by_all(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True, on_nonfinite="skip")
    for step in range(5):
        opt.zero_grad()
        images, tokens = batch_of(10 * step + rank)
        net(images * (torch.inf if step == 3 and rank == 1 else 1.0), tokens, use_all=True).backward()
        opt.step()
    opt.check_replicas()
    assert opt.stats().skipped_steps == 1
    assert same_on_all(bits_of(net))


@on_ranks(2)
def test_an_error_within_backward_is_raised_by_step(rank: int, world_size: int) -> None:
    table = nn.Embedding(9, 3, sparse=True)
    dense = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    opt = LionCub([*dense, table.weight], lr=0.1, bucket_mb=1e-5, overlap=True)
    (table(torch.tensor([1])) * sum(dense)).sum().backward()
    assert said_by(opt.step).startswith("TypeError: gradient of")


@on_ranks(2)
def test_ddp_rewrites_gradients_and_is_told_apart(rank: int, world_size: int) -> None:
    ddp = DistributedDataParallel(nn.Sequential(*[nn.Linear(9, 9) for _ in range(4)]))
    lioncub.keep_gradients_local(ddp)
    opt = LionCub(ddp.named_parameters(), lr=1e-2, bucket_mb=1e-5, overlap=True)
    said = []
    for _ in range(3):
        opt.zero_grad()
        ddp(torch.ones(2, 9)).sum().backward()
        said.append(said_by(opt.step))
    errors = [one for one in said if one != "no error"]
    assert errors
    assert "DistributedDataParallel" in errors[0]


def test_one_worker_has_nothing_to_overlap() -> None:
    nets = Net(seed=0), Net(seed=0)
    opts = LionCub(nets[0].parameters(), lr=1e-2, overlap=True), Lion(nets[1].parameters(), lr=1e-2)
    for net, opt in zip(nets, opts, strict=True):
        for step in range(3):
            opt.zero_grad()
            backward(net, step)
            opt.step()
    with opts[0].no_sync():
        assert bits_of(nets[0]) == bits_of(nets[1])


def test_on_a_gpu_exchanges_run_on_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now, log = ["main"], list[str]()

    class Stream:
        device = torch.device("cuda", 0)

        def __init__(self, name: str = "comm") -> None:
            self.name = name

        def record_event(self) -> str:
            log.append(f"record on {self.name}")
            return "encoded"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

        def wait_stream(self, other: Any) -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Entered:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __enter__(self) -> None:
            now.append(self._stream.name)

        def __exit__(self, *_: object) -> None:
            now.pop()

    fake = SimpleNamespace(
        Stream=lambda device: Stream(), current_stream=lambda device: Stream(now[-1]), stream=Entered
    )
    monkeypatch.setattr("lioncub.overlap.torch", SimpleNamespace(cuda=fake))

    def phases() -> Any:
        message = yield None
        for phase in (1, 2):
            log.append(f"phase {phase} of {message} on {now[-1]}")
            yield SimpleNamespace(wait=lambda phase=phase: log.append(f"{phase} awaited on {now[-1]}"))
        yield Done(message)

    comm = CommStream(torch.device("cuda", 0))
    exchange: Exchange[str] = Exchange(phases(), 2)
    comm.carry(exchange, "codes")
    comm.wait()
    assert log == [
        "record on main",
        "comm waits for encoded",
        "phase 1 of codes on comm",
        "1 awaited on comm",
        "phase 2 of codes on comm",
        "2 awaited on comm",
        "main waits for comm",
    ]
    # the result is there, and nothing is waited for once more
    assert exchange.result() == "codes"
