"""One step's votes: what this worker brings, the exchange of its buckets, the verdict before anything is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, gradient_of
from lioncub.buckets import Bucket
from lioncub.collectives import Voter
from lioncub.collectives.algorithms import Exchange
from lioncub.collectives.handshake import digest
from lioncub.collectives.header import FAILED, FOUND_INF, Header, check_agreement, decode_headers
from lioncub.kernels import foreach_lion_encode


class NonFiniteError(ArithmeticError):
    """A gradient, momentum or update of some worker is not finite; no worker changed anything."""


@dataclass(frozen=True)
class Ballot:
    """One bucket on this worker: gradients in storage order, who has one, packed codes, and int32 status per tensor."""

    grads: list[Tensor]
    has_gradient: tuple[bool, ...]
    packed: Tensor
    status: Tensor


@dataclass(frozen=True)
class BucketVote:
    """One bucket after its exchange: this worker's ballot, the voted codes (None for one worker), everyone's header.

    ``ties`` and ``unanimous`` count codes, pad codes not among them; ``seconds`` is the exchange's.
    """

    ballot: Ballot
    voted: Tensor | None
    headers: list[Header]
    ties: int
    unanimous: int
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """What all workers make of a step: skip it, or go on; per bucket, which parameters have a gradient somewhere."""

    found_inf: bool
    nonfinite: str | None
    taking_part: list[tuple[bool, ...]]


class Draft:
    """What this worker brings to a step.

    Whatever goes wrong in making it is kept in ``failure``: the other workers wait for this one's messages, so it is
    raised only when they have been told.
    """

    def __init__(self, step: int, layout: int, flags: int, impl: str) -> None:
        self.step, self.layout, self.flags, self.impl = step, layout, flags, impl
        self.now: list[Hyperparameters] = []
        self.grad_scale = 1.0
        self.failure: Exception | None = None

    def attempt(self, part: Callable[[], None]) -> None:
        """Run ``part`` unless something failed before, and keep what it raises."""
        if self.failure is None:
            try:
                part()
            except Exception as error:
                self.failure = error

    def read(self, groups: Sequence[dict[str, object]], scale: Tensor | None, overflow: Tensor | None) -> None:
        """Take the hyperparameters of all groups, and what a GradScaler set: its scale, None where unscaled already."""
        self.now = [Hyperparameters.of(group) for group in groups]
        if scale is not None:
            if not 0 < float(scale) < math.inf:
                raise ValueError(f"grad_scale: expected a finite scale > 0, got {float(scale)}")
            self.grad_scale = 1.0 / float(scale)
        if overflow is not None and bool(overflow):
            self.flags |= FOUND_INF

    def grad_scale_of(self, bucket: Bucket) -> float:
        """What the gradients of a bucket are multiplied by: the inverse loss scale, negative where maximized."""
        return -self.grad_scale if self.now[bucket.group_index].maximize else self.grad_scale

    def header(self, bucket: Bucket, ballot: Ballot | None) -> Header:
        """The header of this worker's message about a bucket."""
        return Header(
            step=self.step,
            layout=self.layout,
            hyperparameters=digest(self.now),
            flags=FAILED if ballot is None else self.flags,
            has_gradient=(False,) * len(bucket.slots) if ballot is None else ballot.has_gradient,
        )


def encode_bucket(bucket: Bucket, draft: Draft) -> Ballot:
    """Pack the votes of a bucket. Reads momentum and gradients, changes neither; no gradient votes with zeros."""
    found = []
    for slot in bucket.slots:
        slot.check_unchanged(bucket.device)
        found.append(gradient_of(slot.name, slot.param))
    grads = [bucket.zeros_for(slot) if grad is None else grad for slot, grad in zip(bucket.slots, found, strict=True)]
    packed = torch.empty(bucket.n_bytes, dtype=torch.uint8, device=bucket.device)
    status = torch.zeros(len(bucket.slots), dtype=torch.int32, device=bucket.device)
    foreach_lion_encode(
        bucket.momenta,
        grads,
        beta1=draft.now[bucket.group_index].beta1,
        parity=draft.step,
        out=bucket.split(packed),
        status=status,
        grad_scale=draft.grad_scale_of(bucket),
        impl=draft.impl,
    )
    return Ballot(grads, tuple(grad is not None for grad in found), packed, status)


def exchange(buckets: Sequence[Bucket], voters: Sequence[Voter | None], draft: Draft) -> list[BucketVote]:
    """Encode, send and vote on buckets, all in flight at once; nothing is changed. A collective call.

    Where this worker fails, it still sends (saying so) what the others wait for, and raises its error afterwards; they
    raise WorkersDisagreeError, as all do where workers disagree.
    """
    ballots: list[Ballot] = []
    exchanges: list[Exchange] = []
    for bucket, voter in zip(buckets, voters, strict=True):
        draft.attempt(lambda bucket=bucket: ballots.append(encode_bucket(bucket, draft)))  # type: ignore[misc]
        if voter is not None:
            ballot = ballots[-1] if draft.failure is None else None
            packed = (
                torch.zeros(bucket.n_bytes, dtype=torch.uint8, device=bucket.device)
                if ballot is None
                else ballot.packed
            )
            status = None if ballot is None else ballot.status
            exchanges.append(voter.start(packed, draft.header(bucket, ballot), status))
    # every worker starts the second phases in the order of the buckets
    for pending in exchanges:
        pending.advance()
    votes = [_finish(bucket, pending) for bucket, pending in zip(buckets, exchanges, strict=False)]
    if draft.failure is not None:
        raise draft.failure
    if not exchanges:
        return [_alone(bucket, ballot, draft) for bucket, ballot in zip(buckets, ballots, strict=True)]
    for _, headers, *_ in votes:
        check_agreement(headers)
    return [BucketVote(ballot, *vote) for ballot, vote in zip(ballots, votes, strict=True)]


def judge(buckets: Sequence[Bucket], votes: Sequence[BucketVote]) -> Verdict:
    """The same verdict on every worker, from every worker's header of every bucket."""
    found_inf = any(header.flags & FOUND_INF for vote in votes for header in vote.headers)
    nonfinite = None
    for bucket, vote in zip(buckets, votes, strict=True):
        first = min((header.nonfinite for header in vote.headers if header.nonfinite), default=0)
        if first and nonfinite is None:
            ranks = [str(rank) for rank, header in enumerate(vote.headers) if header.nonfinite == first]
            nonfinite = f"parameter {bucket.slots[first - 1].name} on rank {', '.join(ranks)}"
    taking_part = [
        tuple(any(present) for present in zip(*(header.has_gradient for header in vote.headers), strict=True))
        for vote in votes
    ]
    return Verdict(found_inf, nonfinite, taking_part)


def _finish(bucket: Bucket, pending: Exchange) -> tuple[Tensor, list[Header], int, int, float]:
    tally = pending.result()
    headers = decode_headers(tally.headers, len(bucket.slots))
    ties, unanimous = tally.counts.tolist()
    # pad codes of the message are 0 on every worker, hence unanimous
    return tally.packed, headers, ties, unanimous - (8 * bucket.n_bytes - bucket.elements), pending.seconds


def _alone(bucket: Bucket, ballot: Ballot, draft: Draft) -> BucketVote:
    """What one worker alone says to itself."""
    bad = ballot.status.nonzero()
    header = Header(nonfinite=int(bad[0]) + 1 if len(bad) else 0, flags=draft.flags, has_gradient=ballot.has_gradient)
    return BucketVote(ballot, None, [header], 0, bucket.elements, 0.0)
