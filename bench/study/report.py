"""Tables and picture of docs/results.md: what each method loses against plain Lion, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from reporting.pages import OURS, OURS_TOO, PAGE, PEERS, markdown_table, write_results
from reporting.records import Record, RecordsError
from scipy import stats

from study.training import METHODS, PLAIN_VOTE, PRECISIONS, REFERENCE

CONFIDENCE = 0.95
# task, shards, workers
Cell = tuple[str, str, int]


def write_report(records: Sequence[Record], folder: Path, page: Path = PAGE) -> None:
    """Write study.jsonl and study.png into ``folder`` and the tables into ``page``.

    Raises RecordsError where no cell has the reference and another method.
    """
    trainings = [record for record in records if record["kind"] == "training"]
    cells = cells_of(trainings)
    if not any(difference(trainings, cell, method) for cell in cells for method in METHODS):
        raise RecordsError(f"expected runs of {REFERENCE} and another method with the same seed, got none")
    text = f"{loss_table(trainings, cells)}\n\n{share_table(trainings, cells)}"
    shown = [cell for cell in cells if cell[2] == 4] or cells
    methods = [name for name in METHODS if any(_settled(trainings, cell, name) is not None for cell in shown)]
    panels = []
    for cell in shown:
        bars = [(name, _settled(trainings, cell, name), color_of(name)) for name in methods]
        panels.append((f"% of loss against Lion, {title_of(cell)}", bars))
    write_results("study", records, text, panels, height=4.2, form="{:+.1f}", folder=folder, page=page)


def _settled(trainings: Sequence[Record], cell: Cell, method: str) -> float | None:
    """Return the difference in percent where it is the mean of some seeds."""
    found = difference(trainings, cell, method)
    return None if found is None or found[2] < 3 else 100 * found[0]


def cells_of(trainings: Sequence[Record]) -> list[Cell]:
    """Return cells with the task's own batch, sorted."""
    found = {(t["task"], t["shards"], t["workers"]) for t in trainings}
    return sorted(found, key=lambda cell: (cell[0] != "text", cell))


def losses(trainings: Sequence[Record], cell: Cell, method: str) -> dict[int, float]:
    """Return the final loss by seed."""
    chosen = [t for t in trainings if (t["task"], t["shards"], t["workers"], t["method"]) == (*cell, method)]
    return {t["seed"]: t["loss"] for t in chosen}


def difference(trainings: Sequence[Record], cell: Cell, method: str) -> tuple[float, float, int] | None:
    """Return the mean of loss / reference - 1 over common seeds, half its Student interval, and the number of seeds."""
    ours, reference = losses(trainings, cell, method), losses(trainings, cell, REFERENCE)
    values = [ours[seed] / reference[seed] - 1 for seed in sorted(ours.keys() & reference.keys())]
    if method == REFERENCE or not values:
        return None
    count = len(values)
    if count == 1:
        return values[0], math.inf, 1
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(count), count


def bytes_ratio(trainings: Sequence[Record], cell: Cell, method: str) -> float:
    """Return how many times fewer bytes than an all-reduce of fp32 are sent."""
    chosen = [t for t in trainings if (t["task"], t["shards"], t["workers"], t["method"]) == (*cell, method)]
    return fmean(t["fp32_bytes_per_step"] / t["bytes_per_step"] for t in chosen)


def loss_table(trainings: Sequence[Record], cells: Sequence[Cell]) -> str:
    """Tabulate loss against the reference by method and cell: mean, half of the 95 % interval, seeds."""
    rows = []
    for method in METHODS:
        found = [difference(trainings, cell, method) for cell in cells]
        if any(found):
            first = next(cell for cell, one in zip(cells, found, strict=True) if one)
            ratio = f"{bytes_ratio(trainings, first, method):.1f}"
            rows.append((method, ratio, *("" if one is None else text_of(*one) for one in found)))
    return markdown_table(("method", "fewer bytes", *map(title_of, cells)), rows)


def text_of(mean: float, half: float, count: int) -> str:
    """Return "+0.6 ±0.2 (32)" in percent."""
    spread = "" if math.isinf(half) else f" ±{100 * half:.1f}"
    return f"{100 * mean:+.1f}{spread} ({count})"


def share_table(trainings: Sequence[Record], cells: Sequence[Cell]) -> str:
    """Tabulate the share of what plain votes lose that a method wins back, on skewed shards, over common seeds."""
    skewed = [cell for cell in cells if cell[1] == "skewed"]
    rows = []
    for method in METHODS:
        shares = [_share(trainings, cell, method) for cell in skewed]
        if METHODS[method].sync is not None and any(shares):
            rows.append((method, *("" if share is None else f"{share:.0%}" for share in shares)))
    return markdown_table(("won back by", *map(title_of, skewed)), rows)


def _share(trainings: Sequence[Record], cell: Cell, method: str) -> float | None:
    ours, votes, reference = (losses(trainings, cell, name) for name in (method, PLAIN_VOTE, REFERENCE))
    seeds = ours.keys() & votes.keys() & reference.keys()
    if len(seeds) < 3:
        return None
    return sum(votes[s] - ours[s] for s in seeds) / sum(votes[s] - reference[s] for s in seeds)


def precision_table(trainings: Sequence[Record]) -> str:
    """Tabulate what parameters in bf16 cost, for docs/low-precision.md: losses by seed, and weights that moved."""
    rows = []
    for method, (_, n_bytes) in PRECISIONS.items():
        own = sorted((t["seed"], t["loss"], t["moved"]) for t in trainings if t["method"] == method)
        if own:
            _, found, moved = zip(*own, strict=True)
            rows.append((method, n_bytes, ", ".join(f"{x:.3f}" for x in found), f"{fmean(found):.3f}", fmean(moved)))
    header = ("Parameters", "Bytes", "Validation loss, by seed", "Mean", "Weights that moved")
    return markdown_table(header, [(*row, f"{moved:.0%}") for *row, moved in rows])


def title_of(cell: Cell) -> str:
    """Name a cell in words."""
    return f"{cell[0]}, {'equal' if cell[1] == 'iid' else cell[1]}, {cell[2]} workers"


def color_of(method: str) -> str:
    """Return a dark blue for synchronized momentum, a light one for other compressions."""
    if METHODS[method].compression is None:
        return PEERS
    return OURS_TOO if METHODS[method].sync is None else OURS
