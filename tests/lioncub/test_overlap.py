"""Votes that travel during backward: the same bits as without, whatever backward does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of, together
from nets import Net, batch_of, bits_of, groups_of, momentum_of
from optimizers import LionCub
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub.collectives.algorithms import Done, Exchange
from lioncub.overlap import CommStream, check_devices

SMALL = 2e-5
Loop = Callable[[Net, LionCub, int, int], None]


def _early(opt: LionCub) -> int:
    """Buckets that backward has sent before `step`."""
    assert opt._overlap is not None
    return len(opt._overlap.sent)


def one_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    opt.step()


def sometimes_unused(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=step % 3 != 1 or rank == 1).backward()
    opt.step()


def two_backwards(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    net(*batch_of(100 * step + rank + 50), use_all=True).backward()
    opt.step()


def more_backwards_on_one_worker(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    for i in range(1 + (step % 2 and rank == 0)):
        net(*batch_of(100 * step + 10 * i + rank), use_all=True).backward()
    opt.step()


def accumulated(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    with opt.no_sync():
        net(*batch_of(100 * step + rank), use_all=True).backward()
        net(*batch_of(100 * step + rank + 30), use_all=True).backward()
    net(*batch_of(100 * step + rank + 50), use_all=True).backward()
    opt.step()


def only_within_no_sync(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    with opt.no_sync():
        net(*batch_of(100 * step + rank), use_all=True).backward()
    opt.step()


class _BreakError(Exception):
    pass


def backward_breaks(net: Net, opt: LionCub, rank: int, step: int) -> None:
    """On one worker backward fails half way, and what it did is thrown away."""
    opt.zero_grad()
    if rank == 1 and step in (2, 3):
        images, tokens = batch_of(7777)

        def fail(grad: Tensor) -> Tensor:
            raise _BreakError

        features = net.norm(net.conv(images)).mean(dim=(2, 3))
        features.register_hook(fail)
        hidden = net.mix(features.to(torch.bfloat16)).float() * net.gain.float() + net.table(tokens)
        with pytest.raises(_BreakError):
            nn.functional.cross_entropy(net.head(hidden + net.sometimes(hidden)), tokens.roll(1)).backward()
        if step == 2:
            opt.zero_grad()
        else:
            net.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    opt.step()


def lr_set_after_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    for group in opt.param_groups:
        group["lr"] = 1e-2 / (1 + step)
        group["betas"] = (0.9 - 0.01 * step, 0.99)
    opt.step()


def momentum_changed_after_backward(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    if step % 2:
        opt.sync_momentum()
    opt.step()


def checkpoint_between(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad()
    net(*batch_of(100 * step + rank), use_all=True).backward()
    if step == 3:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step()


def grads_zeroed_in_place(net: Net, opt: LionCub, rank: int, step: int) -> None:
    opt.zero_grad(set_to_none=False)
    net(*batch_of(100 * step + rank), use_all=True).backward()
    opt.step()


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
]


def train_both_ways(rank: int, world_size: int, loop: Loop, algorithm: str) -> tuple[bytes, bytes]:
    found = []
    for overlap in (False, True):
        net = Net(seed=3)
        opt = LionCub(groups_of(net), lr=1e-2, algorithm=algorithm, bucket_mb=SMALL, overlap=overlap)
        for step in range(7):
            loop(net, opt, rank, step)
        opt.check_replicas()
        found.append((bits_of(net), momentum_of(opt), opt.stats().steps))
    assert found[0] == found[1], loop.__name__
    return found[0][:2]


def every_loop(rank: int, world_size: int) -> dict[str, tuple[bytes, bytes]]:
    return {loop.__name__: train_both_ways(rank, world_size, loop, "reduce_scatter") for loop in LOOPS}


def every_algorithm(rank: int, world_size: int) -> list[bytes]:
    algorithms = ("all_gather", "all_reduce", "auto")
    return [train_both_ways(rank, world_size, one_backward, algorithm)[0] for algorithm in algorithms]


def test_overlap_gives_the_same_bits_whatever_backward_does() -> None:
    answers = results_of(every_loop, 3)
    for loop in answers[0]:
        parameters, momenta = zip(*(answer[loop] for answer in answers), strict=True)
        assert (len(set(parameters)), len(set(momenta))) == (1, 3), loop


def test_overlap_gives_the_same_bits_by_every_algorithm(of_four: Answers) -> None:
    answers = of_four["every_algorithm"]
    assert answers == [answers[0]] * 4


def train_in_two_levels(rank: int, world_size: int) -> bytes:
    found = []
    for overlap, algorithm in ((False, "reduce_scatter"), (False, "hierarchical"), (True, "hierarchical")):
        net = Net(seed=3)
        mesh = dist.device_mesh.DeviceMesh("cpu", [[0, 1], [2, 3]]) if algorithm == "hierarchical" else None
        opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm, mesh=mesh, bucket_mb=SMALL, overlap=overlap)
        for step in range(5):
            one_backward(net, opt, rank, step)
        found.append((bits_of(net), momentum_of(opt)))
    assert found[0] == found[1] == found[2]
    return found[0][0]


def test_two_levels_give_the_same_bits(of_four: Answers) -> None:
    assert len(set(of_four["train_in_two_levels"])) == 1


def count_early(rank: int, world_size: int) -> list[int]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True)
    seen = []
    for step in range(4):
        opt.zero_grad()
        net(*batch_of(step), use_all=True).backward()
        seen.append(_early(opt))
        opt.step()
    names = [slot.name for bucket in opt._buckets.all for slot in bucket.slots]
    # the head and what follows it in the forward pass comes first, what never has a gradient last
    assert names.index("sometimes.weight") < names.index("conv.weight") < names.index("never.weight")
    with opt.no_sync():
        opt.zero_grad()
        net(*batch_of(9), use_all=True).backward()
        seen.append(_early(opt))
    opt.step()
    return seen


def test_buckets_leave_during_backward_once_the_order_is_learnt(of_two: Answers) -> None:
    (first, *later, within_no_sync), _ = of_two["count_early"]
    assert first == within_no_sync == 0
    assert min(later) >= 2


def refuse(rank: int, world_size: int, what: str, culprit: int) -> list[str]:
    net, said = Net(seed=0), []
    opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True)
    for step in range(2):
        one_backward(net, opt, rank, step)
    before = bits_of(net), momentum_of(opt)
    opt.zero_grad()
    net(*batch_of(rank), use_all=True).backward()
    try:
        if rank == culprit or culprit < 0:
            if what == "clipping":
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            elif what == "replaced":
                net.table.weight.grad = net.table.weight.grad * 1.0
            elif what == "closure":
                opt.step(lambda: torch.zeros(()))
            elif what == "scaler":
                opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        opt.step()
    except (RuntimeError, lioncub.WorkersDisagreeError) as error:
        said.append(f"{type(error).__name__}: {error}")
    assert before == (bits_of(net), momentum_of(opt))
    # and the next step starts clean
    for step in range(2, 4):
        one_backward(net, opt, rank, step)
    opt.check_replicas()
    opt.close()
    return said


# what needs all gradients before the first code is sent, and what is said of it
REFUSED = {
    "clipping": "expected it unchanged since backward, as overlap=True has already sent its votes",
    "replaced": "gradient of table.weight: expected it unchanged since backward",
    "closure": "overlap: expected False with a closure, got True: its backward would run within step",
    "scaler": "overlap: expected False with a GradScaler, got True: votes are sent before",
}


def refusals(rank: int, world_size: int) -> dict[tuple[str, int], list[str]]:
    return {(what, who): refuse(rank, world_size, what, who) for what in REFUSED for who in (-1, 1)}


def test_what_needs_all_gradients_first_is_refused(of_two: Answers) -> None:
    first, second = of_two["refusals"]
    told = "WorkersDisagreeError: step 2 was taken by no worker, because of an error on rank 1"
    for what, message in REFUSED.items():
        for (said,) in (first[what, -1], second[what, -1], second[what, 1]):
            assert message in said
        # where one rank alone does it, the others are told
        assert first[what, 1][0].startswith(told)


def nonfinite_and_skipped(rank: int, world_size: int) -> tuple[int, bytes]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True, on_nonfinite="skip")
    for step in range(5):
        opt.zero_grad()
        images, tokens = batch_of(10 * step + rank)
        net(images * (torch.inf if step == 3 and rank == 1 else 1.0), tokens, use_all=True).backward()
        opt.step()
    opt.check_replicas()
    return opt.stats().skipped_steps, bits_of(net)


def test_a_step_that_is_not_finite_is_skipped_by_all(of_two: Answers) -> None:
    results = of_two["nonfinite_and_skipped"]
    assert results[0] == results[1]
    assert results[0][0] == 1


def sparse_gradient(rank: int, world_size: int) -> str:
    table = nn.Embedding(9, 3, sparse=True)
    dense = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    opt = LionCub([*dense, table.weight], lr=0.1, bucket_mb=1e-5, overlap=True)
    opt.zero_grad()
    (table(torch.tensor([1])) * sum(dense)).sum().backward()
    with pytest.raises(TypeError) as caught:
        opt.step()
    return str(caught.value)


def test_an_error_within_backward_is_raised_by_step(of_two: Answers) -> None:
    assert all("gradient of" in said for said in of_two["sparse_gradient"])


def group_added(rank: int, world_size: int) -> tuple[bytes, ...]:
    found = []
    for overlap in (False, True):
        net, more = Net(seed=0), nn.Linear(7, 7)
        with torch.no_grad():
            for p in more.parameters():
                p.fill_(0.5)
        opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=overlap)
        for step in range(6):
            if step == 3:
                opt.add_param_group({"params": list(more.named_parameters()), "lr": 1e-3})
            opt.zero_grad()
            loss = net(*batch_of(10 * step + rank), use_all=True)
            (loss + more(torch.ones(7)).square().sum() if step >= 3 else loss).backward()
            opt.step()
        assert overlap is False or opt._order_known
        found.append(bits_of(net) + bits_of(more))
    assert found[0] == found[1]
    return tuple(found)


def test_groups_can_be_added(of_two: Answers) -> None:
    assert len(set(of_two["group_added"])) == 1


def under_ddp(rank: int, world_size: int) -> list[str]:
    model = nn.Sequential(*[nn.Linear(9, 9) for _ in range(4)])
    ddp = DistributedDataParallel(model)
    lioncub.keep_gradients_local(ddp)
    opt = LionCub(ddp.named_parameters(), lr=1e-2, bucket_mb=1e-5, overlap=True)
    said = []
    for _ in range(3):
        opt.zero_grad()
        ddp(torch.ones(2, 9)).sum().backward()
        try:
            opt.step()
        except RuntimeError as error:
            said.append(str(error))
    return said


def test_ddp_rewrites_gradients_and_is_told_apart(of_two: Answers) -> None:
    for said in of_two["under_ddp"]:
        assert said
        assert "DistributedDataParallel" in said[0]


def test_one_worker_has_nothing_to_overlap() -> None:
    nets = Net(seed=0), Net(seed=0)
    optimizers = LionCub(nets[0].parameters(), lr=1e-2, overlap=True), lioncub.Lion(nets[1].parameters(), lr=1e-2)
    for net, opt in zip(nets, optimizers, strict=True):
        for step in range(3):
            opt.zero_grad()
            net(*batch_of(step), use_all=True).backward()
            opt.step()
    with optimizers[0].no_sync():
        assert bits_of(nets[0]) == bits_of(nets[1])


def test_devices_that_cannot_overlap_are_refused() -> None:
    for devices in (["cpu", "cuda:0"], ["cuda:0", "cuda:1"], ["xpu:0"]):
        with pytest.raises(ValueError, match="overlap: expected all parameters on the CPU or on one CUDA device, got"):
            check_devices(devices)


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def of_two() -> Answers:
    return together(2, refusals, count_early, nonfinite_and_skipped, sparse_gradient, group_added, under_ddp)


@pytest.fixture(scope="module")
def of_four() -> Answers:
    return together(4, every_algorithm, train_in_two_levels)


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
