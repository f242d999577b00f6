"""What one worker does wrong, over real Gloo processes, is told to all and leaves nothing behind."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of
from nets import Net, batch_of, bits_of, momentum_of
from optimizers import Lion, LionCub
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import lioncub
from lioncub import MomentumSync, Quantized, SignVote

SMALL = 2e-5
Undo = Callable[[], None]


def said_by(call: Callable[[], Any]) -> str:
    """What a call raises, by kind and text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# each does something wrong on the worker that calls it, before `step`, and gives what undoes it


def nonfinite(net: Net, opt: LionCub) -> Undo:
    opt.zero_grad()
    images, tokens = batch_of(1)
    net(images * torch.inf, tokens, use_all=True).backward()
    return lambda: None


def other_lr(net: Net, opt: LionCub) -> Undo:
    return _set(opt.param_groups[0], "lr", 0.5)


def lr_of_another_type(net: Net, opt: LionCub) -> Undo:
    return _set(opt.param_groups[0], "lr", "fast")


def step_of_none(net: Net, opt: LionCub) -> Undo:
    return _set(opt.param_groups[0], "step", None)


def changed_gradient(net: Net, opt: LionCub) -> Undo:
    assert net.table.weight.grad is not None
    net.table.weight.grad = net.table.weight.grad * 1.0
    return lambda: None


def grown_gradient(net: Net, opt: LionCub) -> Undo:
    assert net.sometimes.bias.grad is not None
    net.sometimes.bias.grad.data = torch.ones(9)
    return lambda: None


def bad_scale(net: Net, opt: LionCub) -> Undo:
    opt.grad_scale = torch.tensor(0.0)
    return lambda: None


def no_state(net: Net, opt: LionCub) -> Undo:
    return _set(opt.state, net.table.weight, {})


def moved_momentum(net: Net, opt: LionCub) -> Undo:
    tensor = opt.state[net.table.weight]["exp_avg"]
    kept, tensor.data = tensor.data, tensor.data.clone()
    return lambda: setattr(tensor, "data", kept)


def popped_group(net: Net, opt: LionCub) -> Undo:
    group = opt.param_groups.pop()
    return lambda: opt.param_groups.append(group)


def _set(where: Any, key: Any, value: Any) -> Undo:
    kept = where[key]
    where[key] = value
    return lambda: where.__setitem__(key, kept)


# what is wrong, on rank 1 or on all, whether all raise the same, and what the one that is wrong says
WRONG: list[tuple[Callable[[Net, LionCub], Undo], bool, str]] = [
    (nonfinite, False, "NonFiniteError: step 3: a gradient, momentum or update is not finite"),
    (other_lr, False, "WorkersDisagreeError: workers disagree on the hyperparameters"),
    (lr_of_another_type, True, "TypeError: lr: expected a number or a 0-dim tensor, got 'fast'"),
    (step_of_none, True, "TypeError: step: expected an integer >= 0, got None"),
    (bad_scale, True, ""),
    (no_state, True, "RuntimeError: state of parameter table.weight: expected the exp_avg made at construction"),
    (moved_momentum, True, "RuntimeError: state of parameter table.weight: expected the exp_avg made at construction"),
    (popped_group, True, "RuntimeError: param_groups: expected 2 groups"),
]
ON_ALL = (nonfinite, no_state, changed_gradient)
# changes through .data after backward are not noticed with overlap, whose votes hold the old memory
LATE = {
    True: (changed_gradient, True, "RuntimeError: gradient of table.weight: expected it unchanged since backward"),
    False: (grown_gradient, True, "ValueError: gradient of sometimes.bias: expected the parameter's shape (7,)"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "overlap": {"overlap": True, "momentum_sync": MomentumSync()},
    "overlap, staggered": {
        "overlap": True,
        "momentum_sync": MomentumSync(every=2, schedule="staggered", dtype="int8"),
        "algorithm": "reduce_scatter",
        "compression": Quantized(share_scales_every=2),
    },
    "ordinary": {"momentum_sync": MomentumSync()},
}


def train(rank: int, options: dict[str, Any], wrong: Callable[[Net, LionCub], Undo] | None, who: int) -> Any:
    """Five steps; before the fourth, something goes wrong on worker ``who`` (-1: on all), is caught and undone."""
    net = Net(seed=0)
    named = list(net.named_parameters())
    opt = LionCub([{"params": named[:6]}, {"params": named[6:]}], lr=1e-2, bucket_mb=SMALL, **options)
    said = ""
    for step in range(5):
        opt.zero_grad()
        net(*batch_of(10 * step + rank), use_all=True).backward()
        if wrong is not None and step == 3:
            before = bits_of(net), momentum_of(opt)
            undo = wrong(net, opt) if who in (rank, -1) else lambda: None
            said = said_by(opt.step)
            undo()
            assert before == (bits_of(net), momentum_of(opt)), (wrong.__name__, who, said)
            opt.zero_grad()
            net(*batch_of(10 * step + rank), use_all=True).backward()
        opt.step()
    opt.check_replicas()
    ended = bits_of(net), momentum_of(opt)
    opt.close()
    return ended, said


def go_on_after_errors(rank: int, world_size: int, name: str) -> bool:
    options = OPTIONS[name]
    expected, _ = train(rank, options, None, 0)
    cases = [*WRONG, LATE["overlap" in options]]
    for wrong, is_told, message in cases if name != "overlap, staggered" else cases[::3]:
        for who in (1, -1) if wrong in ON_ALL else (1,):
            ended, said = train(rank, options, wrong, who)
            own = not is_told or who in (rank, -1)
            told = "WorkersDisagreeError: step 3 was taken by no worker, because of an error on rank"
            assert said.startswith(message if own else told), (wrong.__name__, who, said)
            assert said != "no error", (wrong.__name__, who)
            assert ended == expected, (wrong.__name__, who)
    return True


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_that_raises_leaves_nothing_under_way(name: str) -> None:
    assert results_of(go_on_after_errors, 2, name) == [True] * 2


def broken_closure(rank: int, world_size: int) -> list[str]:
    said = []
    for capturable in (False, True):
        p = torch.ones(9).requires_grad_()
        opt = LionCub([p], lr=0.5, capturable=capturable)
        p.grad = torch.ones(9)

        def closure(p: Tensor = p) -> Tensor:
            if rank == 1:
                raise KeyError("broken")
            return p.sum()

        said.append(said_by(functools.partial(opt.step, closure)))
        said.append(said_by(opt.step))
        opt.step()
        opt.check_replicas()
    return said


def test_a_closure_that_fails_on_one_worker_is_told_to_all() -> None:
    first, second = results_of(broken_closure, 2)
    told = ": step 0 was taken by no worker, because of an error on rank 1 (reported there)"
    assert first == [f"WorkersDisagreeError{told}", "no error", "no error", f"WorkersDisagreeError{told}"]
    assert second == ["KeyError: 'broken'", "no error", "KeyError: 'broken'", f"WorkersDisagreeError{told}"]


def capturable_goes_wrong(rank: int, world_size: int) -> list[tuple[str, str]]:
    found = []
    for algorithm in ("all_gather", "reduce_scatter"):
        for wrong in (no_state, lr_of_another_type, step_of_none, grown_gradient, moved_momentum, popped_group):
            net = Net(seed=0)
            named = list(net.named_parameters())
            opt = LionCub(
                [{"params": named[:6]}, {"params": named[6:]}],
                lr=1e-2,
                bucket_mb=SMALL,
                capturable=True,
                algorithm=algorithm,
                compression=SignVote(),
            )
            net(*batch_of(rank), use_all=True).backward()
            opt.step()
            before = bits_of(net), momentum_of(opt)
            undo = wrong(net, opt) if rank == 1 else lambda: None
            said = [said_by(opt.step)]
            undo()
            said.append(said_by(opt.step))
            assert before == (bits_of(net), momentum_of(opt))
            opt.zero_grad()
            net(*batch_of(rank + 10), use_all=True).backward()
            opt.step()
            opt.raise_errors()
            assert bits_of(net) != before[0]
            opt.check_replicas()
            assert opt.stats().steps == 3
            found.append((said[0], said[1]))
    return found


def test_a_capturable_step_that_one_worker_cannot_take_is_told_by_the_next() -> None:
    first, second = results_of(capturable_goes_wrong, 2)
    told = "WorkersDisagreeError: step 1 was taken by no worker, because of an error on rank 1 (reported there)"
    assert first == [("no error", told)] * 12
    assert [next_step for _, next_step in second] == [told] * 12
    messages = [
        "RuntimeError: state of parameter table.weight: expected",
        "TypeError: lr: expected",
        "RuntimeError: step: expected the tensor made at construction",
        "ValueError: gradient of sometimes.bias: expected",
        "RuntimeError: state of parameter table.weight: expected",
        "RuntimeError: param_groups: expected 2 groups",
    ]
    for (own, _), message in zip(second, messages * 2, strict=True):
        assert own.startswith(message)


def changed_on_one_worker(rank: int, world_size: int, how: str) -> list[str]:
    """A group is added, or a checkpoint loaded, on rank 1 alone; then on the others too."""
    said = []
    for options in ({}, {"overlap": True, "momentum_sync": MomentumSync()}, {"capturable": True}):
        p, late = (torch.ones(9).requires_grad_() for _ in range(2))
        opt = LionCub([("p", p)], lr=0.5, **options)  # type: ignore[arg-type]
        saved = copy.deepcopy(opt.state_dict())

        def change(opt: LionCub = opt, late: Tensor = late, saved: dict[str, Any] = saved) -> None:
            if how == "group":
                opt.add_param_group({"params": [("late", late)]})
            else:
                opt.load_state_dict(saved)

        def step(opt: LionCub = opt, p: Tensor = p, late: Tensor = late) -> None:
            opt.zero_grad()
            (p.sum() + late.sum()).backward()
            opt.step()

        step()
        if how == "bad checkpoint":
            wrong = copy.deepcopy(saved)
            wrong["state"][0]["exp_avg"] = torch.ones(7)
            failed = said_by(lambda opt=opt, state=wrong if rank == 1 else saved: opt.load_state_dict(state))  # type: ignore[misc]
            assert failed.startswith("ValueError: state_dict: expected exp_avg" if rank == 1 else "no error")
        elif rank == 1:
            change()
        said += [said_by(step), said_by(step)]
        if how != "group" or rank == 0:
            change()
        if "capturable" in options:
            # what the last one reported
            said.append(said_by(step))
        step()
        opt.check_replicas()
    return said


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("group", "workers disagree on the bucket layout at step 1"),
        ("checkpoint", "workers disagree on the step at step"),
        ("bad checkpoint", "workers disagree on the step at step"),
    ],
)
def test_what_one_worker_alone_adds_or_loads_is_noticed(how: str, message: str) -> None:
    for rank, said in enumerate(results_of(changed_on_one_worker, 2, how)):
        for one in said[:4]:
            assert message in one, (rank, said)
        assert "no error" not in said[4:6] or how != "bad checkpoint", (rank, said)
        assert any(one.startswith("WorkersDisagreeError") for one in said[4:]), (rank, said)


def no_gradient_under_a_scaler(rank: int, world_size: int) -> list[str]:
    p = torch.ones(9).requires_grad_()
    opt, scaler = LionCub([p], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    said = []
    for step in range(2):
        opt.zero_grad()
        loss = scaler.scale(p.sum())
        if rank == 0 or step == 1:
            loss.backward()
        said.append(said_by(lambda: scaler.step(opt)))
        if said[-1] == "no error":
            scaler.update()
    assert p.tolist() == [0.5] * 9
    return said


def test_a_scaler_on_a_worker_without_gradients_is_told_to_all() -> None:
    first, second = results_of(no_gradient_under_a_scaler, 2)
    assert second[0].startswith("RuntimeError: GradScaler: expected a gradient on every worker, got none on this one")
    assert first[0].startswith("WorkersDisagreeError: step 0 was taken by no worker, because of an error on rank 1")
    assert first[1] == second[1] == "no error"


# FullyShardedDataParallel


def sharded(use_orig_params: bool, sizes: tuple[int, ...] = (8, 8, 8)) -> tuple[nn.Module, FullyShardedDataParallel]:
    torch.manual_seed(3)
    net = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
    plain = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def refuse_shards(rank: int, world_size: int) -> list[str]:
    said = []
    for use_orig_params in (True, False):
        _, net = sharded(use_orig_params)
        before = [p.detach().clone() for p in net.parameters()]
        said.append(said_by(lambda net=net: LionCub(net.named_parameters())))  # type: ignore[misc]
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    # the same without anything that says so: shards of other sizes, then of equal ones
    for sizes in ((8, 8, 8), (8, 8, 8, 8, 8)):
        _, net = sharded(use_orig_params=True, sizes=sizes)
        params = [p for p in net.parameters() if p.numel() or len(sizes) == 3]
        for p in params:
            del p._fsdp_flattened  # type: ignore[attr-defined]
        before = [p.detach().clone() for p in params]
        said.append(said_by(lambda params=params, sizes=sizes: LionCub(params, broadcast=len(sizes) > 3)))  # type: ignore[misc]
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    return said


def test_shards_are_refused_before_anything_is_written() -> None:
    for by_name, by_flag, by_size, by_storage in results_of(refuse_shards, 2):
        for said in (by_name, by_flag):
            assert "expected a whole tensor, got a shard of FullyShardedDataParallel" in said
        assert by_size.startswith("WorkersDisagreeError: workers disagree on parameter 0")
        assert "shards, as of FullyShardedDataParallel, cannot be voted on" in by_size
        assert "got 1-d views into one flat storage, as shards of FullyShardedDataParallel are" in by_storage


def lion_on_shards(rank: int, world_size: int) -> bool:
    for use_orig_params in (True, False):
        plain, net = sharded(use_orig_params)
        one, other = Lion(plain.parameters(), lr=0.1), Lion(net.parameters(), lr=0.1)
        for step in range(3):
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            for model, opt in ((plain, one), (net, other)):
                opt.zero_grad()
                model(data).square().sum().backward()
                opt.step()
        with FullyShardedDataParallel.summon_full_params(net):
            whole = dict(net.module.named_parameters())
            for name, p in plain.named_parameters():
                assert torch.equal(p, whole[name])
    return True


def test_lion_steps_on_shards() -> None:
    assert results_of(lion_on_shards, 2) == [True] * 2


def weights_of_an_lstm(rank: int, world_size: int) -> float:
    """Matrices and vectors in one storage, as cuDNN has them, are no shards."""
    flat = torch.zeros(100)
    params = [flat[:60].view(6, 10).requires_grad_(), flat[60:80].requires_grad_(), flat[80:].requires_grad_()]
    params = [p.detach().requires_grad_() for p in params]
    opt = LionCub(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return float(flat.sum())


def test_whole_parameters_may_share_a_storage() -> None:
    assert results_of(weights_of_an_lstm, 2) == [-50.0] * 2


# ends


def _resources(params: list[Tensor]) -> tuple[int, int, int]:
    hooks = sum(len(p._post_accumulate_grad_hooks or {}) for p in params)  # type: ignore[attr-defined]
    return len(os.listdir("/proc/self/fd")), len(list(Path("/proc/self/task").iterdir())), hooks


def build_and_end(rank: int, world_size: int, times: int) -> list[tuple[Any, Any]]:
    if world_size == 4:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    params = [torch.ones(9).requires_grad_() for _ in range(3)]

    def use(*, close: bool) -> None:
        opt = LionCub(params, lr=0.1, overlap=True, bucket_mb=1e-5, momentum_sync=MomentumSync())
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
    # the backend closes descriptors a little later than it is told to
    time.sleep(0.5)
    found = []
    for close in (True, False):
        before = _resources(params)
        for _ in range(times):
            use(close=close)
            assert _resources(params)[2] == 0, "hooks end at once"
        gc.collect()
        deadline = time.monotonic() + 10
        # threads end on their own time
        while _resources(params) != before and time.monotonic() < deadline:
            time.sleep(0.05)
        dist.barrier()
        found.append((before, _resources(params)))
    return found


@pytest.mark.parametrize(("world_size", "times"), [(1, 20), (2, 20), (4, 4)])
def test_threads_descriptors_and_hooks_end_with_the_optimizer(world_size: int, times: int) -> None:
    for found in results_of(build_and_end, world_size, times):
        for before, after in found:
            assert after == before


def end_after_the_group(rank: int, world_size: int) -> bool:
    p = torch.ones(9).requires_grad_()
    opts = [LionCub([p], overlap=True) for _ in range(2)]
    dist.destroy_process_group()
    opts[0].close()
    del opts
    return True


def test_an_optimizer_may_outlive_its_groups() -> None:
    assert results_of(end_after_the_group, 2) == [True] * 2


def two_at_once(rank: int, world_size: int) -> bytes:
    """Closing one leaves another's votes, and the user's groups, alone."""
    net = Net(seed=0)
    first, second = (LionCub(net.named_parameters(), lr=1e-2, overlap=True, bucket_mb=SMALL) for _ in range(2))
    for step in range(4):
        second.zero_grad()
        net(*batch_of(10 * step + rank), use_all=True).backward()
        second.step()
        if step == 1:
            first.close()
    lioncub.broadcast_module(net)
    return bits_of(net)


def test_closing_one_optimizer_leaves_others_alone() -> None:
    first, second = results_of(two_at_once, 2)
    assert first == second


def build_wrongly(rank: int, world_size: int) -> list[str]:
    """Each worker in turn, and then all of them, with arguments that are refused; a good optimizer afterwards."""
    said = []
    wrong: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"algorithm": "pigeon"},
        {"compression": "fewer bits"},
        {"capturable": True, "overlap": True},
        {"params": []},
    ]
    for options, who in itertools.product(wrong, (0, 1, None)):
        net = Net(0)
        given = {"params": net.named_parameters(), "lr": 0.01, **(options if who in (rank, None) else {})}
        said.append(said_by(lambda given=given: LionCub(given.pop("params"), **given)))
    LionCub(Net(0).named_parameters(), lr=0.01).check_replicas()
    return said


def test_arguments_that_one_worker_has_wrong_are_told_to_all() -> None:
    first, second = results_of(build_wrongly, 2)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        who = (0, 1, None)[i % 3]
        if who is None:
            assert one == other
            assert one.startswith(("ValueError", "TypeError"))
            continue
        own, told = (one, other) if who == 0 else (other, one)
        assert own.startswith(("ValueError", "TypeError"))
        assert told == f"WorkersDisagreeError: no worker went on, because of an error on rank {who}: {own}"
