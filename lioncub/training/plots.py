"""PNG plots of a run: loss by step, loss by time, bytes by step."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from lioncub.training.log import StepRecord

PLOT_NAMES = ("loss_by_step.png", "loss_by_time.png", "bytes_by_step.png")
COLOURS = {"lion": "#c2571a", "lioncub": "#1a66b0"}
# the lines often coincide: the one drawn later is thinner, so that both are seen
WIDTHS = {"lion": 3.2, "lioncub": 1.4}
MARKERS = {"lion": ("s", 7), "lioncub": ("o", 4)}
LABELS = {"lion": "Lion, DDP, fp32 all-reduce", "lioncub": "LionCub, 1-bit votes"}

BYTES_NOTES = {"lion": ", computed for a ring", "lioncub": ", counted"}


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean of each value and its neighbours up to `reach` steps away, those on one side alone at the ends."""
    sums, n = list(accumulate(values, initial=0.0)), len(values)
    bounds = [(max(i - reach, 0), min(i + reach + 1, n)) for i in range(n)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def write_plots(records: Sequence[StepRecord], directory: Path) -> list[Path]:
    """Write the plots into `directory`; returns their paths, in the order of PLOT_NAMES."""
    methods = list(dict.fromkeys(record.method for record in records))
    series = {method: [record for record in records if record.method == method] for method in methods}
    steps = {method: [float(record.step) for record in own] for method, own in series.items()}
    seconds = {method: list(accumulate(record.step_seconds for record in own)) for method, own in series.items()}
    sent = {method: [total / 1e6 for total in accumulate(r.bytes_sent for r in own)] for method, own in series.items()}

    time_label = "training time on this machine (s), without evaluation"
    figures = (
        _loss_figure(series, steps, "step", "Loss by step"),
        _loss_figure(series, seconds, time_label, "Loss by time"),
        _bytes_figure(steps, sent),
    )
    paths = [directory / name for name in PLOT_NAMES]
    for path, figure in zip(paths, figures, strict=True):
        figure.savefig(path, dpi=150)
    return paths


def _new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    # a Figure of its own draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss_figure(
    series: dict[str, list[StepRecord]], positions: dict[str, list[float]], xlabel: str, title: str
) -> Figure:
    figure, axes = _new_figure(title, xlabel, "loss (nats per byte)")
    for method, own in sorted(series.items()):
        x, colour, losses = positions[method], COLOURS[method], [record.loss for record in own]
        axes.plot(x, losses, color=colour, alpha=0.12, linewidth=0.6)
        label = f"{LABELS[method]}: training, running mean"
        axes.plot(x, smoothed(losses, len(own) // 40), color=colour, linewidth=WIDTHS[method], label=label)
        marker, size = MARKERS[method]
        points = [(at, record.val_loss) for at, record in zip(x, own, strict=True) if record.val_loss is not None]
        axes.plot(
            [at for at, _ in points],
            [loss for _, loss in points],
            color=colour,
            linestyle="none",
            marker=marker,
            markersize=size,
            markerfacecolor="white",
            label=f"{LABELS[method]}: validation",
        )
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def _bytes_figure(steps: dict[str, list[float]], sent: dict[str, list[float]]) -> Figure:
    figure, axes = _new_figure("Bytes sent by each worker", "step", "sent since the start (MB, log scale)")
    for method, totals in sorted(sent.items()):
        per_step = 1e3 * totals[-1] / len(totals)
        label = f"{LABELS[method]}: {per_step:,.1f} kB per step{BYTES_NOTES[method]}"
        axes.plot(steps[method], totals, color=COLOURS[method], linewidth=1.8, label=label)
    # one worker alone sends nothing, and log axes have no zero
    if all(totals[0] > 0 for totals in sent.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    else:
        axes.set_ylabel("sent since the start (MB)")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="lower right")
    return figure
