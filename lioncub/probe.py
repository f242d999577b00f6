"""``lioncub probe``: the part of one rank, the table and the plot of a profile; they need the extra ``cli``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from lioncub.collectives.cost import Costs
from lioncub.collectives.groups import ProcessGroups, Topology
from lioncub.collectives.probe import probe
from lioncub.collectives.profile import Point, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COLOURS = {"all_gather": "#1a66b0", "reduce_scatter": "#c2571a", "hierarchical": "#2c8a4b", "all_reduce": "#7a4fa3"}
TITLES = {"whole": "all workers", "intra": "inside each node", "inter": "between nodes"}
EXPLANATION = """\
The cost model has two links, each with a latency per message and a bandwidth, fitted to the votes of their level.
error: how far the model is from the measured time of a vote."""
LEVELS = """\
whole: all workers; intra: those of each node, all nodes at once; inter: those with the same position on every
node, all positions at once."""
# between updates of the progress bar
REPORT_SECONDS = 0.1


def work(out: str, plot: str | None, budget: float, timeout: float) -> None:
    """Do the part of the rank that torchrun's environment names; the first rank prints the table and writes the files.

    ``budget`` and ``timeout`` are seconds. Where anything fails, the process ends with exit code 1, when it is
    interrupted with 130; the other ranks are ended by torchrun.
    """
    try:
        _measure(out, plot, budget, timeout)
    except (Exception, KeyboardInterrupt) as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        what = "interrupted" if is_interrupt else f"rank {os.environ['RANK']} failed: {error}"
        print(f"lioncub probe: {what}", file=sys.stderr, flush=True)
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(130 if is_interrupt else 1)


@record
def _measure(out: str, plot: str | None, budget: float, timeout: float) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    leads = dist.get_rank() == 0
    with _shown_progress(budget) if leads else contextlib.nullcontext(_ignored) as on_progress:
        profile = probe(ProcessGroups.find(), seconds=budget, on_progress=on_progress)
    dist.destroy_process_group()
    if leads:
        Path(out).write_text(profile.to_json(), encoding="utf-8")
        if plot is not None:
            write_plot(profile, Path(plot))
        print_report(profile)
        print(f"written: {', '.join(filter(None, (out, plot)))}")


def _ignored(fraction: float, what: str) -> None:
    pass


@contextlib.contextmanager
def _shown_progress(budget: float) -> Iterator[Callable[[float, str], None]]:
    """Show a live bar on a terminal, one line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"measuring {dist.get_world_size()} workers for about {budget:g} s", highlight=False)
        yield _ignored
        return
    last = 0.0
    text, what = TextColumn("{task.description}"), TextColumn("{task.fields[what]}")
    with Progress(text, BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), what, console=console) as bar:
        task = bar.add_task("measuring", total=1.0, what="starting")

        def on_progress(fraction: float, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= REPORT_SECONDS or fraction == 1:
                last = now
                bar.update(task, completed=fraction, what=what)

        yield on_progress


def print_report(profile: Profile) -> None:
    """Print the table to stdout, and its explanation."""
    from rich.console import Console

    Console().print(build_table(profile))
    print(EXPLANATION)
    if profile.topology.is_two_level:
        print(LEVELS)


def build_table(profile: Profile) -> Table:
    """Tabulate measured and predicted times of a vote of all workers, and the fitted links."""
    from rich import box
    from rich.table import Table

    links = [f"between nodes: {profile.inter}"] * (profile.topology.n_nodes > 1)
    links += [f"inside a node: {profile.intra}"] * (profile.topology.n_nodes < profile.world_size)
    table = Table(title="\n".join([profile.about, *links]), box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("algorithm", no_wrap=True)
    for title in ("message", "measured ms", "predicted ms", "error"):
        table.add_column(title, justify="right", no_wrap=True)
    for point in profile.points:
        if point.level == "whole":
            predicted = profile.predicted(point)
            times = (f"{1e3 * seconds:,.2f}" for seconds in (point.seconds, predicted))
            error = f"{100 * (predicted / point.seconds - 1):+.0f}%"
            table.add_row(point.algorithm, _binary(point.n_bytes), *times, error)
    return table


def _binary(n_bytes: int) -> str:
    """Format bytes in binary units."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:g} {unit}"
    return f"{n_bytes} B"


def write_plot(profile: Profile, path: Path) -> None:
    """Write a PNG with a panel for each measured level: measured times as points, modelled ones as lines."""
    from matplotlib.figure import Figure

    levels = [level for level in TITLES if any(point.level == level for point in profile.points)]
    # a separate Figure draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(1.2 + 5.4 * len(levels), 4.4), layout="constrained")
    figure.suptitle(f"Time of one vote: {profile.about}", fontsize=11)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        _draw(
            axes, [point for point in profile.points if point.level == level], _costs_of(profile, level), TITLES[level]
        )
    panels[0].set_ylabel("time of one vote (ms, log scale)")
    figure.savefig(path, dpi=150, format="png")


def _costs_of(profile: Profile, level: str) -> Costs:
    """Return the cost model of one level."""
    shape, inter = profile.topology, profile.inter
    if level == "whole":
        return Costs(shape, inter, profile.intra)
    if level == "intra":
        return Costs(Topology.even(1, shape.local_size), inter, profile.intra)
    # all positions of a node share its link
    shared = dataclasses.replace(inter, bytes_per_s=inter.bytes_per_s / shape.local_size)
    return Costs(Topology.flat(shape.n_nodes), shared, profile.intra)


def _draw(axes: Axes, points: list[Point], costs: Costs, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    sizes = sorted({point.n_bytes for point in points})
    dense = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 100) for i in range(101)]
    for algorithm in dict.fromkeys(point.algorithm for point in points):
        found, colour = [point for point in points if point.algorithm == algorithm], COLOURS[algorithm]
        modelled = [1e3 * costs.seconds(algorithm, round(n / 8) * 8) for n in dense]
        axes.plot(dense, modelled, color=colour, linewidth=1.4, label=f"{algorithm}, model")
        measured = [1e3 * point.seconds for point in found]
        axes.plot(
            [point.n_bytes for point in found], measured, color=colour, linestyle="none", marker="o", markersize=5
        )
    axes.plot([], [], color="#555555", linestyle="none", marker="o", markersize=5, label="measured (medians)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary(round(value))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=35, labelsize=8)
    axes.set_xlabel("packed message (one bit per parameter)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
