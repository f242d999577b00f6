"""Tables in Markdown, their places in pages that are written by hand, and plots of one style."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from reporting.records import RESULTS, Record, write_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = RESULTS.with_suffix(".md")
# name, value or None, color
Bar = tuple[str, float | None, str]
# colors that differ in lightness too; ours are the first two
OURS, OURS_TOO, PEERS = "#1b6ca8", "#7db6dd", "#b9b4aa"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: int = 1) -> str:
    """Return a table whose first columns are text, to the left, and the others figures, to the right."""
    rules = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(rules)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def insert(page: Path, name: str, text: str) -> None:
    """Replace the text between the marks ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a page.

    Raises ValueError where the page has no such marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = page.read_text()
    if not found.search(old):
        raise ValueError(f"{page}: expected the marks {begin} and {end}")
    page.write_text(found.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def machine_line(run: dict[str, Any]) -> str:
    """Return where and of what commit a run's figures are, in one sentence."""
    machine = dict(run["machine"])
    cpu, cores, threads = (machine.pop(name) for name in ("cpu", "cores", "threads"))
    gpu = f" {machine.pop('gpu')};" if "gpu" in machine else ""
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if version != "absent")
    commit = f"; commit {run['commit'][:12]}{' with changes' if run['dirty'] else ''}" if run["commit"] else ""
    return f"{cpu}, {cores} cores, {threads} thread(s);{gpu} {versions}{commit}, {run['date'][:10]}."


def median_ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Return median, least and greatest of the ratios of pairs that were measured side by side."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def new_figure(panels: int = 1, *, height: float = 3.2) -> tuple[Figure, list[Any]]:
    """Return a figure of panels side by side, and its axes without upper and right frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(panels, 1.5), height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize="small")
    return figure, axes


def write_results(
    name: str,
    records: Sequence[Record],
    text: str,
    panels: Sequence[tuple[str, Sequence[Bar]]],
    *,
    height: float,
    form: str = "{:.3g}",
    folder: Path = RESULTS,
    page: Path = PAGE,
) -> None:
    """Write NAME.jsonl and NAME.png into ``folder``, and ``text`` between the marks of that name in ``page``.

    ``panels`` are bars with the label of their axis. All have the same bars' names, which the first one shows.
    """
    write_records(folder / f"{name}.jsonl", records)
    insert(page, name, text)
    figure, axes = new_figure(len(panels), height=height)
    for axis, (label, bars) in zip(axes, panels, strict=True):
        _draw_bars(axis, bars, label, form)
        if axis is not axes[0]:
            axis.set_yticklabels([])
    save_figure(figure, folder / f"{name}.png")


def _draw_bars(axis: Any, bars: Sequence[Bar], label: str, form: str) -> None:
    """Draw horizontal bars, the first on top, each with its value."""
    names, values, colors = zip(*bars, strict=True)
    drawn = axis.barh(range(len(bars)), [value or 0 for value in values], color=colors)
    texts = ["" if value is None else form.format(value) for value in values]
    axis.bar_label(drawn, texts, padding=3, fontsize="small")
    axis.set_yticks(range(len(bars)), names)
    axis.invert_yaxis()
    axis.set_xlabel(label, fontsize="small")
    axis.margins(x=0.15, y=0.01)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG that is small enough to be kept with the sources."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
