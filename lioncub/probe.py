"""Measurement behind ``lioncub probe``: starting the workers, each worker's part, the table and plot of a profile.

Workers are processes of torchrun's launcher that run the same command; under torchrun the command is such a worker.
Progress, table and plot need the extra ``cli``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lioncub.collectives.cost import Costs
from lioncub.collectives.groups import ProcessGroups, Topology
from lioncub.collectives.probe import Point, Profile, probe

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
REPORT_SECONDS = 0.1
# a worker that lost its connection waits this long before it fails, so that the launcher sees the cause first
SETTLE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Settings of one measurement; times in seconds.

    Raises:
        ValueError: a value is out of range; the message names the flag, what was expected and what came.
    """

    workers: int = 4
    out: str = "profile.json"
    plot: str | None = None
    budget: float = 15.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check every field; the first bad one raises."""
        if self.workers < 2:
            raise ValueError(f"--workers: expected an integer >= 2, got {self.workers}")
        for name in ("budget", "timeout"):
            # written so that nan fails too
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--{name}: expected a finite number of seconds > 0, got {getattr(self, name)}")


class WorkerFailedError(RuntimeError):
    """A worker ended early; the text says which one and why, ``traceback`` is for a bug report."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


def launch(config: ProbeConfig) -> None:
    """Run the command as a worker in ``config.workers`` local processes, and wait for them.

    No worker is left, also after KeyboardInterrupt and torch's SignalException.

    Raises:
        WorkerFailedError: a worker failed.
    """
    if sys.platform == "linux":
        # all workers are on this machine; a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options = {"--out": config.out, "--plot": config.plot, "--budget": config.budget, "--timeout": config.timeout}
    flags = [str(part) for flag, value in options.items() if value is not None for part in (flag, value)]
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        # not SIGINT, which the launcher would pass on: workers end silently by SIGTERM alone
        signals_to_handle="SIGTERM,SIGHUP",
    )
    # the one message about an early end is the caller's
    logging.disable(logging.CRITICAL)
    try:
        elastic_launch(launcher, sys.executable)("-P", "-m", "lioncub", "probe", *flags, "--overwrite")
    except ChildFailedError as error:
        raise _cause(error.failures) from error
    finally:
        logging.disable(logging.NOTSET)


def _cause(failures: dict[int, ProcessFailure]) -> WorkerFailedError:
    """Find the earliest failure: later ones are consequences."""
    # SIGTERM, and SIGKILL where it does not help, is how the launcher ends the others; times are whole seconds
    own = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM}
    rank, first = min((own or failures).items(), key=lambda item: (item[1].timestamp, item[1].exitcode > 0))
    if first.exitcode < 0:
        hint = " (out of memory?)" if first.exitcode == -signal.SIGKILL else ""
        return WorkerFailedError(f"worker {rank} (process {first.pid}) was killed by {first.signal_name()}{hint}")
    # a text where the worker left no message
    message: Any = first.message
    if isinstance(message, str):
        return WorkerFailedError(f"worker {rank} ended with exit code {first.exitcode} and no message")
    text = message["message"]
    # such an error is about an argument, not about a worker
    if text.startswith("ValueError: "):
        return WorkerFailedError(text.removeprefix("ValueError: "))
    return WorkerFailedError(f"worker {rank} failed: {text}", message["extraInfo"]["py_callstack"])


def work(config: ProbeConfig) -> None:
    """Do the part of the worker that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name, as torchrun sets them.

    The first rank prints the table and writes the files. Where anything fails, the process ends with exit code 1, and
    the launcher reports the error.
    """
    try:
        _measure(config)
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            print(f"lioncub probe: worker {os.environ['RANK']} failed: {error}", file=sys.stderr, flush=True)
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(1)


@record
def _measure(config: ProbeConfig) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.timeout))
        leads = dist.get_rank() == 0
        with _shown_progress(config) if leads else contextlib.nullcontext(_ignored) as on_progress:
            profile = probe(ProcessGroups.find(), seconds=config.budget, on_progress=on_progress)
        dist.destroy_process_group()
    except RuntimeError:
        time.sleep(SETTLE_SECONDS)
        raise
    if leads:
        _write(profile, config)
        print_report(profile)
        print(f"written: {', '.join(filter(None, (config.out, config.plot)))}")


def _ignored(fraction: float, what: str) -> None:
    pass


def _write(profile: Profile, config: ProbeConfig) -> None:
    try:
        Path(config.out).write_text(profile.to_json(), encoding="utf-8")
        if config.plot is not None:
            write_plot(profile, Path(config.plot))
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _shown_progress(config: ProbeConfig) -> Iterator[Callable[[float, str], None]]:
    """Show a live bar on a terminal, one line elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        console.print(f"measuring {config.workers} workers for about {config.budget:g} s", highlight=False)
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
