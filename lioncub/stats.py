"""Figures of the last step, and predictions for every bucket: the results of `LionCub.stats` and `LionCub.explain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lioncub.collectives.codes import VOTES, CodeFormat
from lioncub.collectives.cost import Costs, bytes_sent, candidates

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
class Message:
    """One bucket as it is sent: elements, bytes of one bit per code, the algorithm (None for one rank) and format."""

    elements: int
    n_bytes: int
    algorithm: str | None
    form: CodeFormat = VOTES


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


def explain(messages: Sequence[Message], costs: Costs | None) -> Explanation:
    """Predict every candidate for every message, with the algorithms that were chosen for them.

    ``costs`` is the model that the choice was made with; None for one rank.
    """
    if costs is None:
        rows = tuple(Row(i, m.elements, m.n_bytes, (), None) for i, m in enumerate(messages))
        return Explanation(rows, "one worker: nothing is sent", "")
    found = []
    for i, message in enumerate(messages):
        n_bytes, form = message.n_bytes, message.form
        possible = tuple(
            Candidate(name, costs.seconds(name, n_bytes, form), bytes_sent(name, n_bytes, costs.topology, form))
            for name in candidates(costs.topology, form)
        )
        found.append(Row(i, message.elements, n_bytes * form.bits, possible, message.algorithm))
    source = costs.source if costs.error is None else f"{costs.source}; predictions are off by {costs.error:.0%}"
    return Explanation(tuple(found), source, "" if costs.is_measured else HINT)


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
