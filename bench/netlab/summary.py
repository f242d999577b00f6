"""Figures from the findings of a run: repetitions, medians, paired ratios and their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from netlab.clocks import StepTimes
from netlab.names import ALGORITHM_OF, OVERLAP
from netlab.records import Record, of_kind

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; the last serves for more, which is wider than needed
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
HEADLINES = ("lioncub_auto_overlap", "lioncub_auto")


@dataclass(frozen=True, order=True)
class Cell:
    """Where methods are compared: hosts, workers on each, bits per second of a link, and a model."""

    hosts: int
    per_host: int
    rate: int
    model: str

    @property
    def workers(self) -> int:
        """All of them."""
        return self.hosts * self.per_host


@dataclass(frozen=True)
class Repetition:
    """One turn of one method.

    `step` is the mean over steps of the slowest worker's time; the parts of a step are means over steps and workers.
    Bytes are those of the busiest interface per step. `alone` is the slowest worker's time of an exchange of
    `alone_bytes` with nothing else going on; `alone_in_step` that of communication in a step without forward and
    backward, a median over workers, who wait for each other's encoding.
    """

    index: int
    step: float
    forward: float
    backward: float
    exposed: float
    optimizer: float
    communication: float
    sent: float
    received: float
    bytes_sent: int | None = None
    alone: float | None = None
    alone_bytes: int | None = None
    alone_in_step: float | None = None
    predicted: float | None = None
    routes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Of two methods' paired repetitions: the median, and a 95% interval of the mean on a log scale."""

    median: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the two differ by more than what repetitions scatter."""
        return not self.low <= 1 <= self.high


Table = dict[Cell, dict[str, list[Repetition]]]


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median(values), min(values), max(values))


def repetition_of(turn: Record) -> Repetition:
    """What all workers say of one turn, taken together."""
    workers = turn["workers"]
    steps = [[StepTimes(*step) for step in worker["steps"]] for worker in workers]
    every = [step for own in steps for step in own]
    alone = [max(exchange) for exchange in zip(*(worker.get("alone", []) for worker in workers), strict=True)]
    in_steps = [seconds for worker in workers for seconds in worker.get("alone_in_step", [])]
    predicted = [worker["predicted"] for worker in workers if worker.get("predicted") is not None]
    return Repetition(
        index=turn["repetition"],
        step=fmean(max(step.step for step in at_once) for at_once in zip(*steps, strict=True)),
        forward=fmean(step.forward for step in every),
        backward=fmean(step.backward for step in every),
        exposed=fmean(step.exposed for step in every),
        optimizer=fmean(step.optimizer for step in every),
        communication=fmean(step.communication for step in every),
        sent=max(worker["sent"] for worker in workers),
        received=max(worker["received"] for worker in workers),
        bytes_sent=max((worker["bytes_sent"] for worker in workers if "bytes_sent" in worker), default=None),
        alone=median(alone) if alone else None,
        alone_bytes=workers[0].get("alone_bytes"),
        alone_in_step=median(in_steps) if in_steps else None,
        predicted=median(predicted) if predicted else None,
        routes=tuple(workers[0].get("routes", ())),
    )


def table_of(records: Sequence[Record]) -> Table:
    """Repetitions by cell and method, in the order in which the run met them."""
    table: Table = {}
    for turn in of_kind(records, "turn"):
        cell = Cell(turn["hosts"], turn["per_host"], turn["rate"], turn["model"])
        table.setdefault(cell, {}).setdefault(turn["method"], []).append(repetition_of(turn))
    return table


def paired_ratio(above: Sequence[Repetition], below: Sequence[Repetition]) -> Ratio:
    """Step times of one method over those of another, repetition by repetition. ValueError where none is common."""
    times = {repetition.index: repetition.step for repetition in below}
    ratios = [repetition.step / times[repetition.index] for repetition in above if repetition.index in times]
    if not ratios:
        raise ValueError("repetitions: expected some that both methods have, got none")
    low, high = log_interval(ratios)
    return Ratio(median(ratios), low, high)


def log_interval(ratios: Sequence[float]) -> tuple[float, float]:
    """A 95% interval of the geometric mean by Student's t; unbounded for a single ratio."""
    if len(ratios) < 2:
        return 0.0, math.inf
    logs = [math.log(ratio) for ratio in ratios]
    half = _T[min(len(logs) - 1, len(_T)) - 1] * stdev(logs) / math.sqrt(len(logs))
    return math.exp(fmean(logs) - half), math.exp(fmean(logs) + half)


def step_of(repetitions: Sequence[Repetition]) -> Spread:
    """Step times over repetitions, in seconds."""
    return spread_of([repetition.step for repetition in repetitions])


def fastest(methods: dict[str, list[Repetition]], names: Sequence[str]) -> str | None:
    """The one of ``names`` with the least median step time."""
    present = [name for name in names if name in methods]
    return min(present, key=lambda name: step_of(methods[name]).median, default=None)


def headline(methods: dict[str, list[Repetition]]) -> str | None:
    """The automatic LionCub, with or without overlap, whichever takes less time here."""
    return fastest(methods, HEADLINES)


def fixed_rivals(auto: str) -> list[str]:
    """The methods with a fixed algorithm that an automatic choice could have made."""
    return [
        name
        for name, algorithm in ALGORITHM_OF.items()
        if algorithm != "auto" and name.endswith(OVERLAP) == auto.endswith(OVERLAP)
    ]


def alone_share(cell: Cell, repetitions: Sequence[Repetition]) -> Spread | None:
    """The wire limit over the seconds of an exchange alone: 1 is as fast as the link's raw rate."""
    shares = [8 * r.alone_bytes / cell.rate / r.alone for r in repetitions if r.alone and r.alone_bytes]
    return spread_of(shares) if shares else None
