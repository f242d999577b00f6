"""The rows of all stages as Markdown: a table of each stage's figures, and a count of checks that have none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from reporting.pages import markdown_table

from gpu.rows import NOT_MEASURED, Row

_PERCENT = ("of_copy", "spread")
_LABELS = ("stage", "name", *NOT_MEASURED)


def markdown(rows: Sequence[Row], *, is_dry: bool) -> str:
    """The whole document."""
    title = "# A dry run without GPU: these figures mean nothing" if is_dry else "# On a GPU"
    sections = [title]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        of_stage = [row for row in rows if row["stage"] == stage]
        sections += [f"## {stage}", _counts(of_stage), _table(of_stage)]
    return "\n\n".join(section for section in sections if section) + "\n"


def outcome(row: Row) -> str:
    """Why a row has no figures, or "measured" where it may have some."""
    return next((kind for kind in NOT_MEASURED if kind in row), "measured")


def _counts(rows: Sequence[Row]) -> str:
    counts = Counter(map(outcome, rows))
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) + "."


def _table(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in _LABELS))
    # checks that passed are only counted
    shown = [row for row in rows if set(row) - {"stage", "name"}]
    if not shown:
        return ""
    header = ["name", *(column.replace("_", " ") for column in columns), "note"]
    cells = ([row["name"], *(_cell(c, row.get(c)) for c in columns), _note(row)] for row in shown)
    return markdown_table(header, cells)


def _note(row: Row) -> str:
    kind = outcome(row)
    return "" if kind == "measured" else f"{kind}: {' '.join(str(row[kind]).split())[:200]}".replace("|", "/")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if column in _PERCENT else f"{value:.4g}"
    return str(value).replace("|", "/")
