"""Cells of the network lab: methods at rates, turn by turn, for this checkout and another one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from checkouts import ROOT, link_library
from reporting.pages import markdown_table, median_ratio
from reporting.records import Journal, Record

from netlab.crew import Crew
from netlab.lab import MASTER_PORT, Lab, LabError, rate_name
from netlab.worker import parse_method

WARM_UP_RATE = 10**10
# LionCub tries at most six plans, for six steps each
SETTLING_STEPS = 45
METHODS = ("no_communication", "ddp_fp32_lion_pytorch", "lioncub", "lioncub_overlap")
# every machine should carry so much of rates up to this one
GUARANTEED_RATE, LEAST_SHARE, GREATEST_SHARE = 10**9, 0.8, 1.1


@dataclass(frozen=True)
class Turns:
    """How long each method is measured.

    Attributes:
        repetitions: turns of each method at each rate.
        untimed, steps: of a turn.
        seconds: of a turn; fewer steps are taken where they would last longer.
    """

    repetitions: int = 3
    untimed: int = 3
    steps: int = 10
    seconds: float = 6.0

    def __post_init__(self) -> None:
        for name, least in (("repetitions", 1), ("untimed", 1), ("steps", 1), ("seconds", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def untimed_of(self, method: str) -> int:
        """Return the number of untimed steps: few for full gradients, which take seconds, more where votes settle."""
        votes = parse_method(method)
        if votes is not None and votes.settles:
            return max(self.untimed, SETTLING_STEPS)
        slow = ("ddp_fp32", "ddp_bf16", "hsdp")
        return min(self.untimed, 2) if method.startswith(slow) else self.untimed


@dataclass(frozen=True)
class Session:
    """Worker processes that stay up, and the model that all of them hold."""

    workers: int = 4
    model: str = "10M"
    per_host: int = 1

    def __post_init__(self) -> None:
        if self.workers < 2 or self.per_host < 1 or self.workers % self.per_host:
            raise ValueError(f"workers: expected 2 or more, on hosts of {self.per_host}, got {self.workers}")


def run_session(
    session: Session, rates: Sequence[int], methods: Sequence[str], turns: Turns, journal: Journal, old: Path | None
) -> list[Record]:
    """Measure every method at every rate; writes and returns a record for each turn, and prints a table for each rate.

    Raises LabError where the lab cannot be built, links are not shaped or a worker fails.
    """
    for method in methods:
        parse_method(method)
    records: list[Record] = []
    checkouts = {"new": ROOT} | ({"old": old} if old else {})
    log = ROOT / "runs" / "netlab" / "workers.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lab = stack.enter_context(Lab(session.workers // session.per_host, WARM_UP_RATE, session.per_host))
        crews: dict[str, Crew] = {}
        for i, (code, checkout) in enumerate(checkouts.items()):
            environment = link_library(checkout, folder / code) | {"MASTER_PORT": str(MASTER_PORT + i)}
            crews[code] = stack.enter_context(Crew(lab, session.model, log, environment))
            facts = crews[code].ask("facts")[0]
            words = f"{facts['parameters']:,} parameters, {session.workers} workers"
            print(f"{code}: {facts['library']}, {words}", flush=True)
            # compiles kernels
            for method in methods:
                crews[code].ask("measure", method=method, untimed=turns.untimed, steps=1, seconds=1.0)
        for rate in rates:
            lab.set_rate(rate)
            share = _check(rate, crews["new"])
            found = _measure(methods, turns, crews)
            cell = {"kind": "turn", "workers": session.workers, "per_host": session.per_host, "model": session.model}
            for turn in found:
                records.append({**cell, "rate": rate, "link_share": share, **turn})
                journal.write(records[-1])
            print(table_of(found, rate_name(rate)), flush=True)
    return records


def _check(rate: int, crew: Crew) -> float:
    """Send from every host to the next at once, three times; returns the best share of the rate that all links carry.

    Raises LabError where links carry more than their rate: then they are not shaped.
    """
    n_bytes = max(rate // 8 // 8, 10**6)
    answers = [crew.ask("carry", n_bytes=n_bytes) for _ in range(3)]
    share = 8 * n_bytes / min(max(rank["seconds"] for rank in answer) for answer in answers) / rate
    if share > GREATEST_SHARE:
        raise LabError(f"links: expected at most {GREATEST_SHARE} of {rate_name(rate)}, got {share:.3f}")
    if rate <= GUARANTEED_RATE and share < LEAST_SHARE:
        print(f"warning: links carry {share:.0%} of {rate_name(rate)}: is the machine busy?", flush=True)
    return share


def _measure(methods: Sequence[str], turns: Turns, crews: Mapping[str, Crew]) -> list[Record]:
    """Run all turns at one rate; every repetition starts with another method."""
    found = []
    for repetition in range(turns.repetitions):
        first = repetition % len(methods)
        for method in [*methods[first:], *methods[:first]]:
            # the checkout that comes second runs on warmer caches, so they change places
            for code in sorted(crews, reverse=repetition % 2 == 1):
                counts = {"untimed": turns.untimed_of(method), "steps": turns.steps, "seconds": turns.seconds}
                answers = crews[code].ask("measure", method=method, **counts)
                # a step ends with its slowest worker
                seconds = [max(step) for step in zip(*(answer["seconds"] for answer in answers), strict=True)]
                sent = max(answer["sent"] for answer in answers)
                # memory and stated bytes are those of the first worker
                found.append({"method": method, "code": code, **answers[0], "seconds": seconds, "sent": sent})
    return found


def table_of(turns: Sequence[Record], title: str) -> str:
    """Tabulate medians of one rate; old / new is the median ratio of neighbouring turns, with its range."""
    codes = sorted({turn["code"] for turn in turns})
    header = [title, *(f"{code} ms" for code in codes), *(f"{code} MB sent" for code in codes)]
    header += ["old / new", "range"] if len(codes) == 2 else []
    rows = []
    for method in dict.fromkeys(turn["method"] for turn in turns):
        of = {code: [turn for turn in turns if (turn["method"], turn["code"]) == (method, code)] for code in codes}
        row = [method, *(f"{1e3 * median(medians_of(of[code])):.1f}" for code in codes)]
        row += [f"{median(turn['sent'] for turn in of[code]) / 1e6:.3f}" for code in codes]
        if len(codes) == 2:
            middle, least, greatest = median_ratio(medians_of(of["old"]), medians_of(of["new"]))
            row += [f"{middle:.3f}", f"{least:.2f} to {greatest:.2f}"]
        rows.append(row)
    return markdown_table(header, rows)


def medians_of(turns: Sequence[Record]) -> list[float]:
    """Return the median seconds of a step in each turn."""
    return [median(turn["seconds"]) for turn in turns]
