"""One step's votes: what this worker brings, the exchange of its buckets, the verdict before anything is applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, gradient_of
from lioncub.buckets import Bucket
from lioncub.collectives import Voter
from lioncub.collectives.average import Averaging
from lioncub.collectives.exchange import Exchange
from lioncub.collectives.handshake import digest
from lioncub.collectives.header import FAILED, FOUND_INF, STALE, Header, check_agreement, decode_headers
from lioncub.encoding import Terms, encode
from lioncub.kernels import abstain_parity

# what workers have agreed to quantize a bucket by
ScalesOf = Callable[[Bucket], list[Tensor] | None]
NO_GRADIENT_TO_SCALE = (
    "GradScaler: expected a gradient on every worker, got none on this one, where its update() would fail and leave "
    "the others waiting; give one parameter a gradient of zeros"
)


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
class Mail:
    """One bucket's message, before it is sent; without a ballot where this worker has failed."""

    ballot: Ballot | None
    packed: Tensor
    header: Header
    status: Tensor | None


@dataclass(frozen=True)
class BucketVote:
    """One bucket after its exchange: this worker's ballot, the voted codes (None for one worker), everyone's header.

    ``ties`` and ``unanimous`` count codes, pad codes not among them; ``seconds`` is the exchange's. ``average`` is that
    of momentum, where it is under way already.
    """

    ballot: Ballot
    voted: Tensor | None
    headers: list[Header]
    ties: int
    unanimous: int
    seconds: float
    average: Future[Averaging | None] | None = None


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

    def __init__(
        self, step: int, layout: int, flags: int, rank: int, workers: int, impl: str, scales: ScalesOf
    ) -> None:
        self.step, self.layout, self.flags, self.rank, self.impl = step, layout, flags, rank, impl
        self.workers = workers
        self.scales = scales
        self.now: list[Hyperparameters] = []
        self.grad_scale = 1.0
        self.failure: Exception | None = None

    @property
    def parity(self) -> int:
        """That of this worker's elements that abstain."""
        return abstain_parity(self.step, self.rank, self.workers)

    def attempt(self, part: Callable[[], None]) -> None:
        """Run ``part`` unless something failed before, and keep what it raises."""
        if self.failure is None:
            try:
                part()
            except Exception as error:
                self.failure = error

    def read(self, groups: Sequence[dict[str, object]]) -> None:
        """Take the hyperparameters of all groups."""
        self.now = [Hyperparameters.of(group) for group in groups]

    def unscale(self, scale: Tensor | None, overflow: Tensor | int | None) -> None:
        """Take what a GradScaler set: its scale, None where gradients are unscaled already, and found_inf.

        Raises RuntimeError where it has seen no gradient.
        """
        if overflow is not None and not isinstance(overflow, Tensor):
            # a sum over no devices
            raise RuntimeError(NO_GRADIENT_TO_SCALE)
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
    packed = _blank(bucket)
    status = torch.zeros(len(bucket.slots), dtype=torch.int32, device=bucket.device)
    beta1 = draft.now[bucket.group_index].beta1
    terms = Terms(
        beta1, draft.grad_scale_of(bucket), draft.step, draft.rank, draft.parity, draft.impl, draft.scales(bucket)
    )
    encode(bucket, grads, packed, status, terms)
    return Ballot(grads, tuple(grad is not None for grad in found), packed, status)


def _blank(bucket: Bucket) -> Tensor:
    return torch.zeros(bucket.n_bytes * bucket.compression.codes.bits, dtype=torch.uint8, device=bucket.device)


def prepare(bucket: Bucket, draft: Draft) -> Mail:
    """Encode a bucket into what this worker sends; where it fails, or has failed before, a message that says so."""
    ballots: list[Ballot] = []
    draft.attempt(lambda: ballots.append(encode_bucket(bucket, draft)))
    if draft.failure is None:
        (ballot,) = ballots
        return Mail(ballot, ballot.packed, draft.header(bucket, ballot), ballot.status)
    return Mail(None, _blank(bucket), draft.header(bucket, None), None)


def exchange(buckets: Sequence[Bucket], voters: Sequence[Voter], draft: Draft) -> list[BucketVote]:
    """Encode, send and vote on buckets, all in flight at once; nothing is changed. A collective call.

    Where this worker fails, it still sends (saying so) what the others wait for, and raises its error afterwards; they
    raise WorkersDisagreeError, as all do where workers disagree.
    """
    mails: list[Mail] = []
    exchanges: list[Exchange] = []
    # what the others send can then arrive while this worker encodes
    for bucket, voter in zip(buckets, voters, strict=True):
        voter.expect(bucket.device)
    for bucket, voter in zip(buckets, voters, strict=True):
        mails.append(prepare(bucket, draft))
        exchanges.append(voter.start(mails[-1].packed, mails[-1].header, mails[-1].status))
    # every worker starts the later phases in the order of the buckets
    moving = exchanges
    while moving:
        moving = [pending for pending in moving if pending.advance()]
    return finish(buckets, mails, exchanges, draft)


def finish(
    buckets: Sequence[Bucket], mails: Sequence[Mail], exchanges: Sequence[Exchange], draft: Draft
) -> list[BucketVote]:
    """Wait for the results; raise this worker's failure, or the error that all see where workers disagree.

    Where nobody has failed but votes are stale, workers need not agree yet: they will vote again.
    """
    results = [_result(bucket, pending) for bucket, pending in zip(buckets, exchanges, strict=True)]
    if draft.failure is not None:
        raise draft.failure
    flags = [header.flags for _, headers, *_ in results for header in headers]
    if any(flag & FAILED for flag in flags) or not any(flag & STALE for flag in flags):
        for _, headers, *_ in results:
            check_agreement(headers)
    votes = []
    for mail, result in zip(mails, results, strict=True):
        assert mail.ballot is not None
        votes.append(BucketVote(mail.ballot, *result))
    return votes


def alone(buckets: Sequence[Bucket], draft: Draft) -> list[BucketVote]:
    """What one worker alone says to itself."""
    mails = [prepare(bucket, draft) for bucket in buckets]
    if draft.failure is not None:
        raise draft.failure
    ballots = [mail.ballot for mail in mails if mail.ballot is not None]
    # by device, since groups may be on several: one wait for each
    statuses = {
        device: torch.cat([b.status for bucket, b in zip(buckets, ballots, strict=True) if bucket.device == device])
        for device in dict.fromkeys(bucket.device for bucket in buckets)
    }
    bad = {device: iter(status.tolist()) for device, status in statuses.items()}
    votes = []
    for bucket, ballot in zip(buckets, ballots, strict=True):
        flags = [next(bad[bucket.device]) for _ in bucket.slots]
        nonfinite = next((i for i, flag in enumerate(flags, start=1) if flag), 0)
        header = Header(nonfinite=nonfinite, flags=draft.flags, has_gradient=ballot.has_gradient)
        votes.append(BucketVote(ballot, None, [header], 0, bucket.elements, 0.0))
    return votes


def taking_part_of(headers: Sequence[Header]) -> tuple[bool, ...]:
    """Which parameters of a bucket have a gradient on some worker."""
    return tuple(any(present) for present in zip(*(header.has_gradient for header in headers), strict=True))


def judge(buckets: Sequence[Bucket], votes: Sequence[BucketVote]) -> Verdict:
    """The same verdict on every worker, from every worker's header of every bucket."""
    found_inf = any(header.flags & FOUND_INF for vote in votes for header in vote.headers)
    nonfinite = None
    for bucket, vote in zip(buckets, votes, strict=True):
        first = min((header.nonfinite for header in vote.headers if header.nonfinite), default=0)
        if first and nonfinite is None:
            ranks = [str(rank) for rank, header in enumerate(vote.headers) if header.nonfinite == first]
            nonfinite = f"parameter {bucket.slots[first - 1].name} on rank {', '.join(ranks)}"
    return Verdict(found_inf, nonfinite, [taking_part_of(vote.headers) for vote in votes])


def _result(bucket: Bucket, pending: Exchange) -> tuple[Tensor, list[Header], int, int, float]:
    tally = pending.result()
    headers = decode_headers(tally.headers, len(bucket.slots))
    ties, unanimous = tally.counts.tolist()
    # pad codes of the message are 0 on every worker, hence unanimous
    return tally.packed, headers, ties, unanimous - (8 * bucket.n_bytes - bucket.elements), pending.seconds
