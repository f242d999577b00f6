"""A step in two halves, over real Gloo processes: what each half changes, and errors that are told to all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_workers import results_of
from nets import Net, batch_of, groups_of
from optimizers import LionCub

from lioncub import BySize, MomentumSync, NonFiniteError, Quantized, SignVote

# all that a step writes: momentum, masters, drift and shared scales
EVERYTHING: dict[str, Any] = {
    "compression": BySize(small=Quantized(bits=8, norm="linf", share_scales_every=1), max_numel=50),
    "momentum_sync": MomentumSync(every=2),
    "drift_every": 1,
    "master_weights": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "ordinary": EVERYTHING,
    "overlap": {**EVERYTHING, "overlap": True, "algorithm": "reduce_scatter"},
    "staggered": {"momentum_sync": MomentumSync(every=3, schedule="staggered"), "param_rounding": "stochastic"},
    "capturable": {"capturable": True, "compression": SignVote()},
}


def said_by(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def build(**options: Any) -> tuple[Net, LionCub]:
    net = Net(seed=0)
    return net, LionCub(groups_of(net), lr=1e-2, bucket_mb=2e-5, on_nonfinite="skip", **options)


def backward(net: Net, opt: LionCub, step: int, rank: int, factor: float = 1.0) -> None:
    opt.zero_grad()
    images, tokens = batch_of(100 * step + rank)
    net(images * factor, tokens, use_all=rank != 1).backward()


def tensors_of(net: Net, opt: LionCub) -> list[torch.Tensor]:
    states = [opt.state[p] for p in net.parameters()]
    return [*net.parameters(), *(state[name] for state in states for name in sorted(state))]


def copies_of(net: Net, opt: LionCub) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors_of(net, opt)]


def are_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    pairs = zip(some, others, strict=True)
    return all(torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) for a, b in pairs)


def discarded(rank: int, world_size: int, name: str) -> None:
    """Discard the fourth step of one optimizer; a NaN makes a twin skip it."""
    options = OPTIONS[name]
    (net, opt), (twin, other) = build(**options), build(**options)
    for step in range(7):
        backward(net, opt, step, rank)
        backward(twin, other, step, rank, torch.inf if step == 3 and rank == 0 else 1.0)
        if step == 3:
            before = copies_of(net, opt)
            pending = opt.propose()
            assert pending.takes_step is (None if name == "capturable" else True)
            assert are_equal(before, copies_of(net, opt)), "proposing must change nothing"
            assert opt.stats().steps == 3
            pending.discard()
            assert are_equal(before, copies_of(net, opt)), "discarding must change nothing"
            skipped = other.propose()
            assert skipped.takes_step is (None if name == "capturable" else False)
            skipped.commit()
        elif step % 2:
            opt.propose().commit()
            other.step()
        else:
            opt.step()
            other.propose().commit()
        assert are_equal(tensors_of(net, opt), tensors_of(twin, other)), f"{name}, step {step}"
        assert opt.stats().steps == other.stats().steps == step + 1
        assert opt.stats().skipped_steps == other.stats().skipped_steps == int(step >= 3)
    opt.check_replicas()
    for each in (opt, other):
        each.close()


def ended_twice(rank: int, world_size: int, overlap: bool) -> list[str]:
    said = []
    net, opt = build(overlap=overlap)
    for step, ends in enumerate((("commit", "commit"), ("commit", "discard"), ("discard", "commit"))):
        backward(net, opt, step, rank)
        pending = opt.propose()
        getattr(pending, ends[0])()
        after = copies_of(net, opt)
        said.append(said_by(getattr(pending, ends[1])))
        assert are_equal(after, tensors_of(net, opt))
        assert (opt.stats().steps, opt.stats().skipped_steps) == (step + 1, int(step == 2))
    # a step while another is pending, on all ranks: neither is taken
    backward(net, opt, 3, rank)
    before, pending = copies_of(net, opt), opt.propose()
    said += [said_by(opt.propose), said_by(pending.commit)]
    assert are_equal(before, tensors_of(net, opt))
    backward(net, opt, 3, rank)
    opt.step()
    opt.check_replicas()
    assert opt.stats().steps == 4
    # on one rank alone, which forgot to end the step: it is told to the others
    backward(net, opt, 4, rank)
    pending = opt.propose()
    if rank != 1:
        pending.discard()
    before = copies_of(net, opt)
    said.append(said_by(opt.step))
    assert are_equal(before, tensors_of(net, opt))
    opt.close()
    return said


def failed(rank: int, world_size: int, overlap: bool) -> list[str]:
    """One rank fails in propose: all raise, nothing changes, and the next step is that of a rank that never failed."""
    said = []
    (net, opt), (twin, other) = build(overlap=overlap), build(overlap=overlap)
    for step in range(4):
        backward(twin, other, step, rank)
        other.step()
        if step >= 2:
            backward(net, opt, step, rank)
            before, lr = copies_of(net, opt), opt.param_groups[0]["lr"]
            if rank == 1:
                opt.param_groups[0]["lr"] = "fast" if step == 2 else 0.5
            said.append(said_by(opt.propose))
            opt.param_groups[0]["lr"] = lr
            assert are_equal(before, tensors_of(net, opt))
            assert opt.stats().steps == step
        backward(net, opt, step, rank)
        opt.propose().commit()
        assert are_equal(tensors_of(net, opt), tensors_of(twin, other))
    opt._on_nonfinite = "raise"
    backward(net, opt, 4, rank, torch.inf if rank == 0 else 1.0)
    with pytest.raises(NonFiniteError, match=r"step 4: .* on rank 0"):
        opt.propose()
    for each in (opt, other):
        each.close()
    return said


def everything(rank: int, world_size: int) -> list[tuple[list[str], list[str]]]:
    for name in OPTIONS:
        discarded(rank, world_size, name)
    return [(ended_twice(rank, world_size, way), failed(rank, world_size, way)) for way in (False, True)]


OVER = "RuntimeError: commit, discard: expected a step that is pending, got one that has ended"
PENDING = "RuntimeError: step: expected commit() or discard() of the step that was proposed, got another step"
TOLD = "WorkersDisagreeError: step {} was taken by no worker, because of an error on rank 1 (reported there)"


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_that_is_proposed_happens_as_a_whole_or_not_at_all(world_size: int) -> None:
    for rank, answer in enumerate(results_of(everything, world_size, timeout=120.0)):
        for ended, failures in answer:
            assert ended == [OVER] * 3 + [PENDING, OVER, PENDING if rank == 1 else TOLD.format(5)]
            own = "TypeError: lr: expected a number or a 0-dim tensor, got 'fast'"
            others = "ranks 0, 2: 0.01; rank 1: 0.5" if world_size == 3 else "rank 0: 0.01; rank 1: 0.5"
            values = f"workers disagree on the hyperparameters (lr of param group 0) at step 3: {others}"
            assert failures == [own if rank == 1 else TOLD.format(2), f"WorkersDisagreeError: {values}"]


def test_one_rank_alone() -> None:
    discarded(0, 1, "ordinary")
    discarded(0, 1, "capturable")
    p = torch.ones(3).requires_grad_()
    opt = LionCub([p], lr=0.5)
    p.grad = torch.ones(3)
    pending = opt.propose()
    assert p.tolist() == [1.0] * 3
    pending.commit()
    assert p.tolist() == [0.5] * 3
    with pytest.raises(RuntimeError, match="got one that has ended"):
        pending.commit()
    opt.close()
    with pytest.raises(RuntimeError, match="expected an open optimizer"):
        opt.propose()
