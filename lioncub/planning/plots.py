"""The plot of a plan: communication and speedup over the number of workers."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lioncub.planning.forecast import BASELINE, Cluster, Row
from lioncub.probing.plots import COLOURS

DENSE_COLOURS = {"fp32 all-reduce": "#222222", "bf16 all-reduce": "#8a8a8a"}


def write_plot(cluster: Cluster, worlds: Sequence[tuple[int, Sequence[Row]]], path: Path) -> None:
    """Write a PNG: time of communication, and of a step against fp32 all-reduce, for 2 to 4096 workers."""
    # a Figure of its own draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    figure.suptitle(
        f"{cluster.params:,} parameters, {cluster.local} workers per node: predicted, not measured", fontsize=11
    )
    times, speedups = figure.subplots(1, 2)
    lines: dict[str, list[tuple[int, Row]]] = {}
    for world, rows in worlds:
        for row in rows:
            lines.setdefault(row.method, []).append((world, row))
    for method, found in lines.items():
        n, rows_of = [world for world, _ in found], [row for _, row in found]
        dense = method in DENSE_COLOURS
        colour, style = (DENSE_COLOURS | COLOURS)[method], "--" if dense else "-"
        label = method if dense else f"LionCub {method}"
        times.plot(n, [1e3 * row.seconds for row in rows_of], color=colour, linestyle=style, linewidth=1.7, label=label)
        if method != BASELINE:
            speedups.plot(
                n, [row.speedup for row in rows_of], color=colour, linestyle=style, linewidth=1.7, label=label
            )
    times.set_yscale("log")
    times.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    times.legend(frameon=False, fontsize=8)
    _finish(times, "Communication per step", "ms (log scale)")
    compared = "step, without overlap" if cluster.compute_s else "communication"
    speedups.axhline(1, color="#222222", linestyle=":", linewidth=1)
    _finish(speedups, f"Speedup over fp32 all-reduce ({compared})", "times")
    if cluster.nodes * cluster.local <= worlds[-1][0]:
        for axes in (times, speedups):
            axes.axvline(cluster.nodes * cluster.local, color="#bbbbbb", linewidth=1, zorder=0)
    figure.savefig(path, dpi=150, format="png")


def _finish(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2**i for i in range(1, 13)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("workers")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
