"""A step in two halves, over real Gloo processes: what each half changes, and errors that are told to all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_workers import on_ranks, said_by
from nets import Net, all_bits, batch_of, groups_of
from optimizers import LionCub

from lioncub import BySize, MomentumSync, Quantized, SignVote

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


def build(**options: Any) -> tuple[Net, LionCub]:
    net = Net(seed=0)
    return net, LionCub(groups_of(net), lr=1e-2, bucket_mb=2e-5, **{"on_nonfinite": "skip", **options})


def backward(net: Net, opt: LionCub, step: int, rank: int, factor: float = 1.0) -> None:
    opt.zero_grad()
    images, tokens = batch_of(100 * step + rank)
    net(images * factor, tokens, use_all=rank != 1).backward()


OVER = "RuntimeError: commit, discard: expected a step that is pending, got one that has ended"
PENDING = "RuntimeError: step: expected commit() or discard() of the step that was proposed, got another step"
TOLD = "WorkersDisagreeError: step {} was taken by no worker, because of an error on rank 1 (reported there)"


def assert_discarding_is_skipping(rank: int, name: str) -> None:
    """Discard the fourth step of one optimizer; a NaN makes a twin skip it."""
    options = OPTIONS[name]
    (net, opt), (twin, other) = build(**options), build(**options)
    for step in range(7):
        backward(net, opt, step, rank)
        backward(twin, other, step, rank, torch.inf if step == 3 and rank == 0 else 1.0)
        if step == 3:
            before = all_bits(opt)
            pending = opt.propose()
            assert pending.takes_step is (None if name == "capturable" else True)
            assert before == all_bits(opt), "proposing must change nothing"
            assert opt.stats().steps == 3
            pending.discard()
            assert before == all_bits(opt), "discarding must change nothing"
            skipped = other.propose()
            assert skipped.takes_step is (None if name == "capturable" else False)
            skipped.commit()
        elif step % 2:
            opt.propose().commit()
            other.step()
        else:
            opt.step()
            other.propose().commit()
        assert all_bits(opt) == all_bits(other), f"{name}, step {step}"
        assert opt.stats().steps == other.stats().steps == step + 1
        assert opt.stats().skipped_steps == other.stats().skipped_steps == int(step >= 3)
    opt.check_replicas()
    for each in (opt, other):
        each.close()


@on_ranks(2, 3)
def test_a_step_that_is_proposed_happens_as_a_whole_or_not_at_all(rank: int, world_size: int) -> None:
    for name in OPTIONS:
        assert_discarding_is_skipping(rank, name)


@pytest.mark.parametrize("overlap", [False, True])
@on_ranks(2, 3)
def test_a_step_ends_once(rank: int, world_size: int, overlap: bool) -> None:
    net, opt = build(overlap=overlap)
    for step, ends in enumerate((("commit", "commit"), ("commit", "discard"), ("discard", "commit"))):
        backward(net, opt, step, rank)
        pending = opt.propose()
        getattr(pending, ends[0])()
        after = all_bits(opt)
        assert said_by(getattr(pending, ends[1])) == OVER
        assert after == all_bits(opt)
        assert (opt.stats().steps, opt.stats().skipped_steps) == (step + 1, int(step == 2))
    # a step while another is pending, on all ranks: neither is taken
    backward(net, opt, 3, rank)
    before, pending = all_bits(opt), opt.propose()
    assert [said_by(opt.propose), said_by(pending.commit)] == [PENDING, OVER]
    assert before == all_bits(opt)
    backward(net, opt, 3, rank)
    opt.step()
    opt.check_replicas()
    assert opt.stats().steps == 4
    # on one rank alone, which forgot to end the step: it is told to the others
    backward(net, opt, 4, rank)
    pending = opt.propose()
    if rank != 1:
        pending.discard()
    before = all_bits(opt)
    assert said_by(opt.step) == (PENDING if rank == 1 else TOLD.format(5))
    assert before == all_bits(opt)
    opt.close()


@pytest.mark.parametrize("overlap", [False, True])
@on_ranks(2, 3)
def test_what_fails_in_propose_is_raised_by_all_and_changes_nothing(rank: int, world_size: int, overlap: bool) -> None:
    """The next step is that of a rank that never failed."""
    (net, opt), (twin, other) = build(overlap=overlap), build(overlap=overlap)
    others = "ranks 0, 2: 0.01; rank 1: 0.5" if world_size == 3 else "rank 0: 0.01; rank 1: 0.5"
    differ = f"WorkersDisagreeError: workers disagree on the hyperparameters (lr of param group 0) at step 3: {others}"
    own = "TypeError: lr: expected a number or a 0-dim tensor, got 'fast'"
    for step in range(4):
        backward(twin, other, step, rank)
        other.step()
        if step >= 2:
            backward(net, opt, step, rank)
            before, lr = all_bits(opt), opt.param_groups[0]["lr"]
            if rank == 1:
                opt.param_groups[0]["lr"] = "fast" if step == 2 else 0.5
            expected = differ if step == 3 else own if rank == 1 else TOLD.format(2)
            assert said_by(opt.propose) == expected
            opt.param_groups[0]["lr"] = lr
            assert before == all_bits(opt)
            assert opt.stats().steps == step
        backward(net, opt, step, rank)
        opt.propose().commit()
        assert all_bits(opt) == all_bits(other)
    raising, again = build(overlap=overlap, on_nonfinite="raise")
    backward(raising, again, 0, rank, torch.inf if rank == 0 else 1.0)
    assert said_by(again.propose).startswith("NonFiniteError: step 0: ")
    for each in (opt, other, again):
        each.close()


def test_one_rank_alone() -> None:
    assert_discarding_is_skipping(0, "ordinary")
    assert_discarding_is_skipping(0, "capturable")
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
