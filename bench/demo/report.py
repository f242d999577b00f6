"""Figures of a run from its records: the table, and the plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from reporting.pages import new_figure, save_figure

from demo.methods import StepCost

# the training loss of a single step is noisy
LAST_STEPS = 20
NETWORKS = {"100 Mb/s": 1e8, "1 Gb/s": 1e9, "10 Gb/s": 1e10}
TITLES = {"lion": "Lion, DDP, fp32", "lioncub": "LionCub"}
COLORS = {"lion": "#c2571a", "lioncub": "#1a66b0"}
# the lines often coincide: the one drawn later is thinner, so that both are seen
WIDTHS = {"lion": 3.2, "lioncub": 1.4}
CAPTION = """\
Medians over steps, means over {workers} workers that share this machine. Communication that Lion under DDP waits for is
that after its last bucket of gradients is ready. Its bytes are computed for a ring all-reduce, 2(N-1)/N x 4 per
parameter; those of LionCub are counted, control messages included. Computed steps: measured computation plus bytes /
bandwidth, without latency. Lion is credited with perfect overlap, forward + max(backward, wire) + optimizer; LionCub
with none, forward + backward + wire + optimizer."""


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


def write_plots(records: Sequence[Record], path: Path) -> None:
    """Draw loss by step, loss by time, and bytes by step, side by side."""
    figure, (by_step, by_time, by_bytes) = new_figure(3, height=4.2)
    for method in sorted({record.method for record in records}):
        own = [record for record in records if record.method == method]
        steps = [float(record.step) for record in own]
        _draw_losses(by_step, own, steps)
        _draw_losses(by_time, own, list(accumulate(record.step_seconds for record in own)))
        sent = [total / 1e6 for total in accumulate(record.bytes_sent for record in own)]
        label = f"{TITLES[method]}: {1e3 * sent[-1] / len(sent):,.1f} kB per step"
        by_bytes.plot(steps, sent, color=COLORS[method], label=label)
    # one worker alone sends nothing, and log axes have no zero
    by_bytes.set_yscale("log" if all(record.bytes_sent > 0 for record in records) else "linear")
    by_step.set(xlabel="step", ylabel="loss (nats per byte)")
    by_time.set(xlabel="training time on this machine (s)", ylabel="loss (nats per byte)")
    by_bytes.set(xlabel="step", ylabel="sent by each worker (MB)")
    for axes in (by_step, by_time, by_bytes):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    save_figure(figure, path)


def _draw_losses(axes: Any, own: Sequence[Record], x: list[float]) -> None:
    method, losses = own[0].method, [record.loss for record in own]
    color, title = COLORS[method], TITLES[method]
    axes.plot(x, losses, color=color, alpha=0.12, linewidth=0.6)
    mean = smoothed(losses, len(own) // 40)
    axes.plot(x, mean, color=color, linewidth=WIDTHS[method], label=f"{title}: training, running mean")
    points = [(at, record.val_loss) for at, record in zip(x, own, strict=True) if record.val_loss is not None]
    style = {"linestyle": "none", "marker": "s" if method == "lion" else "o", "markerfacecolor": "white"}
    axes.plot(*zip(*points, strict=True), color=color, label=f"{title}: validation", **style)
