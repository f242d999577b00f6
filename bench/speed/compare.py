"""Two runs compared by ratio to the stream: what takes longer than it did, past a tolerance."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from checkouts import ROOT, link_library
from reporting.records import Record, RecordsError, read_records

# CONTRIBUTING.md has what it was measured by
TOLERANCE = 0.5


@dataclass(frozen=True)
class Change:
    """One benchmark in both runs."""

    name: str
    old: Record
    new: Record

    @property
    def slowdown(self) -> float:
        """Time relative to the stream's, new over old, less 1: 0.5 takes half as long again."""
        return float(self.old["ratio"] / self.new["ratio"] - 1)

    def verdict(self, tolerance: float) -> str:
        """Return "slower" or "faster" past the tolerance where the middle halves of the rounds lie apart, else ""."""
        if self.slowdown > tolerance and self.new["high"] < self.old["low"]:
            return "slower"
        faster = self.new["ratio"] / self.old["ratio"] - 1 > tolerance and self.new["low"] > self.old["high"]
        return "faster" if faster else ""


def changes_of(old: Sequence[Record], new: Sequence[Record], *, everything: bool = False) -> list[Change]:
    """Pair the findings of two runs by name; peers and the reference only with ``everything``.

    Raises RecordsError where the runs have nothing in common.
    """
    before = {record["name"]: record for record in old[1:]}
    pairs = [Change(record["name"], before[record["name"]], record) for record in new[1:] if record["name"] in before]
    if not everything:
        # others' speed, and the reference's, is nobody's aim
        pairs = [pair for pair in pairs if pair.new["kind"] != "peer" and "/reference/" not in pair.name]
    if not pairs:
        raise RecordsError("the two runs have no benchmark in common")
    return pairs


def describe(old: Sequence[Record], new: Sequence[Record], changes: Sequence[Change], tolerance: float) -> str:
    """Return the comparison as text: warnings, a table of what changed, a summary."""
    lines = [f"{name}: {run[0]['commit'][:12]}, {run[0]['date']}" for name, run in (("old", old), ("new", new))]
    lines += [f"warning: {warning}" for warning in _warnings(old, new)]
    moved = [(change, verdict) for change in changes if (verdict := change.verdict(tolerance))]
    moved.sort(key=lambda pair: -pair[0].slowdown)
    for change, verdict in moved:
        ratios = (
            f"{change.old['ratio']:>8.1%} -> {change.new['ratio']:>8.1%} of the stream, time {change.slowdown:+.1%}"
        )
        lines.append(f"{verdict} {ratios}  {change.name}")
    slower, faster = (sum(verdict == word for _, verdict in moved) for word in ("slower", "faster"))
    middle = median(change.slowdown for change in changes)
    counts = f"{len(changes)} benchmarks compared, tolerance {tolerance:.0%}: {slower} slower, {faster} faster"
    return "\n".join([*lines, "", f"{counts}; median of times {middle:+.1%}"])


def _warnings(old: Sequence[Record], new: Sequence[Record]) -> Iterator[str]:
    """Yield differences that can be mistaken for a change of the code."""
    machines: list[Mapping[str, Any]] = [run[0]["machine"] for run in (old, new)]
    for part in sorted({*machines[0], *machines[1]}):
        before, after = (machine.get(part, "none") for machine in machines)
        if before != after:
            yield f"{part}: {before} (old), {after} (new)"
    names = [{record["name"] for record in run[1:]} for run in (old, new)]
    for which, missing in (("new", names[0] - names[1]), ("old", names[1] - names[0])):
        if missing:
            yield f"{len(missing)} benchmarks are not in the {which} run, first {min(missing)}"


def run_both(old: Path, only: Sequence[str], rounds: int) -> tuple[list[Record], list[Record]]:
    """Time another checkout and this one by turns, each by its own benchmarks; medians of the rounds."""
    runs: dict[Path, list[list[Record]]] = {old: [], ROOT: []}
    with tempfile.TemporaryDirectory() as folder:
        places = {checkout: Path(folder) / str(i) for i, checkout in enumerate(runs)}
        environments = {checkout: link_library(checkout, place) for checkout, place in places.items()}
        for number in range(rounds):
            for checkout in list(runs)[:: -1 if number % 2 else 1]:
                out = places[checkout] / "run.jsonl"
                command = [sys.executable, str(checkout / "bench" / "speed"), "--run", str(out), "run"]
                command += ["--only", *only] if only else []
                done = subprocess.run(command, env=environments[checkout], cwd=checkout, check=False)
                if done.returncode:
                    raise RecordsError(f"{checkout}: its benchmarks ended with exit code {done.returncode}")
                runs[checkout].append(read_records(out))
    before, after = (merged(found) for found in runs.values())
    return before, after


def merged(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """Merge several runs of the same into one: medians, and the widest spread."""
    found = []
    for records in zip(*(run[1:] for run in runs), strict=True):
        low, high = min(record["low"] for record in records), max(record["high"] for record in records)
        found.append({**records[0], "ratio": median(record["ratio"] for record in records), "low": low, "high": high})
    return [runs[0][0], *found]
