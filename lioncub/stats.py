"""Figures of the last step, and predictions for every bucket: the results of `LionCub.stats` and `LionCub.explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lioncub.collectives.cost import bytes_sent, candidates

if TYPE_CHECKING:
    from lioncub.step import StepEngine

HINT = "measure this group: torchrun ... -m lioncub probe; LionCub(..., comm=Comm(profile='profile.json'))"
_MARK = "*"


@dataclass(frozen=True)
class BucketStats:
    """One bucket: elements, the algorithm, bytes sent per step, seconds of its exchange, the compression's text."""

    elements: int
    algorithm: str
    bytes_sent: int
    seconds: float
    compression: str


@dataclass(frozen=True)
class Stats:
    """Figures of one rank; bytes, seconds and fractions are those of the last step.

    ``communication_seconds`` is the time that the host spent starting and awaiting collectives, on whatever thread;
    ``exposed_seconds`` that part of it, with the votes in between, for which `step` waited. ``tied`` and ``unanimous``
    are fractions of all elements. Bytes include the control message; ``sync_bytes_sent`` of them were for synchronizing
    momentum and measuring its drift. ``drift`` is the variance of momentum over ranks relative to its mean square, by
    name of parameter, as last measured, or None.
    """

    steps: int
    skipped_steps: int
    bytes_sent_per_step: int
    sync_bytes_sent: int
    communication_seconds: float
    exposed_seconds: float
    tied: float
    unanimous: float
    drift: dict[str, float] | None
    buckets: tuple[BucketStats, ...]

    def scalars(self) -> dict[str, float]:
        """Return all numbers as a flat dict, for any logger; the drift as its mean and maximum over parameters."""
        names = ("steps", "skipped_steps", "bytes_sent_per_step", "sync_bytes_sent", "communication_seconds")
        found = {name: float(getattr(self, name)) for name in (*names, "exposed_seconds", "tied", "unanimous")}
        if self.drift:
            found |= {"drift_mean": sum(self.drift.values()) / len(self.drift), "drift_max": max(self.drift.values())}
        return found


@dataclass(frozen=True)
class Candidate:
    """One algorithm for one message: predicted seconds, and the bytes that each rank would send."""

    algorithm: str
    seconds: float
    bytes_sent: int


@dataclass(frozen=True)
class Row:
    """One bucket: the algorithms that could carry it, and the one that does; none for one rank."""

    bucket: int
    elements: int
    n_bytes: int
    candidates: tuple[Candidate, ...]
    algorithm: str | None

    @property
    def choice(self) -> Candidate | None:
        """The candidate that carries the bucket."""
        return next((candidate for candidate in self.candidates if candidate.algorithm == self.algorithm), None)


@dataclass(frozen=True)
class Explanation:
    """Predictions for every bucket; ``str()`` of it is a table. ``source`` tells what they are based on."""

    rows: tuple[Row, ...]
    source: str
    hint: str

    @property
    def seconds(self) -> float:
        """Predicted time of all votes of a step, one after the other."""
        return sum(row.choice.seconds for row in self.rows if row.choice is not None)

    @property
    def bytes_sent(self) -> int:
        """Bytes of votes that each rank sends per step."""
        return sum(row.choice.bytes_sent for row in self.rows if row.choice is not None)

    def __str__(self) -> str:
        names = list(dict.fromkeys(candidate.algorithm for row in self.rows for candidate in row.candidates))
        lines = [["bucket", "elements", "bytes", *(f"{name} ms" for name in names), "bytes sent"]]
        for row in self.rows:
            sent = row.choice.bytes_sent if row.choice is not None else 0
            cells = [_milliseconds(row, name) for name in names]
            lines.append([str(row.bucket), f"{row.elements:,}", f"{row.n_bytes:,}", *cells, f"{sent:,}"])
        elements, n_bytes = sum(row.elements for row in self.rows), sum(row.n_bytes for row in self.rows)
        blanks, last = [""] * len(names), f"{self.bytes_sent:,}"
        lines.append(["all", f"{elements:,}", f"{n_bytes:,}", *blanks, last])
        text = [_aligned(lines)]
        if names:
            text.append(f"{_MARK} carries the bucket; predicted for all buckets: {1e3 * self.seconds:.3g} ms")
        return "\n".join([*text, self.source, *([self.hint] if self.hint else [])])


def stats_of(engine: StepEngine, steps: int, skipped: int) -> Stats:
    """Collect the figures of an engine's last step; waits for the device."""
    buckets = engine.buckets.all
    elements = max(sum(bucket.elements for bucket in buckets), 1)
    sent = [
        (voter.algorithm, voter.bytes_sent, spent) for voter, spent in zip(engine.voters, engine.seconds, strict=True)
    ]
    # buckets that were added since have sent nothing
    sent += [("none", 0, 0.0)] * (len(buckets) - len(sent))
    found = tuple(
        BucketStats(bucket.elements, *figures, repr(bucket.compression))
        for bucket, figures in zip(buckets, sent, strict=True)
    )
    synced = engine.momentum.bytes_sent + engine.drift.bytes_sent
    votes, others = sum(bucket.bytes_sent for bucket in found), engine.scales.bytes_sent + engine.control.bytes_sent
    tied, unanimous = _ties_and_unanimous(engine)
    return Stats(
        steps=steps,
        skipped_steps=skipped,
        bytes_sent_per_step=votes + synced + others,
        sync_bytes_sent=synced,
        communication_seconds=sum(bucket.seconds for bucket in found) + engine.sync_seconds,
        exposed_seconds=engine.exposed_seconds,
        tied=tied / elements,
        unanimous=unanimous / elements,
        drift=engine.drift.by_name(),
        buckets=found,
    )


def _ties_and_unanimous(engine: StepEngine) -> tuple[int, int]:
    """Return how many codes of the last step were tied, and unanimous."""
    if not engine.has_moved:
        return 0, 0
    buckets = engine.buckets.all[: engine.n_agreed]
    if not engine.counts:
        return 0, sum(bucket.elements for bucket in buckets)
    ties, unanimous = torch.stack([counts.cpu() for counts in engine.counts]).sum(0).tolist()
    # pad codes are 0 on every rank
    pairs = zip(engine.voters, buckets, strict=True)
    return ties, unanimous - sum(voter.counted_codes - bucket.elements for voter, bucket in pairs)


def explain(engine: StepEngine) -> Explanation:
    """Predict every candidate for every bucket, beside the algorithms that were chosen for them."""
    if not engine.voters:
        rows = [Row(i, bucket.elements, bucket.n_bytes, (), None) for i, bucket in enumerate(engine.buckets.all)]
        return Explanation(tuple(rows), "one worker: nothing is sent", "")
    rows, costs = [], engine.members.costs
    for i, (bucket, voter) in enumerate(zip(engine.buckets.all, engine.voters, strict=False)):
        n_bytes, form = voter.n_bytes, voter.form
        possible = tuple(
            Candidate(name, costs.seconds(name, n_bytes, form), bytes_sent(name, n_bytes, costs.topology, form))
            for name in candidates(costs.topology, form)
        )
        rows.append(Row(i, bucket.elements, n_bytes * form.bits, possible, voter.algorithm))
    source = costs.source if costs.error is None else f"{costs.source}; predictions are off by {costs.error:.0%}"
    return Explanation(tuple(rows), source, "" if costs.is_measured else HINT)


def _milliseconds(row: Row, name: str) -> str:
    candidate = next((candidate for candidate in row.candidates if candidate.algorithm == name), None)
    if candidate is None:
        return ""
    return f"{_MARK if name == row.algorithm else ''}{1e3 * candidate.seconds:.3f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
