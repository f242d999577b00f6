"""Figures of a run from its records: the table, and the plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from demo.methods import StepCost

# the training loss of a single step is noisy
LAST_STEPS = 20
NETWORKS = {"100 Mb/s": 1e8, "1 Gb/s": 1e9, "10 Gb/s": 1e10}
TITLES = {"lion": "Lion, DDP, fp32", "lioncub": "LionCub"}
COLOURS = {"lion": "#c2571a", "lioncub": "#1a66b0"}
# the lines often coincide: the one drawn later is thinner, so that both are seen
WIDTHS = {"lion": 3.2, "lioncub": 1.4}
CAPTION = """\
Medians over steps, means over {workers} workers that share this machine. Communication of Lion under DDP: from the
moment a bucket of gradients is ready until its sum has arrived; "waited for" is the part after the last bucket is
ready. Its bytes are computed for a ring all-reduce, 2(N-1)/N x 4 per parameter; those of LionCub are counted, control
messages included. Computed steps: measured computation plus bytes / bandwidth, without latency. Lion is credited with
perfect overlap, forward + max(backward, wire) + optimizer; LionCub with none, forward + backward + wire + optimizer."""


@dataclass(frozen=True, kw_only=True)
class Record(StepCost):
    """One step of one method: means over the workers, and the validation loss after it where it was evaluated."""

    method: str
    step: int
    step_seconds: float
    val_loss: float | None = None


def summarize(records: Sequence[Record], method: str) -> dict[str, float]:
    """Return the figures of a method by their labels: nats per byte, bytes, and milliseconds."""
    own = [record for record in records if record.method == method]

    def typical(name: str) -> float:
        return median(getattr(record, name) for record in own)

    forward, backward, optimizer = (typical(f"{part}_seconds") for part in ("forward", "backward", "optimizer"))
    figures = {
        f"train loss, last {LAST_STEPS} steps": fmean(record.loss for record in own[-LAST_STEPS:]),
        "validation loss": [record.val_loss for record in own if record.val_loss is not None][-1],
        "bytes sent per worker and step": typical("bytes_sent"),
        "step, ms": 1e3 * typical("step_seconds"),
        "  forward + backward": 1e3 * (forward + backward),
        "  optimizer": 1e3 * optimizer,
        "  communication": 1e3 * typical("communication_seconds"),
        "  communication waited for": 1e3 * typical("exposed_seconds"),
    }
    for network, bits_per_second in NETWORKS.items():
        wire = 8 * typical("bytes_sent") / bits_per_second
        parallel = max(backward, wire) if method == "lion" else backward + wire
        figures[f"computed step at {network}, ms"] = 1e3 * (forward + parallel + optimizer)
    return figures


def table(records: Sequence[Record], workers: int) -> str:
    """Return the table of all methods as text, with the ratio of the first to the last one."""
    methods = list(dict.fromkeys(record.method for record in records))
    columns = [summarize(records, method) for method in sorted(methods)]
    rows = [["nats per byte, bytes, ms", *(TITLES[method] for method in sorted(methods))]]
    rows[0] += ["ratio"] * (len(columns) > 1)
    for label in columns[0]:
        values = [column[label] for column in columns]
        digits = 3 if "loss" in label else 0 if "bytes" in label else 1
        row = [label, *(f"{value:,.{digits}f}" for value in values)]
        if len(columns) > 1:
            row.append(f"{values[0] / values[-1]:.2f}x" if "loss" not in label and values[-1] > 0 else "")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], "", CAPTION.format(workers=workers)])


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Average each value and its neighbours up to ``reach`` steps away, those on one side alone at the ends."""
    sums, n = list(accumulate(values, initial=0.0)), len(values)
    bounds = [(max(i - reach, 0), min(i + reach + 1, n)) for i in range(n)]
    return [(sums[end] - sums[start]) / (end - start) for start, end in bounds]


def write_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the plots into ``folder``: loss by step, loss by time, bytes by step. Return their paths."""
    by_step, steps_axes = _new_figure("Loss by step", "step", "loss (nats per byte)")
    by_time, time_axes = _new_figure("Loss by time", "training time on this machine (s)", "loss (nats per byte)")
    by_bytes, bytes_axes = _new_figure("Bytes sent by each worker", "step", "sent since the start (MB, log scale)")
    for method in sorted({record.method for record in records}):
        own = [record for record in records if record.method == method]
        steps = [float(record.step) for record in own]
        _draw_losses(steps_axes, own, steps)
        _draw_losses(time_axes, own, list(accumulate(record.step_seconds for record in own)))
        sent = [total / 1e6 for total in accumulate(record.bytes_sent for record in own)]
        label = f"{TITLES[method]}: {1e3 * sent[-1] / len(sent):,.1f} kB per step"
        bytes_axes.plot(steps, sent, color=COLOURS[method], linewidth=1.8, label=label)
    # one worker alone sends nothing, and log axes have no zero
    if all(record.bytes_sent > 0 for record in records):
        bytes_axes.set_yscale("log")
        bytes_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    paths = []
    for name, figure in {"loss_by_step": by_step, "loss_by_time": by_time, "bytes_by_step": by_bytes}.items():
        figure.axes[0].set_xlim(left=0)
        figure.axes[0].legend(frameon=False)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
    return paths


def _new_figure(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    # a separate Figure draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_losses(axes: Axes, own: Sequence[Record], x: list[float]) -> None:
    method, losses = own[0].method, [record.loss for record in own]
    colour, title = COLOURS[method], TITLES[method]
    axes.plot(x, losses, color=colour, alpha=0.12, linewidth=0.6)
    mean = smoothed(losses, len(own) // 40)
    axes.plot(x, mean, color=colour, linewidth=WIDTHS[method], label=f"{title}: training, running mean")
    points = [(at, record.val_loss) for at, record in zip(x, own, strict=True) if record.val_loss is not None]
    marker, size = ("s", 7) if method == "lion" else ("o", 4)
    style = {"linestyle": "none", "marker": marker, "markersize": size, "markerfacecolor": "white"}
    axes.plot(*zip(*points, strict=True), color=colour, label=f"{title}: validation", **style)
