"""The rows of all stages in one file, which is complete after every row: what is cut off keeps what it has found.

A row is its stage, its name and figures. Instead of figures it has ``error`` where it failed, ``skipped`` where the
stage had no time left, ``absent`` where a package or a GPU that it needs is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
NOT_MEASURED = ("error", "skipped", "absent")


class Rows:
    """The file; one process writes at a time, so that nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, stage: str | None = None) -> list[Row]:
        """All rows, or those of a stage, in the order in which they were found."""
        rows: list[Row] = json.loads(self.path.read_text()) if self.path.exists() else []
        return [row for row in rows if stage in (None, row["stage"])]

    def add(self, stage: str, name: str, **figures: Any) -> None:
        """Add a row; one of the same stage and name is replaced."""
        kept = [row for row in self.read() if (row["stage"], row["name"]) != (stage, name)]
        self._write([*kept, {"stage": stage, "name": name, **figures}])

    def drop(self, stage: str) -> None:
        """Remove what an earlier run of a stage has found."""
        self._write(row for row in self.read() if row["stage"] != stage)

    def _write(self, rows: Iterable[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
        os.replace(unfinished, self.path)
