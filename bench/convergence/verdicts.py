"""What the runs say of the paper's claims: computed from paired intervals, never more than they hold."""

from __future__ import annotations

from dataclasses import dataclass

from convergence.methods import REFERENCE
from convergence.results import Cell, Results, cell_of
from convergence.stages import CANDIDATES, LIMIT, PLAIN_VOTE, SCREEN_WORKERS, WORKERS
from convergence.statistics import Interval
from convergence.tasks import TASKS

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"


@dataclass(frozen=True)
class Claim:
    """That ``worse`` has the higher loss than ``better``; with a ``margin``, that it is higher by no more than that."""

    text: str
    better: str
    worse: str
    shards: tuple[str, ...]
    margin: float | None = None

    def verdict(self, difference: Interval | None) -> str:
        """By whether the interval of worse / better - 1 lies on one side of 0, or of the margin."""
        if difference is None or difference.count < 2:
            return UNDECIDED
        if self.margin is not None:
            if difference.high <= self.margin:
                return SUPPORTED
            return CONTRADICTED if difference.low > self.margin else UNDECIDED
        if difference.low > 0:
            return SUPPORTED
        return CONTRADICTED if difference.high < 0 else UNDECIDED


BOTH = ("iid", "skewed")
FULL = "SignVote + every 1 fp32"
CLAIMS = (
    Claim("L1 loses less than Linf with 2 bits", "2-bit l1", "2-bit linf", BOTH),
    Claim("L1 loses less than Linf with 4 bits", "4-bit l1", "4-bit linf", BOTH),
    Claim(
        "selective synchronization (1/4 of the votes' bytes) is as good as full",
        FULL,
        "SignVote + auto 0.25",
        BOTH,
        LIMIT,
    ),
    Claim(
        "selective synchronization (as many bytes as votes) is as good as full",
        FULL,
        "SignVote + auto 1.0",
        BOTH,
        LIMIT,
    ),
    Claim("1-bit votes without synchronization lose against full precision", REFERENCE, PLAIN_VOTE, BOTH),
    Claim("2-bit L1 loses less than 1-bit votes", "2-bit l1", PLAIN_VOTE, BOTH),
    *(
        Claim(f"{name} loses at most {LIMIT:.0%} against full precision", REFERENCE, name, ("iid",), LIMIT)
        for name in CANDIDATES
    ),
)


@dataclass(frozen=True)
class Finding:
    """One claim in one cell."""

    cell: Cell
    difference: Interval | None
    verdict: str


def findings_of(claim: Claim, results: Results) -> list[Finding]:
    """The claim in the cells that it is about."""
    found = []
    for task in TASKS:
        for how in claim.shards:
            for workers in sorted({*WORKERS, *SCREEN_WORKERS}):
                cell = cell_of(task, how, workers)
                difference = results.difference(cell, claim.worse, claim.better)
                found.append(Finding(cell, difference, claim.verdict(difference)))
    return found


def overall(findings: list[Finding]) -> str:
    """One word where all cells that decide agree, and how many there are."""
    counts = {word: sum(f.verdict == word for f in findings) for word in (SUPPORTED, CONTRADICTED, UNDECIDED)}
    if counts[SUPPORTED] and counts[CONTRADICTED]:
        return f"differs: supported in {counts[SUPPORTED]}, contradicted in {counts[CONTRADICTED]} of {len(findings)}"
    for word in (SUPPORTED, CONTRADICTED):
        if counts[word]:
            return f"{word} in {counts[word]} of {len(findings)}, the rest undecided" if counts[UNDECIDED] else word
    return UNDECIDED
