"""Results of one run: made from pytest-benchmark's JSON, stored as ratios, read back with checks."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

FORMAT = 1
_WORST, _BEST = 1e-9, 1e9


class ResultsError(ValueError):
    """A file that is missing or has no results; the message names it."""


@dataclass(frozen=True)
class Result:
    """One benchmark: bandwidth relative to the stream's of the same round, median and quartiles over the rounds.

    ``milliseconds`` of one call is for tables and is not stored.
    """

    kind: str
    ratio: float
    low: float
    high: float
    gigabytes_per_second: float
    rounds: int
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Results:
    """A run: what was measured by name, of which commit, when and where."""

    commit: str
    is_dirty: bool
    date: str
    machine: dict[str, str]
    by_name: dict[str, Result]

    @property
    def title(self) -> str:
        dirty = " with changes" if self.is_dirty else ""
        return f"{self.commit[:12] or 'no commit'}{dirty}, {self.date[:19]}"


def result_of(entry: dict[str, Any]) -> Result:
    """A result from one of pytest-benchmark's entries."""
    info, seconds = entry["extra_info"], entry["stats"]["data"]
    ratios = [
        (info["bytes"] / op) / (info["stream_bytes"] / stream)
        for op, stream in zip(seconds, info["stream_seconds"], strict=True)
    ]
    low, middle, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    typical = median(seconds)
    return Result(
        info["kind"], middle, low, high, info["bytes"] / typical / 1e9, len(ratios), 1e3 * typical / info["calls"]
    )


def read_run(path: Path) -> Results:
    """Results from the file that ``pytest --benchmark-json`` writes. Raises ResultsError."""
    run = _json_of(path, "run `make bench` first")
    try:
        by_name = {entry["extra_info"]["name"]: result_of(entry) for entry in run["benchmarks"]}
        machine = run["benchmarks"][0]["extra_info"]["machine"]
        commit = run["commit_info"]
        return Results(commit.get("id") or "", bool(commit.get("dirty")), run["datetime"], machine, by_name)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ResultsError(f"{path}: expected a run of `make bench`, got {_fault(error)}") from error


def write_results(results: Results, path: Path) -> None:
    """Store ratios and bandwidths; no seconds."""
    stored = {
        "format": FORMAT,
        "commit": results.commit,
        "dirty": results.is_dirty,
        "date": results.date,
        "machine": results.machine,
        "results": {name: _stored(result) for name, result in results.by_name.items()},
    }
    lines = json.dumps(stored, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines + "\n")


def read_results(path: Path) -> Results:
    """What `write_results` stored. Raises ResultsError where that is not what it is."""
    return parse_results(_json_of(path, "store one with `make bench-save NAME=...`"), str(path))


def read_committed(name: str) -> Results:
    """The same of a file in git's history, ``COMMIT:PATH``."""
    command = ["git", "show", name]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return parse_results(json.loads(text), name)
    except subprocess.CalledProcessError as error:
        raise ResultsError(f"{name}: expected a file in git's history: {error.stderr.strip()}") from None
    except (OSError, json.JSONDecodeError) as error:
        raise ResultsError(f"{name}: expected JSON in git's history, got {error}") from error


def parse_results(stored: Any, where: str) -> Results:
    """Results from stored JSON; ``where`` it stood is for errors."""
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        got = stored.get("format") if isinstance(stored, dict) else type(stored).__name__
        raise ResultsError(f"{where}: expected results of format {FORMAT}, got {got!r}")
    try:
        by_name = {name: Result(**result) for name, result in stored["results"].items()}
        for name, result in by_name.items():
            if not all(_WORST < value < _BEST for value in (result.low, result.ratio, result.high)):
                raise ValueError(f"a ratio of {result.ratio!r} for {name}")
        return Results(stored["commit"], stored["dirty"], stored["date"], dict(stored["machine"]), by_name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultsError(f"{where}: expected stored results, got {_fault(error)}") from error


def _stored(result: Result) -> dict[str, Any]:
    fields = asdict(result)
    del fields["milliseconds"]
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in fields.items()}


def _json_of(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ResultsError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path}: expected JSON, got {error}") from error


def _fault(error: Exception) -> str:
    return f"one without {error}" if isinstance(error, KeyError) else str(error)
