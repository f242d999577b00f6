"""The table of a plan, and its JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from lioncub.planning.forecast import DENSE, Cluster, Row

# how far predictions of exchanges alone were from what the network lab measured (docs/netlab.md), in one sentence
MODEL_ERROR = (
    "on Gloo, 2 to 8 workers on 2 cores, links as given with 100 us per message predicted, in the median, 7% too "
    "little at 100 Mb/s, 20% at 1 Gb/s and 75% at 10 Gb/s, where processors are what takes time; profiles of the same "
    "group were within 20% in 72% of the cells"
)
EXPLANATION = """\
* = what LionCub(algorithm="auto") would take. LionCub sends 1 bit per parameter, buckets one after the
other. all-reduce: all gradients as one message, by a ring or in 2 levels (reduce-scatter inside a node,
all-reduce between nodes, all-gather inside), whichever is faster. "wire" is communication alone, without
packing and voting; "a node sends" what the busiest one sends to others, per step. overlap: forward (1/3
of the computation) + max(backward, wire), for every method. Speedups are over fp32 all-reduce."""


def build_table(cluster: Cluster, rows: Sequence[Row]) -> Table:
    """Communication, bytes, steps and speedups of every method."""
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
        label = row.method if row.method not in DENSE else f"{row.method}, {row.way}"
        table.add_row(f"{label} *" if row.is_chosen else label, *cells, style="bold" if row.is_chosen else None)
    return table


def _times(ratio: float) -> str:
    return f"{ratio:,.2f}x"


def notes(cluster: Cluster) -> list[str]:
    """What the figures are based on, and how far they can be trusted."""
    lines = [EXPLANATION, f"Based on {cluster.costs.source}."]
    if not cluster.compute_s:
        lines.append("No --compute-ms: speedups are of communication alone, the most that a step could gain.")
    lines.append(f"Error of the model: {MODEL_ERROR}.")
    return lines


def to_dict(cluster: Cluster, rows: Sequence[Row], worlds: Sequence[tuple[int, Sequence[Row]]]) -> dict[str, Any]:
    """All figures, for JSON: the cluster, its rows, and the rows by number of workers."""
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
    """Milliseconds, three digits at least."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(n_bytes: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:,.3g} {unit}" if n_bytes < 1000 * scale else f"{n_bytes / scale:,.0f} {unit}"
    return f"{n_bytes} B"
