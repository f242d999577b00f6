"""Which way each bucket's votes travel, and why: what `LionCub.explain` reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.cost import Costs, bytes_sent
from lioncub.collectives.traffic import candidates

HINT = "measure this group: lioncub probe --out profile.json; LionCub(profile='profile.json')"
_MARK = "*"


@dataclass(frozen=True)
class Message:
    """One bucket as it travels: its elements, bytes of one bit per code, header bytes, algorithm and format of codes.

    The algorithm is None for one worker.
    """

    elements: int
    n_bytes: int
    header_bytes: int
    algorithm: str | None
    codes: Codes = VOTES


@dataclass(frozen=True)
class Candidate:
    """One way for one message: predicted seconds, and the bytes that each worker would send."""

    algorithm: str
    seconds: float
    bytes_sent: int


@dataclass(frozen=True)
class Row:
    """One bucket: what could carry it, and what does; no candidates and None for one worker."""

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
    """Predictions for every bucket; ``str()`` of it is a table. ``source`` says what they are based on."""

    rows: tuple[Row, ...]
    source: str
    hint: str

    @property
    def seconds(self) -> float:
        """Predicted time of all votes of a step, one after the other."""
        return sum(row.choice.seconds for row in self.rows if row.choice is not None)

    @property
    def bytes_sent(self) -> int:
        """Bytes that each worker sends per step."""
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

    Args:
        messages: the buckets in their order.
        costs: what the choice was made with; None for one worker.
    """
    if costs is None:
        rows = tuple(Row(i, m.elements, m.n_bytes, (), None) for i, m in enumerate(messages))
        return Explanation(rows, "one worker: nothing is sent", "")
    rows = tuple(_row(i, message, costs) for i, message in enumerate(messages))
    return Explanation(rows, costs.source, "" if costs.is_measured else HINT)


def _row(index: int, message: Message, costs: Costs) -> Row:
    found = tuple(
        Candidate(
            name,
            costs.seconds(name, message.n_bytes, message.header_bytes, message.codes),
            bytes_sent(name, message.n_bytes, costs.topology, message.header_bytes, message.codes),
        )
        for name in candidates(costs.topology, message.codes)
    )
    return Row(index, message.elements, message.n_bytes * message.codes.bits, found, message.algorithm)


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
