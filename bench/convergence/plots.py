"""The study's figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from convergence.methods import METHODS, REFERENCE
from convergence.results import Cell, Results, cell_of
from convergence.stages import CANDIDATES, DEFAULT, PLAIN_VOTE, SKEWED_CANDIDATES, WORKERS
from convergence.tasks import TASKS

# of a figure with one line per method; there are ten colors
SHOWN = (
    REFERENCE,
    PLAIN_VOTE,
    DEFAULT,
    CANDIDATES[-1],
    "SignMean",
    "2-bit l1",
    "2-bit linf",
    *SKEWED_CANDIDATES[2:4],
    SKEWED_CANDIDATES[-2],
)
_FEWEST_SEEDS = 4


def write_plots(results: Results, folder: Path, name: str) -> list[Path]:
    """Write those that have something to show."""
    figures = {"loss": loss_figure, "bytes": bytes_figure, "ways": ways_figure, "drift": drift_figure}
    written = []
    for kind, draw in figures.items():
        figure = draw(results)
        if figure is not None:
            written.append(folder / f"{name}_{kind}.png")
            figure.savefig(written[-1], dpi=110)
    return written


def loss_figure(results: Results) -> Figure | None:
    """Validation loss over steps, mean of seeds; without methods whose few seeds would not compare with the others'."""

    def draw(axis: Axes, cell: Cell) -> None:
        fewest = min(_FEWEST_SEEDS, len(results.runs(cell, REFERENCE)))
        for i, method in enumerate(SHOWN):
            runs = results.runs(cell, method)
            curve = _mean_curve([run["validation"] for run in runs.values()])
            if curve and len(runs) >= fewest:
                axis.plot(*zip(*curve, strict=True), label=method, color=f"C{i}", lw=1.2)
        axis.set_xlabel("step")
        axis.set_ylabel("validation loss")

    return _grid(results, draw, SHOWN)


def bytes_figure(results: Results) -> Figure | None:
    """Relative difference over bytes, with intervals where there are some seeds."""

    def draw(axis: Axes, cell: Cell) -> None:
        for method in METHODS:
            found, ratio = results.difference(cell, method), results.bytes_ratio(cell, method)
            if found is None or ratio is None:
                continue
            height = [[found.mean - found.low], [found.high - found.mean]] if found.count > 2 else None
            index = SHOWN.index(method) if method in SHOWN else None
            style = {"color": f"C{index}", "label": method, "zorder": 3} if index is not None else {"color": "#bbbbbb"}
            axis.errorbar([1 / ratio], [found.mean], yerr=height, fmt="o", ms=4, lw=0.9, **style)
        axis.axhline(0, color="#999999", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
        axis.set_xlabel("bytes / fp32 all-reduce")
        axis.set_ylabel("loss against Lion")

    return _grid(results, draw, tuple(METHODS))


def ways_figure(results: Results) -> Figure | None:
    """Agreement with Lion's direction over steps (solid), and unanimity (dashed)."""

    def draw(axis: Axes, cell: Cell) -> None:
        for i, method in enumerate(SHOWN):
            for key, style in (("agreement", "-"), ("unanimous", "--")):
                curve = _mean_curve(_seen(results, cell, method, lambda found, key=key: found.get(key)))
                if curve:
                    label = method if key == "agreement" else None
                    axis.plot(*zip(*curve, strict=True), style, label=label, color=f"C{i}", lw=1.2)
        axis.set_ylim(0, 1)
        axis.set_xlabel("step")
        axis.set_ylabel("agrees with Lion (- -: unanimous)")

    return _grid(results, draw, SHOWN[1:])


def drift_figure(results: Results) -> Figure | None:
    """Drift of momentum by kind of layer over steps: unsynchronized votes solid, the last candidate dashed."""
    shown = (CANDIDATES[0], CANDIDATES[-1])

    def draw(axis: Axes, cell: Cell) -> None:
        for method, style in zip(shown, ("-", "--"), strict=True):
            for i, kind in enumerate(("embedding", "attention", "mlp", "convolution", "norm", "head")):
                curve = _mean_curve(
                    _seen(results, cell, method, lambda found, kind=kind: found.get("drift", {}).get(kind))
                )
                if curve:
                    label = kind if style == "-" else None
                    axis.plot(*zip(*curve, strict=True), style, label=label, color=f"C{i}", lw=1.2)
        axis.set_ylim(0, 1)
        axis.set_xlabel("step")
        axis.set_ylabel("momentum drift (- -: synchronized)")

    return _grid(results, draw, shown)


Curve = list[tuple[int, float]]


def _seen(results: Results, cell: Cell, method: str, value: Callable[[dict], float | None]) -> list[Curve]:  # type: ignore[type-arg]
    runs = results.runs(cell, method).values()
    return [[(f["step"], v) for f in run["seen"] if (v := value(f)) is not None] for run in runs]


def _mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> Curve:
    found = defaultdict(list)
    for curve in curves:
        for step, value in curve:
            found[int(step)].append(value)
    return [(step, fmean(values)) for step, values in sorted(found.items())]


def _grid(results: Results, draw: Callable[[Axes, Cell], None], methods: Sequence[str]) -> Figure | None:
    """A panel per task, shards and number of workers that has a run of some of these methods."""
    rows = [(task, how) for task in TASKS for how in ("iid", "skewed")]
    cells = {(row, n): cell_of(*row, n) for row in rows for n in WORKERS}
    cells = {key: cell for key, cell in cells.items() if any(results.runs(cell, method) for method in methods)}
    if not cells:
        return None
    rows = [row for row in rows if any((row, n) in cells for n in WORKERS)]
    figure = Figure(figsize=(4.8 * len(WORKERS), 3.2 * len(rows) + 0.8), layout="constrained")
    axes = figure.subplots(len(rows), len(WORKERS), squeeze=False)
    labels = {}
    for i, row in enumerate(rows):
        for j, workers in enumerate(WORKERS):
            cell = cells.get((row, workers))
            if cell is None:
                axes[i][j].set_axis_off()
                continue
            draw(axes[i][j], cell)
            axes[i][j].set_title(f"{cell.task}, {cell.shards}, {cell.workers} workers", loc="left", fontsize="medium")
            axes[i][j].spines[["top", "right"]].set_visible(False)
            handles, texts = axes[i][j].get_legend_handles_labels()
            labels |= dict(zip(texts, handles, strict=True))
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure
