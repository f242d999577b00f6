"""Two runs compared by ratio to the stream: what takes longer than it did, past a tolerance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from speed.results import Result, Results, ResultsError

# CONTRIBUTING.md has what it was measured by
TOLERANCE = 0.5
# what others are responsible for, and the reference, whose speed is nobody's aim
_NOT_OURS = "peer"
_REFERENCE = "/reference/"


@dataclass(frozen=True)
class Change:
    """One benchmark in both runs."""

    name: str
    old: Result
    new: Result

    @property
    def slowdown(self) -> float:
        """Time relative to the stream's, new over old, less 1: 0.5 takes half as long again."""
        return self.old.ratio / self.new.ratio - 1

    @property
    def speedup(self) -> float:
        return self.new.ratio / self.old.ratio - 1

    def is_slower(self, tolerance: float) -> bool:
        """Past the tolerance, and not by the spread of the rounds: the middle halves of both lie apart."""
        return self.slowdown > tolerance and self.new.high < self.old.low

    def is_faster(self, tolerance: float) -> bool:
        return self.speedup > tolerance and self.new.low > self.old.high


@dataclass(frozen=True)
class Comparison:
    """Two runs, what both have, and what a reader must know before believing it."""

    old: Results
    new: Results
    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    tolerance: float

    @property
    def slower(self) -> list[Change]:
        found = [change for change in self.changes if change.is_slower(self.tolerance)]
        return sorted(found, key=lambda change: -change.slowdown)

    @property
    def faster(self) -> list[Change]:
        found = [change for change in self.changes if change.is_faster(self.tolerance)]
        return sorted(found, key=lambda change: -change.speedup)


def compare(old: Results, new: Results, tolerance: float = TOLERANCE, *, everything: bool = False) -> Comparison:
    """Compare by name; peers and the reference only with ``everything``.

    Raises ValueError for a tolerance that is not positive, ResultsError where the runs have nothing in common.
    """
    if not 0 < tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a number > 0, got {tolerance}")
    names = [name for name in old.by_name if name in new.by_name]
    if not everything:
        names = [name for name in names if _is_ours(name, old.by_name[name])]
    if not names:
        raise ResultsError("the two runs have no benchmark in common")
    changes = tuple(Change(name, old.by_name[name], new.by_name[name]) for name in names)
    return Comparison(old, new, changes, tuple(_warnings(old, new)), tolerance)


def describe(comparison: Comparison) -> str:
    """The comparison as text: warnings, a table of what changed, a verdict."""
    lines = [f"old: {comparison.old.title}", f"new: {comparison.new.title}"]
    lines += [f"warning: {warning}" for warning in comparison.warnings]
    moved = [("slower", change) for change in comparison.slower] + [("faster", change) for change in comparison.faster]
    if moved:
        width = max(len(change.name) for _, change in moved)
        lines += ["", f"{'benchmark':<{width}}  {'old':>8}  {'new':>8}  {'time':>8}"]
        for verdict, change in moved:
            ratios = f"{change.old.ratio:>8.1%}  {change.new.ratio:>8.1%}  {change.slowdown:>+8.1%}"
            lines.append(f"{change.name:<{width}}  {ratios}  {verdict}")
        lines.append("old, new: bandwidth as a part of the stream's; time: how much longer it takes, in streams")
    count, percent = len(comparison.changes), f"{comparison.tolerance:.0%}"
    lines += [
        "",
        f"{count} benchmarks compared, tolerance {percent}: "
        f"{len(comparison.slower)} slower, {len(comparison.faster)} faster",
    ]
    return "\n".join(lines)


def _is_ours(name: str, result: Result) -> bool:
    return result.kind != _NOT_OURS and _REFERENCE not in name


def _warnings(old: Results, new: Results) -> Iterator[str]:
    """Differences that can be mistaken for a change of the code."""
    for part in sorted({*old.machine, *new.machine}):
        before, after = (results.machine.get(part, "none") for results in (old, new))
        if before != after:
            yield f"{part}: {before} (old), {after} (new)"
    for which, these, others in (("new", old, new), ("old", new, old)):
        missing = [name for name in these.by_name if name not in others.by_name]
        if missing:
            yield f"{len(missing)} benchmarks are not in the {which} run, first {missing[0]}"
