"""LionCub: Lion for data-parallel training, with one bit per parameter on the wire."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.arguments import Hyperparameters, parameter_names
from lioncub.base import MomentumOptimizer, Params
from lioncub.buckets import Bucket, bucket_bytes_of, build_buckets
from lioncub.collectives import ALGORITHMS, Voter, average_, handshake
from lioncub.collectives.algorithms import Exchange, Tally
from lioncub.collectives.handshake import digest
from lioncub.collectives.header import FAILED, FOUND_INF, Header, check_agreement, decode_headers
from lioncub.collectives.transport import world_size_of
from lioncub.kernels import resolve_impl
from lioncub.replicas import broadcast_tensors, check_equal
from lioncub.stats import BucketStats, Stats
from lioncub.voting import Ballot, NonFiniteError, apply_bucket_, encode_bucket, judge

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
        self._voters: list[Voter] = []
        self._exchanges: list[Exchange] = []
        self._unequal: list[Tensor] = []
        self._unverified = True
        self._skipped = 0
        self._counts = (0, 0)
        super().__init__(params, lr, betas, weight_decay, maximize, impl, step=0)
        if self._workers > 1:
            device = self._buckets[0].device if self._buckets else torch.device("cpu")
            handshake(self._facts(), group=process_group, device=device)
            self._make_equal()
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

    def stats(self) -> Stats:
        """What the last step cost and how its votes fell; see `Stats`."""
        elements = max(sum(bucket.elements for bucket in self._buckets), 1)
        seconds = [exchange.seconds for exchange in self._exchanges]
        # a bucket that was added, or not reached by a step that failed, has not travelled yet
        seconds += [0.0] * (len(self._buckets) - len(seconds))
        routes = [(voter.algorithm, voter.bytes_sent) for voter in self._voters] or [("none", 0)] * len(self._buckets)
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
            for bucket in self._buckets:
                average_(bucket.exp_avg, group=self._group)

    @property
    def _step_count(self) -> int:
        # it stands in the param groups because those survive in every kind of checkpoint
        return int(self.param_groups[0]["step"])

    def _create_state(self, group_index: int) -> None:
        group = self.param_groups[group_index]
        group["step"] = self._step_count
        named = list(zip(parameter_names(group, group_index), group["params"], strict=True))
        for bucket in build_buckets(group_index, named, self._bucket_bytes):
            for i, slot in enumerate(bucket.slots):
                self.state[slot.param]["exp_avg"] = bucket.momentum_view(i)
            self._buckets.append(bucket)
            if self._workers > 1:
                self._voters.append(
                    Voter(
                        bucket.n_bytes,
                        n_tensors=len(bucket.slots),
                        group=self._group,
                        algorithm=self._algorithm,
                        impl=self._impl,
                    )
                )
        self._unequal.extend(group["params"])
        self._unverified = True
        self._layout = digest([bucket.layout() for bucket in self._buckets])

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
        if self._broadcast:
            broadcast_tensors(self._unequal, group=self._group)
        self._unequal = []

    def _check_process_group(self) -> None:
        if self._workers == 1 and dist.is_initialized() and self._group is None and dist.get_world_size() > 1:
            raise RuntimeError(
                "process_group: expected torch.distributed to be initialised before LionCub is built, got a group of "
                f"{dist.get_world_size()} workers that came later: this optimizer would not communicate"
            )

    def _take_step(self) -> None:
        step = self._step_count
        # a GradScaler sets both for the duration of its step; a scale of None means that gradients are unscaled already
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        found_inf = overflow is not None and bool(overflow)
        now, ballots, tallies, headers = self._vote(step, grad_scale, FOUND_INF if found_inf else 0)
        verdict = judge(self._buckets, headers)
        if verdict.found_inf or verdict.nonfinite is not None:
            self._pass_over(step, verdict.found_inf, verdict.nonfinite)
            return
        for i, bucket in enumerate(self._buckets):
            voted = tallies[i].packed if tallies else None
            taking_part, group_now = verdict.taking_part[i], now[bucket.group_index]
            apply_bucket_(bucket, ballots[i], voted, taking_part, group_now, grad_scale, self._impl)
        self._count_votes(tallies)
        self._advance()

    def _vote(
        self, step: int, grad_scale: float, flags: int
    ) -> tuple[list[Hyperparameters], list[Ballot], list[Tally], list[list[Header]]]:
        """Encode and exchange all buckets; nothing is changed. Raises on all workers where one of them cannot go on."""
        now: list[Hyperparameters] = []
        ballots: list[Ballot] = []
        failure: Exception | None = None
        try:
            now = [Hyperparameters.of(group) for group in self.param_groups]
        except (TypeError, ValueError) as error:
            failure = error
        self._exchanges = []
        for i, bucket in enumerate(self._buckets):
            if failure is None:
                try:
                    group_now = now[bucket.group_index]
                    ballots.append(encode_bucket(bucket, group_now, step, grad_scale, self._impl))
                # whatever it is, the others wait for this worker's message: it is raised once they know
                except Exception as error:
                    failure = error
            header = Header(
                step=step,
                layout=self._layout,
                hyperparameters=digest(now),
                flags=flags if failure is None else FAILED,
                has_gradient=ballots[i].has_gradient if failure is None else (False,) * len(bucket.slots),
            )
            self._send(i, ballots[i] if failure is None else None, header)
            if i == 0 and self._unverified and self._voters:
                self._verify(failure)
        tallies = self._collect()
        headers = [
            decode_headers(tally.headers, len(bucket.slots))
            for tally, bucket in zip(tallies, self._buckets, strict=False)
        ]
        if failure is not None:
            raise failure
        if not self._voters:
            return now, ballots, [], [[_own_header(ballot, flags)] for ballot in ballots]
        for of_bucket in headers:
            check_agreement(of_bucket)
        return now, ballots, tallies, headers

    def _send(self, i: int, ballot: Ballot | None, header: Header) -> None:
        if not self._voters:
            return
        bucket, voter = self._buckets[i], self._voters[i]
        packed = ballot.packed if ballot else torch.zeros(bucket.n_bytes, dtype=torch.uint8, device=bucket.device)
        self._exchanges.append(voter.start(packed, header, ballot.status if ballot else None))

    def _collect(self) -> list[Tally]:
        # every worker starts the second phases in the order of the buckets
        for exchange in self._exchanges:
            exchange.advance()
        return [exchange.result() for exchange in self._exchanges]

    def _verify(self, failure: Exception | None) -> None:
        """After construction or a new group: the first message tells whether the others have the same parameters."""
        tally = self._exchanges[0].result()
        if failure is not None:
            raise failure
        check_agreement(decode_headers(tally.headers, len(self._buckets[0].slots)))
        self._make_equal()
        self.check_replicas()
        self._unverified = False

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

    def _count_votes(self, tallies: Sequence[Tally]) -> None:
        ties = unanimous = 0
        for tally, bucket in zip(tallies, self._buckets, strict=False):
            counts = tally.counts.tolist()
            ties += counts[0]
            # pad codes of the message are 0 on every worker, hence unanimous
            unanimous += counts[1] - (8 * bucket.n_bytes - bucket.elements)
        self._counts = (ties, unanimous) if tallies else (0, sum(bucket.elements for bucket in self._buckets))

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


def _own_header(ballot: Ballot, flags: int) -> Header:
    """What one worker alone would have said."""
    bad = ballot.status.nonzero()
    return Header(nonfinite=int(bad[0]) + 1 if len(bad) else 0, flags=flags, has_gradient=ballot.has_gradient)
