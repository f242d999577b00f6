"""The rows of all stages: a file that is complete after every row, and a page of tables.

A row is its stage, its name and figures. Instead of figures it has ``error`` where it failed, ``skipped`` where the
stage had no time left, ``absent`` where a package or a GPU that it needs is not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reporting.pages import markdown_table
from reporting.records import Journal, Record, read_records, run_record, write_records

NOT_MEASURED = ("error", "skipped", "absent")
_PERCENT = ("of_copy", "spread")
_LABELS = ("kind", "stage", "name", *NOT_MEASURED)


class Rows:
    """The file, records of kind "row"; one process writes at a time, so that nothing is kept in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, stage: str | None = None) -> list[Record]:
        """Return all rows, or those of a stage; the last one of each name counts."""
        records = read_records(self.path)[1:] if self.path.exists() else []
        rows = {(row["stage"], row["name"]): row for row in records}
        return [row for row in rows.values() if stage in (None, row["stage"])]

    def add(self, stage: str, name: str, **figures: Any) -> None:
        """Add a row; it replaces one of the same stage and name."""
        if not self.path.exists():
            write_records(self.path, [run_record()])
        with Journal(self.path, append=True) as journal:
            journal.write({"kind": "row", "stage": stage, "name": name, **figures})

    def drop(self, stage: str) -> None:
        """Remove the rows of an earlier run of a stage, or begin the file."""
        records = read_records(self.path) if self.path.exists() else [run_record()]
        write_records(self.path, [record for record in records if record.get("stage") != stage])


def markdown(rows: Sequence[Record], *, is_dry: bool) -> str:
    """Return the whole page: a table of each stage's figures, and a count of its rows."""
    title = "# A dry run without GPU: these figures mean nothing" if is_dry else "# On a GPU"
    sections = [title]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        counts = Counter(map(outcome, of_stage))
        sections += [f"## {stage}", ", ".join(f"{n} {kind}" for kind, n in counts.items()) + ".", _table(of_stage)]
    return "\n\n".join(section for section in sections if section) + "\n"


def outcome(row: Record) -> str:
    """Return why a row has no figures, or "measured" where it may have some."""
    return next((kind for kind in NOT_MEASURED if kind in row), "measured")


def _table(rows: Sequence[Record]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _LABELS))
    # checks that passed are only counted
    shown = [row for row in rows if set(row) - {"kind", "stage", "name"}]
    if not shown:
        return ""
    header = ["name", *(column.replace("_", " ") for column in columns), "note"]
    return markdown_table(
        header, ([row["name"], *(_cell(c, row.get(c)) for c in columns), _note(row)] for row in shown)
    )


def _note(row: Record) -> str:
    kind = outcome(row)
    return "" if kind == "measured" else f"{kind}: {' '.join(str(row[kind]).split())[:200]}".replace("|", "/")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if column in _PERCENT else f"{value:.4g}"
    return str(value).replace("|", "/")
