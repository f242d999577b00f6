"""Averages of momentum within a step: their exchange, and the measuring of how far workers are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.arrangement import Arrangement
from lioncub.buckets import Bucket, Slot
from lioncub.collectives.average import Averaging, average_agreed_, average_bytes
from lioncub.collectives.exchange import Exchange
from lioncub.collectives.handshake import digest
from lioncub.collectives.header import FAILED, FOUND_INF, STALE, Header, decode_headers
from lioncub.collectives.transport import AVERAGES, Group
from lioncub.courier import Follower
from lioncub.due import Stretch, chosen_slots, due_stretches, slots_of
from lioncub.kernels import lion_mix
from lioncub.momentum_sync import MomentumSync
from lioncub.voting import Ballot, BucketVote, Draft, Mail, Verdict, taking_part_of

# elements of a parameter whose momentum is looked at to measure its drift: a share of them, but neither very few nor
# more than tell the ratio to a tenth
_SAMPLE_SHARE, _FEWEST_SAMPLES, _MOST_SAMPLES = 64, 16, 256
# when drift is measured for the first time
_FIRST_MEASUREMENT = 10
NOT_MEASURED = -1.0


@dataclass(frozen=True)
class Means:
    """Averaged momentum of stretches of one bucket, one after the other and padded in fp32 ``values``."""

    stretches: tuple[Stretch, ...]
    values: Tensor

    def write(self, bucket: Bucket) -> None:
        """Overwrite the bucket's momentum with them."""
        sizes = [stretch.padded for stretch in self.stretches]
        for stretch, mean in zip(self.stretches, torch.split(self.values, sizes), strict=True):
            bucket.momenta[stretch.index][stretch.part] = mean[: stretch.end - stretch.start]


class Synchronizer:
    """Carries out a `MomentumSync` policy (None: never), and measures drift every ``drift_every`` steps (None: never).

    ``state`` is the optimizer's, where ``state[p]["drift"]`` is kept. ``overlap``: averages are started on a courier's
    thread, by what `follower` gives.
    """

    def __init__(
        self,
        policy: MomentumSync | None,
        drift_every: int | None,
        arrangement: Arrangement,
        state: Mapping[Any, Any],
        group: Group,
        workers: int,
        overlap: bool,
    ) -> None:
        self._policy, self._drift_every, self._arrangement, self._state = policy, drift_every, arrangement, state
        self._group, self._workers, self._overlap = group, workers, overlap
        # numbers of the slots to synchronize; None: to be chosen anew
        self._chosen: frozenset[int] | None = None
        # (step, stretches by bucket) of the last step that was asked for
        self._due: tuple[int, list[tuple[Stretch, ...]]] | None = None
        self.bytes_sent, self.seconds = 0, 0.0

    @property
    def measures(self) -> bool:
        """Whether drift is ever measured."""
        return self._drift_every is not None

    def agreed(self, layout: int) -> int:
        """The hash of the layout, and of what was chosen by drift: workers that differ in it must not average."""
        if self._policy is None or not self._policy.is_auto or self._workers == 1:
            return layout
        return digest([layout, sorted(self._selection(self._policy))])

    def forget(self) -> None:
        """State has been loaded or buckets have changed: choose anew."""
        self._chosen = self._due = None

    def follower(self, bucket: Bucket, mail: Mail, draft: Draft) -> Follower | None:
        """What starts the average of a bucket once everyone's header is known; None where nothing is due.

        All workers see the same headers, so all start it or none does.
        """
        if not self._stretches(draft.step)[self._arrangement.buckets.index(bucket)]:
            return None

        def start(exchange: Exchange) -> Averaging | None:
            headers = decode_headers(exchange.headers(), len(bucket.slots))
            if mail.ballot is None or not _go_on(headers):
                return None
            averaging = self._start(bucket, mail.ballot, headers, draft)
            if averaging is not None:
                averaging.advance()
            return averaging

        return start

    def run(self, votes: Sequence[BucketVote], verdict: Verdict, draft: Draft) -> list[Means | None]:
        """Average what is due of the momentum to come, by bucket; changes only measured drift. A collective call.

        Parameters that do not take part in the step are left out.
        """
        buckets = self._arrangement.buckets
        self.bytes_sent, self.seconds = 0, 0.0
        if self._workers == 1:
            return [None] * len(buckets)
        if self._overlap:
            pending = [None if vote.average is None else vote.average.result() for vote in votes]
        else:
            pending = [
                self._start(bucket, vote.ballot, vote.headers, draft)
                for bucket, vote in zip(buckets, votes, strict=True)
            ]
            for averaging in pending:
                if averaging is not None:
                    averaging.advance()
        means: list[Means | None] = []
        for i, averaging in enumerate(pending):
            if averaging is None:
                means.append(None)
                continue
            stretches = self._taking_part(i, verdict.taking_part[i], draft.step)
            means.append(Means(stretches, averaging.result()))
            self.bytes_sent += averaging.bytes_sent
            self.seconds += averaging.seconds
        if self._drift_every is not None and _is_measured(draft.step, self._drift_every):
            self._measure(votes, verdict, draft)
        return means

    def drift(self) -> dict[str, float] | None:
        """The last measured drift by name of parameter; None where none was measured."""
        if not self.measures:
            return None
        found = {slot.name: self._drift_of(slot) for *_, slot in slots_of(self._arrangement.buckets)}
        return {name: value for name, value in found.items() if value != NOT_MEASURED} or None

    def _drift_of(self, slot: Slot) -> float:
        return float(self._state[slot.param]["drift"])

    def _selection(self, policy: MomentumSync) -> frozenset[int]:
        """Numbers of the slots to synchronize."""
        if self._chosen is None:
            buckets = self._arrangement.buckets
            drift = {slot.number: self._drift_of(slot) for *_, slot in slots_of(buckets)} if policy.is_auto else {}
            self._chosen = chosen_slots(policy, buckets, drift)
        return self._chosen

    def _stretches(self, step: int) -> list[tuple[Stretch, ...]]:
        """What is due in a step, by bucket, whoever takes part."""
        buckets = self._arrangement.buckets
        if self._policy is None:
            return [()] * len(buckets)
        if self._due is None or self._due[0] != step:
            piece = self._policy.piece(step)
            self._due = step, due_stretches(buckets, self._selection(self._policy), piece)
        return self._due[1]

    def _taking_part(self, i: int, taking_part: Sequence[bool], step: int) -> tuple[Stretch, ...]:
        return tuple(stretch for stretch in self._stretches(step)[i] if taking_part[stretch.index])

    def _start(self, bucket: Bucket, ballot: Ballot, headers: Sequence[Header], draft: Draft) -> Averaging | None:
        """Start averaging what is due of a bucket; None where that is nothing."""
        i = self._arrangement.buckets.index(bucket)
        stretches = self._taking_part(i, taking_part_of(headers), draft.step)
        if self._policy is None or not stretches:
            return None
        sizes = [stretch.padded for stretch in stretches]
        values = torch.zeros(sum(sizes), dtype=torch.float32, device=bucket.device)
        for one, room in zip(stretches, torch.split(values, sizes), strict=True):
            room[: one.end - one.start] = _next_momentum(bucket, ballot, one.index, one.part, draft)
        return Averaging(
            values, group=self._group, dtype=self._policy.dtype, tag=AVERAGES + 1 + i, at_once=self._overlap
        )

    def _measure(self, votes: Sequence[BucketVote], verdict: Verdict, draft: Draft) -> None:
        """Set the drift of every parameter that takes part, from samples of the momentum to come.

        Drift is the variance of momentum over workers, before it is averaged, relative to its mean square. 1. The
        samples are averaged; 2. each worker sums its squared distances from the mean, and its squares, per parameter;
        3. these are averaged.
        """
        buckets = self._arrangement.buckets
        present = [(i, j, slot) for i, j, slot in slots_of(buckets) if verdict.taking_part[i][j] and slot.numel]
        if not present:
            return
        samples = [_next_momentum(buckets[i], votes[i].ballot, j, _sample_of(slot), draft) for i, j, slot in present]
        mine = torch.cat(samples)
        mean = mine.clone()
        average_agreed_(mean, group=self._group)
        sizes = [len(sample) for sample in samples]
        apart = [part.double().square().sum() for part in torch.split(mine - mean, sizes)]
        squares = [sample.double().square().sum() for sample in samples]
        moments = torch.stack([*apart, *squares]).float()
        average_agreed_(moments, group=self._group)
        self.bytes_sent += sum(average_bytes(len(sent), self._workers) for sent in (mine, moments))
        variance, power = moments.view(2, -1)
        # momentum that is zero on all workers does not drift
        ratio = torch.where(power > 0, variance / power, 0.0)
        for (*_, slot), value in zip(present, ratio, strict=True):
            self._state[slot.param]["drift"].copy_(value)
        self.forget()


def _go_on(headers: Sequence[Header]) -> bool:
    """Whether the step may yet be taken, as far as these headers tell; the same on all workers."""
    agreed = {(header.version, header.step, header.layout, header.hyperparameters) for header in headers}
    stopped = any(header.nonfinite or header.flags & (FAILED | FOUND_INF | STALE) for header in headers)
    return len(agreed) == 1 and not stopped


def _next_momentum(bucket: Bucket, ballot: Ballot, index: int, part: slice, draft: Draft) -> Tensor:
    """fp32: what this worker's momentum of a slot will be after the step."""
    return lion_mix(
        bucket.momenta[index][part],
        ballot.grads[index][part],
        beta=draft.now[bucket.group_index].beta2,
        grad_scale=draft.grad_scale_of(bucket),
    )


def _sample_of(slot: Slot) -> slice:
    count = min(slot.numel, max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, slot.numel // _SAMPLE_SHARE)))
    stride = slot.numel // count
    return slice(0, count * stride, stride)


def _is_measured(step: int, every: int) -> bool:
    return step == min(_FIRST_MEASUREMENT, every) or (step > 0 and step % every == 0)
