"""PNG plots of a run: speedup by rate, what a step is made of, exchanges against the wire limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from netlab.matrix import DECIDING_WORKERS
from netlab.names import ALGORITHM_OF, BASELINE, FLOOR, OVERLAP, TITLES
from netlab.rates import rate_name
from netlab.summary import Cell, Repetition, Spread, Table, alone_share, headline, paired_ratio, spread_of

PLOT_NAMES = ("netlab_speedup.png", "netlab_steps.png", "netlab_wire.png")
COLOURS = {
    FLOOR: "#222222",
    BASELINE: "#c2571a",
    "ddp_fp32": "#e0975f",
    "ddp_bf16": "#b58b00",
    "ddp_powersgd": "#7a5195",
    "int8_vote": "#5c8a3a",
    "lioncub": "#1a66b0",
}
PARTS = {"forward": "#9ecae1", "backward": "#4292c6", "exposed": "#d9603b", "optimizer": "#8c8c8c"}
PART_LABELS = {
    "forward": "forward",
    "backward": "backward",
    "exposed": "waiting for communication",
    "optimizer": "optimizer",
}
ALGORITHM_COLOURS = ("#1a66b0", "#2a9d8f", "#7a5195", "#b58b00", "#c2571a")


def write_plots(table: Table, folder: Path) -> list[Path]:
    """Write the plots into ``folder``; gives their paths, in the order of PLOT_NAMES. None for two levels alone."""
    if not _flat(table):
        return []
    paths = [folder / name for name in PLOT_NAMES]
    for path, figure in zip(paths, (speedup_figure(table), step_figure(table), wire_figure(table)), strict=True):
        figure.savefig(path, dpi=130)
    return paths


def _flat(table: Table) -> Table:
    return {cell: methods for cell, methods in sorted(table.items()) if cell.per_host == 1}


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    # a Figure of its own draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False).tolist()
    for axis in (axis for row in axes for axis in row):
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def speedup_figure(table: Table) -> Figure:
    """Speedup over the first baseline by rate: one panel per model and number of workers."""
    flat = _flat(table)
    models, hosts = list(dict.fromkeys(c.model for c in flat)), sorted({c.hosts for c in flat})
    figure, axes = _grid(len(models), len(hosts), 4.2, 3.6)
    for row, model in zip(axes, models, strict=True):
        for axis, count in zip(row, hosts, strict=True):
            _draw_speedups(axis, {c: m for c, m in flat.items() if (c.model, c.hosts) == (model, count)})
            axis.set_title(f"{model}, {count} workers", loc="left")
    figure.supylabel("speedup over DDP fp32 + lion-pytorch", fontsize="medium")
    handles: dict[str, Artist] = {}
    for axis in (axis for row in axes for axis in row):
        handles.update(dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(3, 1 + len(hosts) // 2),
        frameon=False,
    )
    return figure


def _draw_speedups(axis: Axes, cells: Table) -> None:
    lines: dict[str, dict[int, float]] = {}
    for cell, methods in cells.items():
        if BASELINE not in methods:
            continue
        ours = headline(methods)
        shown = {name: name for name in (FLOOR, "ddp_fp32", "ddp_bf16", "ddp_powersgd", "int8_vote") if name in methods}
        if ours is not None:
            shown["lioncub"] = ours
        for colour, name in shown.items():
            ratio = paired_ratio(methods[BASELINE], methods[name]).median
            lines.setdefault(colour, {})[cell.rate] = ratio
    for colour, points in lines.items():
        title = "LionCub" if colour == "lioncub" else TITLES[colour]
        style = "--" if colour == FLOOR else "-"
        width = 2.4 if colour == "lioncub" else 1.4
        axis.plot(list(points), list(points.values()), style, marker="o", color=COLOURS[colour], lw=width, label=title)
    rates = [cell.rate for cell in cells]
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(rates, [rate_name(rate) for rate in rates])
    axis.minorticks_off()
    ticks = (0.5, 1, 2, 4, 8, 16, 32)
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.axhline(1, color="#999999", lw=0.8)


def step_figure(table: Table) -> Figure:
    """What a step is made of, at the number of workers that decides or else the first."""
    flat = _flat(table)
    hosts = DECIDING_WORKERS if any(c.hosts == DECIDING_WORKERS for c in flat) else next(iter(flat)).hosts
    cells = [cell for cell in flat if cell.hosts == hosts]
    models, rates = list(dict.fromkeys(c.model for c in cells)), sorted({c.rate for c in cells})
    figure, axes = _grid(len(models), len(rates), 4.8, 4.4)
    for row, model in zip(axes, models, strict=True):
        for column, (axis, rate) in enumerate(zip(row, rates, strict=True)):
            methods = table.get(Cell(hosts, 1, rate, model), {})
            _draw_steps(axis, methods, names=column == 0)
            axis.set_title(f"{model}, {rate_name(rate)}", loc="left")
    axes[-1][0].set_xlabel("ms (median of repetitions)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_steps(axis: Axes, methods: dict[str, list[Repetition]], names: bool) -> None:
    order = [name for name in TITLES if name in methods]
    left = [0.0] * len(order)
    for part, colour in PARTS.items():
        values = [1e3 * spread_of([getattr(r, part) for r in methods[name]]).median for name in order]
        axis.barh(range(len(order)), values, left=left, color=colour, label=PART_LABELS[part])
        left = [before + value for before, value in zip(left, values, strict=True)]
    axis.set_yticks(range(len(order)), [TITLES[name] for name in order] if names else [])
    axis.invert_yaxis()
    axis.set_xlim(left=0)


def wire_figure(table: Table) -> Figure:
    """Exchanges alone: the wire limit over the measured time, by rate, one panel per model and number of workers."""
    flat = _flat(table)
    models, hosts = list(dict.fromkeys(c.model for c in flat)), sorted({c.hosts for c in flat})
    figure, axes = _grid(len(models), len(hosts), 4.2, 3.2)
    algorithms = [
        n for n in ALGORITHM_OF if not n.endswith(OVERLAP) and ALGORITHM_OF[n] not in ("auto", "hierarchical")
    ]
    for row, model in zip(axes, models, strict=True):
        for axis, count in zip(row, hosts, strict=True):
            cells = [cell for cell in flat if (cell.model, cell.hosts) == (model, count)]
            for i, name in enumerate(algorithms):
                shares = [alone_share(cell, flat[cell].get(name, [])) for cell in cells]
                _draw_shares(axis, shares, i, len(algorithms), TITLES[name])
            axis.set_xticks(range(len(cells)), [rate_name(cell.rate) for cell in cells])
            axis.axhline(1, color="#999999", lw=0.8)
            axis.set_ylim(0, 1.15)
            axis.set_title(f"{model}, {count} workers", loc="left")
    figure.supylabel("wire limit / measured", fontsize="medium")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, 2 * len(hosts)), frameon=False)
    return figure


def _draw_shares(axis: Axes, shares: Sequence[Spread | None], index: int, count: int, label: str) -> None:
    width = 0.8 / count
    at = [i - 0.4 + (index + 0.5) * width for i in range(len(shares))]
    known = [(x, share) for x, share in zip(at, shares, strict=True) if share is not None]
    if not known:
        return
    heights = [share.median for _, share in known]
    errors = [[share.median - share.low for _, share in known], [share.high - share.median for _, share in known]]
    colour = ALGORITHM_COLOURS[index % len(ALGORITHM_COLOURS)]
    axis.bar([x for x, _ in known], heights, width, yerr=errors, color=colour, error_kw={"lw": 0.8}, label=label)
