"""Votes that travel during backward: the same bits as without, whatever backward does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Raised, outcomes_of, results_of
from nets import Net, batch_of, bits_of, groups_of, momentum_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub import LionCub
from lioncub.overlap import check_devices

SMALL = 2e-5
Loop = Callable[[Net, LionCub, int, int], None]


def _early(opt: LionCub) -> int:
    """Buckets that backward has sent before `step`."""
    assert opt._overlap is not None
    return len(opt._overlap._sent)


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


def train_both_ways(rank: int, world_size: int, loop: str, algorithm: str) -> tuple[bytes, bytes]:
    found = []
    for overlap in (False, True):
        net = Net(seed=3)
        opt = LionCub(groups_of(net), lr=1e-2, algorithm=algorithm, bucket_mb=SMALL, overlap=overlap)
        for step in range(7):
            globals()[loop](net, opt, rank, step)
        opt.check_replicas()
        found.append((bits_of(net), momentum_of(opt), opt.stats().steps))
    assert found[0] == found[1]
    return found[0][:2]


@pytest.mark.parametrize("loop", [loop.__name__ for loop in LOOPS])
def test_overlap_gives_the_same_bits(loop: str) -> None:
    results = results_of(train_both_ways, 3, loop, "reduce_scatter")
    assert len({parameters for parameters, _ in results}) == 1
    assert len({momentum for _, momentum in results}) == 3


@pytest.mark.parametrize("algorithm", ["all_gather", "all_reduce", "auto"])
def test_overlap_gives_the_same_bits_by_every_algorithm(algorithm: str) -> None:
    assert len({parameters for parameters, _ in results_of(train_both_ways, 4, one_backward.__name__, algorithm)}) == 1


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


def test_two_levels_give_the_same_bits() -> None:
    assert len(set(results_of(train_in_two_levels, 4))) == 1


def count_early(rank: int, world_size: int) -> list[int]:
    net = Net(seed=0)
    opt = LionCub(net.named_parameters(), lr=1e-2, bucket_mb=SMALL, overlap=True)
    seen = []
    for step in range(4):
        opt.zero_grad()
        net(*batch_of(step), use_all=True).backward()
        seen.append(_early(opt))
        opt.step()
    names = [slot.name for bucket in opt._buckets for slot in bucket.slots]
    # the head and what follows it in the forward pass comes first, what never has a gradient last
    assert names.index("sometimes.weight") < names.index("conv.weight") < names.index("never.weight")
    with opt.no_sync():
        opt.zero_grad()
        net(*batch_of(9), use_all=True).backward()
        seen.append(_early(opt))
    opt.step()
    return seen


def test_buckets_leave_during_backward_once_the_order_is_learnt() -> None:
    first, *later, within_no_sync = results_of(count_early, 2)[0]
    assert first == within_no_sync == 0
    assert min(later) >= 2


def refuse(rank: int, world_size: int, what: str, culprit: int) -> tuple[str, list[str]]:
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
    return bits_of(net), said


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("clipping", "expected it unchanged since backward, as overlap=True has already sent its votes"),
        ("replaced", "gradient of table.weight: expected it unchanged since backward"),
        ("closure", "overlap: expected False with a closure, got True: its backward would run within step"),
        ("scaler", "overlap: expected False with a GradScaler, got True: votes are sent before"),
    ],
)
def test_what_needs_all_gradients_first_is_refused(what: str, message: str) -> None:
    for _, said in results_of(refuse, 2, what, -1):
        assert len(said) == 1
        assert message in said[0]
    # where one worker alone does it, the others are told
    (_, (told,)), (_, (own,)) = results_of(refuse, 2, what, 1)
    assert message in own
    assert told.startswith("WorkersDisagreeError: step 2 was taken by no worker, because of an error on rank 1")


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


def test_a_step_that_is_not_finite_is_skipped_by_all() -> None:
    results = results_of(nonfinite_and_skipped, 2)
    assert results[0] == results[1]
    assert results[0][0] == 1


def sparse_gradient(rank: int, world_size: int) -> None:
    table = nn.Embedding(9, 3, sparse=True)
    dense = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    opt = LionCub([*dense, table.weight], lr=0.1, bucket_mb=1e-5, overlap=True)
    for _ in range(3):
        opt.zero_grad()
        (table(torch.tensor([1])) * sum(dense)).sum().backward()
        opt.step()


def test_an_error_within_backward_is_raised_by_step() -> None:
    for answer in outcomes_of(sparse_gradient, 2):
        assert isinstance(answer, Raised)
        assert "gradient of" in answer.message


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


def test_groups_can_be_added() -> None:
    assert len(set(results_of(group_added, 2))) == 1


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


def test_ddp_rewrites_gradients_and_is_told_apart() -> None:
    for said in results_of(under_ddp, 2):
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
