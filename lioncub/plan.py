"""Prediction of a cluster's communication and step times: arithmetic on the cost model, its table, plot and JSON.

Nothing is measured. Table and plot need the extra ``cli``; the arithmetic does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lioncub.collectives.cost import (
    Costs,
    Link,
    best_bucket_bytes,
    candidates,
    dense_phases,
    node_bytes,
    phases,
)
from lioncub.collectives.groups import Topology
from lioncub.kernels.layout import packed_bytes
from lioncub.probe import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

DENSE = {"fp32 all-reduce": 4, "bf16 all-reduce": 2}
BASELINE = "fp32 all-reduce"
DENSE_COLOURS = {"fp32 all-reduce": "#222222", "bf16 all-reduce": "#8a8a8a"}
WORLDS = tuple(2**i for i in range(1, 13))
# of the time that a step computes: gradients take about twice as long as the forward pass
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Cluster:
    """Sizes, links and seconds of computation per step.

    ``inter`` is a node's link to other nodes, shared by its workers; ``intra`` is a worker's link inside its node.
    ``origin`` states in words where the figures of the links are from.

    Raises:
        ValueError: fewer than two workers, or impossible figures; the message names the flag.
    """

    params: int
    nodes: int
    local: int
    inter: Link
    intra: Link
    compute_s: float = 0.0
    origin: str = "as given"

    def __post_init__(self) -> None:
        """Check the counts and the time."""
        if self.nodes < 1 or self.local < 1 or self.nodes * self.local < 2:
            raise ValueError(
                "--nodes, --gpus-per-node: expected counts >= 1 with at least 2 workers in all, "
                f"got {self.nodes} and {self.local}"
            )
        if not 0 <= self.compute_s < float("inf"):
            raise ValueError(f"--compute-ms: expected a finite number >= 0, got {1e3 * self.compute_s:g}")

    @property
    def topology(self) -> Topology:
        """Nodes with consecutive ranks on each."""
        return Topology.even(self.nodes, self.local)

    @property
    def costs(self) -> Costs:
        """The cost model of the links."""
        between = [f"{self.inter} from node to node"] * (self.nodes > 1)
        inside = [f"{self.intra} inside a node"] * (self.local > 1)
        source = f"links {self.origin}: {'; '.join(between + inside)}"
        return Costs(self.topology, self.inter, self.intra, source)


@dataclass(frozen=True)
class Row:
    """One method: seconds of communication, bytes that the busiest node sends to others, seconds of a step.

    ``detail`` is the shape of an all-reduce, or the number of buckets. ``overlapped_s`` is a step whose communication
    is hidden behind the backward pass. Speedups are over fp32 all-reduce, each against its step of the same kind.
    """

    method: str
    detail: str
    seconds: float
    node_bytes: int
    step_s: float
    overlapped_s: float
    speedup: float
    overlapped_speedup: float
    is_chosen: bool


def forecast(cluster: Cluster) -> tuple[Row, ...]:
    """Predict the dense all-reduces, then every algorithm that is possible on the cluster and choose the fastest."""
    dense = {name: _dense(cluster, size) for name, size in DENSE.items()}
    costs = cluster.costs
    votes = {name: _votes(cluster, costs, name) for name in candidates(costs.topology)}
    chosen = min(votes, key=lambda name: votes[name][1])
    baseline = dense[BASELINE][1]
    found = [*dense.items(), *votes.items()]
    return tuple(_row(cluster, name, facts, baseline, is_chosen=name == chosen) for name, facts in found)


def over_worlds(cluster: Cluster) -> list[tuple[int, tuple[Row, ...]]]:
    """Return (number of workers, forecast) for 2 to 4096 workers on equally full nodes, from the links alone."""
    found: dict[int, tuple[Row, ...]] = {}
    for world in WORLDS:
        local = min(world, cluster.local)
        nodes = max(1, world // local)
        found[nodes * local] = forecast(dataclasses.replace(cluster, nodes=nodes, local=local))
    return sorted(found.items())


def _dense(cluster: Cluster, bytes_per_element: int) -> tuple[str, float, int]:
    """Return (shape, seconds, bytes between nodes) of an all-reduce of all gradients: the faster of both shapes."""
    costs = cluster.costs
    shapes = zip(("ring", "2 levels"), dense_phases(bytes_per_element * cluster.params, costs.topology), strict=False)
    shape, best = min(shapes, key=lambda item: costs.seconds_of(item[1]))
    return shape, costs.seconds_of(best), sum(node_bytes(phase, costs.topology) for phase in best)


def _votes(cluster: Cluster, costs: Costs, algorithm: str) -> tuple[str, float, int]:
    """Return (buckets, seconds, bytes between nodes) of the votes on all parameters, one bucket after the other."""
    total = packed_bytes(cluster.params)
    size = best_bucket_bytes([total], algorithm, costs, overlap=False)
    messages = [size] * (total // size) + ([total % size] if total % size else [])
    counts = {n_bytes: messages.count(n_bytes) for n_bytes in set(messages)}
    seconds = sum(count * costs.seconds(algorithm, n_bytes) for n_bytes, count in counts.items())
    between = sum(
        count * node_bytes(phase, costs.topology)
        for n_bytes, count in counts.items()
        for phase in phases(algorithm, n_bytes, costs.topology)
    )
    return f"{len(messages)} bucket{'s' * (len(messages) != 1)}", seconds, between


def _row(cluster: Cluster, name: str, facts: tuple[str, float, int], baseline: float, *, is_chosen: bool) -> Row:
    detail, seconds, between = facts
    step, overlapped = _steps(cluster.compute_s, seconds)
    slow_step, slow_overlapped = _steps(cluster.compute_s, baseline)
    speedups = slow_step / step, slow_overlapped / overlapped
    return Row(name, detail, seconds, between, step, overlapped, *speedups, is_chosen)


def _steps(compute: float, wire: float) -> tuple[float, float]:
    """Return the seconds of a step without and with overlap."""
    backward = BACKWARD_SHARE * compute
    return compute + wire, compute - backward + max(backward, wire)


# how far predictions of communication alone were from measurements in the network lab (docs/results.md)
MODEL_ERROR = (
    "on Gloo, 2 to 8 workers on 2 cores, links as given with 100 us per message predicted, in the median, 7% too "
    "little at 100 Mb/s, 20% at 1 Gb/s and 75% at 10 Gb/s, where processors limit the speed"
)
EXPLANATION = """\
* = the choice of LionCub. LionCub sends 1 bit per parameter, buckets one after the
other. all-reduce: all gradients as one message, by a ring or in 2 levels (reduce-scatter inside a node,
all-reduce between nodes, all-gather inside), whichever is faster. "wire": communication alone, without
packing and voting. "a node sends": bytes from the busiest node to others, per step. overlap: forward
(1/3 of the computation) + max(backward, wire), for every method. Speedups are over fp32 all-reduce."""


def build_table(cluster: Cluster, rows: Sequence[Row]) -> Table:
    """Tabulate communication, bytes, steps and speedups of every method."""
    from rich import box
    from rich.table import Table

    computed = f", {1e3 * cluster.compute_s:g} ms of computation" if cluster.compute_s else ""
    table = Table(
        title=f"{cluster.params:,} parameters, {cluster.nodes} x {cluster.local} workers{computed}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    titles = ["wire\nms", "a node\nsends", "\nspeedup"]
    if cluster.compute_s:
        titles[2:] = ["step\nms", "\nspeedup", "overlap:\nstep ms", "\nspeedup"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [milliseconds(row.seconds), amount(row.node_bytes)]
        if cluster.compute_s:
            cells += [milliseconds(row.step_s), _times(row.speedup)]
            cells += [milliseconds(row.overlapped_s), _times(row.overlapped_speedup)]
        else:
            cells.append(_times(row.speedup))
        label = row.method if row.method not in DENSE else f"{row.method}, {row.detail}"
        table.add_row(f"{label} *" if row.is_chosen else label, *cells, style="bold" if row.is_chosen else None)
    return table


def _times(ratio: float) -> str:
    return f"{ratio:,.2f}x"


def notes(cluster: Cluster) -> list[str]:
    """Explain the table: its terms, the source of its figures, and their error."""
    lines = [EXPLANATION, f"Based on {cluster.costs.source}."]
    if not cluster.compute_s:
        lines.append("No --compute-ms: speedups are of communication alone, an upper bound for a step.")
    lines.append(f"Error of the model: {MODEL_ERROR}.")
    return lines


def to_dict(cluster: Cluster, rows: Sequence[Row], worlds: Sequence[tuple[int, Sequence[Row]]]) -> dict[str, Any]:
    """Collect all figures for JSON: the cluster, its rows, and the rows by number of workers."""
    return {
        "params": cluster.params,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.local,
        "compute_s": cluster.compute_s,
        "source": cluster.costs.source,
        "model_error": MODEL_ERROR,
        "methods": [dataclasses.asdict(row) for row in rows],
        "worlds": [{"workers": n, "methods": [dataclasses.asdict(row) for row in found]} for n, found in worlds],
    }


def milliseconds(seconds: float) -> str:
    """Format as milliseconds with at least three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(n_bytes: int) -> str:
    """Format bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.3g} {unit}" if n_bytes < 1000 * scale else f"{n_bytes / scale:,.0f} {unit}"
    return f"{n_bytes} B"


def write_plot(cluster: Cluster, worlds: Sequence[tuple[int, Sequence[Row]]], path: Path) -> None:
    """Write a PNG: communication per step and speedup over fp32 all-reduce, for 2 to 4096 workers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    # a separate Figure draws with Agg, without a display and without pyplot's global state
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
        style: dict[str, Any] = {
            "color": (DENSE_COLOURS | COLOURS)[method],
            "linestyle": "--" if dense else "-",
            "linewidth": 1.7,
            "label": method if dense else f"LionCub {method}",
        }
        times.plot(n, [1e3 * row.seconds for row in rows_of], **style)
        if method != BASELINE:
            speedups.plot(n, [row.speedup for row in rows_of], **style)
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
    axes.set_xticks(WORLDS, [str(world) for world in WORLDS])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("workers")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
