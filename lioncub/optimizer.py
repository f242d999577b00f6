"""LionCub: Lion for data-parallel training, with one bit per parameter on the wire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.applying import plan_bucket
from lioncub.arguments import parameter_names
from lioncub.base import MomentumOptimizer, Params
from lioncub.buckets import Bucket, bucket_bytes_of, build_buckets
from lioncub.collectives import ALGORITHMS, Voter, average_, handshake
from lioncub.collectives.handshake import digest
from lioncub.collectives.header import UNVERIFIED
from lioncub.collectives.transport import world_size_of
from lioncub.kernels import resolve_impl
from lioncub.replicas import broadcast_tensors, check_equal
from lioncub.stats import BucketStats, Stats
from lioncub.voting import BucketVote, Draft, NonFiniteError, exchange, judge

_LOG = logging.getLogger("lioncub")


class LionCub(MomentumOptimizer):
    """Lion whose workers agree by majority vote on packed signs (Lion Cub, arXiv 2411.16462).

    Every worker keeps its own gradients and momentum, votes with the sign of its update, and moves by the majority:
    p = p*(1 - lr*wd) - lr*(+1 or -1). Replicas stay bit-identical. A step is taken by all workers or by none. One
    worker alone takes plain Lion steps, bit for bit those of `Lion`.

    Construction is a collective call (a handshake, then the broadcast), `step` too. The model is not wrapped in
    DistributedDataParallel, or is handed to `keep_gradients_local`. docs/numerics.md has the rules in full.

    Args:
        params: dense fp32, bf16 or fp16 parameters of any dense strides, named ones, or param groups.
        lr, betas, weight_decay: as in `Lion`; those of every group are read at each step.
        process_group: workers that vote together; the default group, or one worker where there is none.
        algorithm: "all_gather", "reduce_scatter" or "auto" (the faster of them by message size).
        bucket_mb: largest message, in MiB of packed votes (1 MiB is 8.4 M parameters).
        broadcast: start from the parameters of the group's first rank.
        on_nonfinite: where any gradient, momentum or update of any worker is not finite, "raise" NonFiniteError on
            all workers or "skip" the step on all.
        maximize: ascend instead of descend.
        impl: kernels to use: "auto", "triton", "cpu" or "reference".

    Raises ValueError or TypeError for arguments that are impossible, WorkersDisagreeError on all workers where their
    parameters or options differ.
    """

    # GradScaler hands over grad_scale and found_inf instead of skipping the step on one worker alone
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        process_group: dist.ProcessGroup | None = None,
        algorithm: str = "auto",
        bucket_mb: float = 1.0,
        broadcast: bool = True,
        on_nonfinite: str = "raise",
        maximize: bool = False,
        impl: str = "auto",
    ) -> None:
        if algorithm not in ("auto", *ALGORITHMS):
            raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
        self._bucket_bytes = bucket_bytes_of(bucket_mb)
        self._group, self._algorithm = process_group, algorithm
        self._broadcast, self._on_nonfinite = broadcast, on_nonfinite
        self._workers = world_size_of(process_group) if process_group or dist.is_initialized() else 1
        self._buckets: list[Bucket] = []
        self._voters: list[Voter | None] = []
        # parameters to broadcast, and the number of buckets that all workers are known to have
        self._unequal: list[Tensor] = []
        self._agreed = 0
        self._unverified, self._interrupted = True, False
        self._seconds: list[float] = []
        self._skipped = 0
        self._counts = (0, 0)
        super().__init__(params, lr, betas, weight_decay, maximize, impl, step=0)
        if not self._buckets:
            raise ValueError("params: expected at least one parameter, got none")
        if self._workers > 1:
            handshake(self._facts(), group=process_group, device=self._buckets[0].device)
            self._make_equal()
        self._agreed = len(self._buckets)
        self._announce()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with momentum of its own, on all workers before the same step.

        It communicates nothing: the next step finds out whether all workers added the same, and makes the new
        parameters equal. Where the group is refused, nothing has changed.
        """
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on all workers or on none; gives the closure's loss. A collective call.

        Mutates parameters and momentum, after every vote and status is known. Raises NonFiniteError (or skips, by
        ``on_nonfinite``; under a GradScaler an overflow always skips) and WorkersDisagreeError on all workers alike.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_process_group()
        try:
            self._take_step()
        except Exception:
            # a GradScaler takes these back only after a step that returns; left behind, they would scale the next one
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this worker, bit for bit; the next step compares all workers' parameters by hash.

        Raises ValueError or TypeError, with nothing changed, where groups, shapes or dtypes do not fit.
        """
        super().load_state_dict(state_dict)
        self._unverified, self._interrupted = True, False

    def stats(self) -> Stats:
        """What the last step cost and how its votes fell; see `Stats`."""
        elements = max(sum(bucket.elements for bucket in self._buckets), 1)
        # a bucket that was added has not travelled yet
        seconds = [*self._seconds, *[0.0] * (len(self._buckets) - len(self._seconds))]
        routes = [("none", 0) if voter is None else (voter.algorithm, voter.bytes_sent) for voter in self._voters]
        buckets = tuple(
            BucketStats(bucket.elements, algorithm, sent, took)
            for bucket, (algorithm, sent), took in zip(self._buckets, routes, seconds, strict=True)
        )
        return Stats(
            steps=self._step_count,
            skipped_steps=self._skipped,
            bytes_sent_per_step=sum(bucket.bytes_sent for bucket in buckets),
            communication_seconds=sum(seconds),
            tied=self._counts[0] / elements,
            unanimous=self._counts[1] / elements,
            buckets=buckets,
        )

    def check_replicas(self) -> None:
        """Verify that all workers' parameters are bit-identical; a collective call.

        Raises WorkersDisagreeError on all workers, naming the first parameter that differs.
        """
        if self._workers > 1:
            check_equal(self._named_parameters(), group=self._group)

    def sync_momentum(self) -> None:
        """Average momentum over workers, summed in rank order, so that all hold the same bits; a collective call.

        Before `state_dict`, it makes one worker's file serve any number of workers.
        """
        if self._workers > 1:
            handshake({"the bucket layout": self._layout}, group=self._group, device=self._buckets[0].device)
            for bucket in self._buckets:
                average_(bucket.exp_avg, group=self._group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LionCub cannot be copied or pickled, since its process group cannot; use state_dict()")

    @property
    def _step_count(self) -> int:
        # it stands in the param groups because those survive in every kind of checkpoint
        return int(self.param_groups[0]["step"])

    def _create_state(self, group_index: int) -> None:
        group = self.param_groups[group_index]
        named = list(zip(parameter_names(group, group_index), group["params"], strict=True))
        buckets = build_buckets(group_index, named, self._bucket_bytes)
        voters = [self._voter_for(bucket) for bucket in buckets]
        group["step"] = self._step_count
        for bucket in buckets:
            for slot, view in zip(bucket.slots, bucket.views, strict=True):
                self.state[slot.param]["exp_avg"] = view
        self._buckets += buckets
        self._voters += voters
        self._unequal += group["params"]
        self._unverified = True
        self._layout = digest([bucket.layout() for bucket in self._buckets])

    def _voter_for(self, bucket: Bucket) -> Voter | None:
        if self._workers == 1:
            return None
        return Voter(
            bucket.n_bytes,
            n_tensors=len(bucket.slots),
            group=self._group,
            algorithm=self._algorithm,
            impl=self._impl,
        )

    def _facts(self) -> dict[str, object]:
        """What workers must have in common, by the names that an error gives it."""
        facts: dict[str, object] = {
            "the number of parameters": len(self._named_parameters()),
            "algorithm": self._algorithm,
            "bucket_mb": self._bucket_bytes / 2**20,
            "broadcast": self._broadcast,
            "on_nonfinite": self._on_nonfinite,
        }
        slots = [(bucket.group_index, slot) for bucket in self._buckets for slot in bucket.slots]
        for i, (group_index, slot) in enumerate(slots):
            facts[f"parameter {i}"] = (
                f"{slot.name} of {slot.dtype}, shape {slot.shape}, strides {slot.stride}, group {group_index}"
            )
        return facts

    def _make_equal(self) -> None:
        if self._broadcast and self._workers > 1:
            broadcast_tensors(self._unequal, group=self._group)
        self._unequal = []

    def _check_process_group(self) -> None:
        if self._workers == 1 and dist.is_initialized() and self._group is None and dist.get_world_size() > 1:
            raise RuntimeError(
                "process_group: expected torch.distributed to be initialised before LionCub is built, got a group of "
                f"{dist.get_world_size()} workers that came later: this optimizer would not communicate"
            )

    def _take_step(self) -> None:
        flags = UNVERIFIED if self._unverified else 0
        draft = Draft(self._step_count, self._layout, flags, self._impl)
        # a GradScaler sets both for the duration of its step
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        draft.attempt(self._check_state)
        draft.attempt(lambda: draft.read(self.param_groups, scale, overflow))
        votes = self._vote(draft)
        verdict = judge(self._buckets, votes)
        self._seconds = [vote.seconds for vote in votes]
        if verdict.found_inf or verdict.nonfinite is not None:
            self._pass_over(draft.step, verdict.found_inf, verdict.nonfinite)
            return
        moves = [
            plan_bucket(bucket, vote, taking_part, draft)
            for bucket, vote, taking_part in zip(self._buckets, votes, verdict.taking_part, strict=True)
        ]
        self._interrupted = True
        for move in moves:
            move()
        self._counts = sum(vote.ties for vote in votes), sum(vote.unanimous for vote in votes)
        self._advance()
        self._interrupted = False

    def _vote(self, draft: Draft) -> list[BucketVote]:
        """Exchange all buckets: first those that all workers are known to have, then those of groups added since."""
        known = self._agreed
        votes = exchange(self._buckets[:known], self._voters[:known], draft)
        if any(header.flags & UNVERIFIED for vote in votes for header in vote.headers):
            # by now all have the same layout and know that some worker's parameters may be new or loaded
            self._make_equal()
            self.check_replicas()
            self._unverified, self._agreed = False, len(self._buckets)
            draft.flags &= ~UNVERIFIED
        return votes + exchange(self._buckets[known:], self._voters[known:], draft)

    def _check_state(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "an earlier step was interrupted while it wrote parameters, so replicas may differ: load a checkpoint"
            )
        for bucket in self._buckets:
            for slot, view in zip(bucket.slots, bucket.views, strict=True):
                if self.state[slot.param].get("exp_avg") is not view:
                    raise RuntimeError(
                        f"state of parameter {slot.name}: expected the exp_avg made at construction, got another "
                        "object; change momentum in place or through load_state_dict"
                    )

    def _pass_over(self, step: int, found_inf: bool, nonfinite: str | None) -> None:
        """Skip the step on all workers, or raise on all."""
        if not found_inf and self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"step {step}: a gradient, momentum or update is not finite, first in {nonfinite}; no worker changed "
                "anything"
            )
        _LOG.info("step %d skipped on all workers: %s", step, nonfinite or "the gradient scaler found an overflow")
        self._skipped += 1
        self._advance()

    def _advance(self) -> None:
        step = self._step_count + 1
        for group in self.param_groups:
            group["step"] = step

    def _announce(self) -> None:
        if self._workers > 1 and dist.get_rank(self._group) != 0:
            return
        impls = sorted({resolve_impl(self._impl, bucket.device) for bucket in self._buckets})
        stats = self.stats()
        _LOG.info(
            "LionCub: %d worker(s), %s kernels, %d bucket(s) by %s, %d bytes sent per worker and step",
            self._workers,
            "+".join(impls),
            len(self._buckets),
            "+".join(sorted({bucket.algorithm for bucket in stats.buckets})),
            stats.bytes_sent_per_step,
        )
