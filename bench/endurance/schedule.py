"""Random schedules of what a training run may meet, the same on all ranks but for their gradients and faults."""

from __future__ import annotations

import copy
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from endurance.ranks import answers_of
from lioncub import (
    BySize,
    Comm,
    LionCub,
    MomentumSync,
    NonFiniteError,
    Precision,
    Quantized,
    SignMean,
    SignVote,
    TernaryVote,
    WorkersDisagreeError,
)

_SHAPES = ((65,), (7, 9), (40, 40), (1,), (0,), (129, 3))
_STEPS = 150
_COMPRESSIONS = (
    None,
    SignVote(),
    SignMean(),
    TernaryVote(),
    Quantized(bits=4, norm="linf", stochastic=True),
    Quantized(bits=2, block=16, share_scales_every=3),
    BySize(small=TernaryVote(), max_numel=100),
)
_SYNCS = (None, MomentumSync(every=4), MomentumSync(every=3, schedule="staggered", dtype="int8"))
_PRECISIONS = (Precision(), Precision(master_weights=True), Precision(param_rounding="stochastic"))


def run_schedules(seed: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Run schedules for so long; return counts and what went wrong."""
    counts, wrong, ends = Counter[str](), list[str](), time.monotonic() + seconds
    trial = seed * 1_000_003
    while time.monotonic() < ends:
        size = 2 + trial % 4
        found = answers_of(_run, size, trial, seconds=240.0)
        texts = [f"seed {trial}, rank {rank} of {size}: {one}" for rank, one in enumerate(found) if not _is_fine(one)]
        wrong += texts
        if not texts:
            counts.update(found[0])
        counts["schedules"] += 1
        trial += 1
    return counts, wrong


def _is_fine(found: Any) -> bool:
    return isinstance(found, Counter)


@dataclass
class _Run:
    """A rank of one schedule. ``chance`` is the same on all ranks, ``own`` is not."""

    rank: int
    size: int
    chance: random.Random
    own: torch.Generator
    params: list[Tensor]
    opt: LionCub
    overlap: bool
    counts: Counter[str]

    def backward(self, bad: float | None = None) -> None:
        """Give some parameters gradients, through autograd; a bad number on one rank where asked for."""
        self.opt.zero_grad()
        loss = torch.zeros(())
        for i, param in enumerate(self.params):
            has = torch.rand((), generator=self.own) > 0.2 or i == 0
            if has and param.requires_grad:
                grad = torch.randn(param.shape, generator=self.own)
                if bad is not None and i == 0:
                    grad.view(-1)[0] = bad
                loss = loss + (param.float() * grad).sum()
        if loss.requires_grad:
            loss.backward()

    def step(self) -> None:
        """Take an ordinary step."""
        self.backward()
        self.opt.step()
        self.counts["steps"] += 1

    def bad_step(self) -> None:
        """Take a step in which one rank has NaN or Inf."""
        victim, bad = self.chance.randrange(self.size), self.chance.choice((math.nan, math.inf))
        self.backward(bad if self.rank == victim else None)
        try:
            self.opt.step()
        except NonFiniteError:
            self.counts["raised"] += 1
        else:
            self.counts["skipped"] += 1

    def failing_step(self) -> None:
        """Take a step that fails on one rank alone."""
        victim = self.chance.randrange(self.size)
        self.backward()
        if self.rank == victim:
            self.params[0].grad = torch.zeros_like(self.params[0]).to_sparse()
        try:
            self.opt.step()
        except (TypeError, ValueError, RuntimeError, WorkersDisagreeError):
            self.counts["failed on one"] += 1
            return
        raise AssertionError("a step with a gradient that cannot be read was taken")

    def discarded_step(self) -> None:
        """Propose a step, and drop it."""
        self.backward()
        self.opt.propose(abstain=self.rank == self.chance.randrange(self.size)).discard()
        self.counts["discarded"] += 1

    def change_rates(self) -> None:
        """Change lr on all ranks."""
        for group in self.opt.param_groups:
            group["lr"] = 10 ** self.chance.uniform(-4, -1)

    def freeze(self) -> None:
        """Freeze a parameter, or thaw it."""
        param = self.params[self.chance.randrange(len(self.params))]
        param.requires_grad_(not param.requires_grad)

    def save_and_load(self) -> None:
        """Load what was just saved; nothing may change."""
        before = [param.detach().clone() for param in self.params]
        self.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        assert all(torch.equal(old, param) for old, param in zip(before, self.params, strict=True))
        self.counts["loaded"] += 1

    def add_group(self) -> None:
        """Add a group of another parameter."""
        if len(self.params) > 10:
            return
        new = torch.randn(self.chance.randrange(1, 200)).requires_grad_()
        self.params.append(new)
        self.opt.add_param_group({"params": [new]})
        self.counts["groups"] += 1

    def rebind(self) -> None:
        """Go on without the last rank for a few steps, and take it in again with what the first one has."""
        if self.size < 3:
            return
        rest = dist.new_group(list(range(self.size - 1)))
        if self.rank < self.size - 1:
            self.opt.rebind(rest)
            for _ in range(3):
                self.step()
        found: list[Any] = [None]
        if self.rank == 0:
            found = [([param.detach() for param in self.params], self.opt.state_dict())]
        dist.broadcast_object_list(found, src=0)
        if self.rank == self.size - 1:
            params, state = found[0]
            with torch.no_grad():
                for mine, theirs in zip(self.params, params, strict=True):
                    mine.copy_(theirs)
            self.opt.load_state_dict({**state, "param_groups": _averaged(state["param_groups"])})
        self.opt.rebind(None)
        self.counts["rebound"] += 1


def _averaged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # the first rank's momentum is taken over on purpose
    return [{**group, "momentum_state": "averaged"} for group in groups]


def _run(rank: int, size: int, say: Callable[[Any], None], seed: int) -> Counter[str]:
    chance = random.Random(seed)
    torch.manual_seed(seed)
    overlap, capturable = chance.choice(((False, False), (True, False), (False, True)))
    precision = chance.choice(_PRECISIONS)
    dtype = torch.float32 if precision == Precision() else torch.bfloat16
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in _SHAPES]
    options: dict[str, Any] = {
        "compression": chance.choice(_COMPRESSIONS),
        "momentum_sync": None if capturable else chance.choice(_SYNCS),
        "overlap": overlap,
        "capturable": capturable,
        "precision": precision,
        "on_nonfinite": "skip" if capturable else chance.choice(("skip", "raise")),
        "comm": Comm(algorithm=chance.choice(("all_gather", "reduce_scatter")), bucket_mb=chance.choice((1e-4, 1.0))),
    }
    opt = LionCub([{"params": params[:3]}, {"params": params[3:]}], lr=1e-2, **options)
    own = torch.Generator().manual_seed(1000 * seed + rank)
    run = _Run(rank, size, chance, own, params, opt, overlap, Counter())
    actions = {run.step: 80, run.bad_step: 5, run.discarded_step: 3, run.change_rates: 4, run.save_and_load: 3}
    actions |= {run.freeze: 2}
    if not capturable:
        # a capturable step tells of them in the next one, and is never verified anew
        actions |= {run.failing_step: 2, run.add_group: 1, run.rebind: 1}
    for _ in range(_STEPS):
        action = chance.choices(list(actions), list(actions.values()))[0]
        action()
        if capturable and action == run.save_and_load:
            opt.verify()
        opt.check_replicas()
    opt.raise_errors()
    opt.close()
    return run.counts
