"""What a run has found so far: one JSON line per finding, written as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """A file of JSON lines that is complete after every line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")

    def write(self, kind: str, **fields: Any) -> None:
        """Add a finding."""
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[Record]:
    """All findings of a run. A last line that was cut off is left out; ValueError where another one is broken."""
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}: expected JSON in line {number}, got {line[:80]!r}") from error
    return records


def merged(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """The findings of several runs, earlier ones first; of a cell, those of the last that measured it."""
    measured = [{_cell(turn) for turn in of_kind(run, "turn")} for run in runs]
    records = []
    for i, run in enumerate(runs):
        replaced = set[tuple[object, ...]]().union(*measured[i + 1 :])
        records += [record for record in run if record["kind"] != "turn" or _cell(record) not in replaced]
    if not all(of_kind(run, "end") for run in runs):
        records = [record for record in records if record["kind"] != "end"]
    return records


def _cell(turn: Record) -> tuple[object, ...]:
    return turn["hosts"], turn["per_host"], turn["rate"], turn["model"]


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """Those of one kind, in their order."""
    return [record for record in records if record["kind"] == kind]
