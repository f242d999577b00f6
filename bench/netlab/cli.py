"""The command line of the network lab."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netlab.interrupts import Interrupted, interruptible
from netlab.lab import Lab, LabError, remove_stale, require_abilities
from netlab.rates import parse_rate
from netlab.records import merged, read_journal

if TYPE_CHECKING:
    from netlab.matrix import Choice

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with interruptible():
            code: int = options.run(options)
            return code
    except (LabError, FileNotFoundError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(f"netlab: {interruption}", file=sys.stderr)
        return 128 + interruption.number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="netlab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    lab = commands.add_parser("lab", help="build a lab, run a command once per worker in it, remove it")
    lab.add_argument("--hosts", type=int, default=4, help="default: 4")
    lab.add_argument("--per-host", type=int, default=1, help="workers on each host; default: 1")
    lab.add_argument("--rate", default="1gbit", help="of every link, in both directions; default: 1gbit")
    lab.add_argument("command", nargs="+", help="what to run, after --; it finds RANK, WORLD_SIZE, ... set")
    lab.set_defaults(run=_run_lab)
    _add_matrix(commands)
    _add_cells(commands)
    for name, serve in (("worker", _run_worker), ("cell-worker", _run_cell_worker)):
        worker = commands.add_parser(name, help=argparse.SUPPRESS)
        worker.add_argument("channel", type=int)
        worker.add_argument("model")
        worker.set_defaults(run=serve)
    clean = commands.add_parser("clean", help="remove what killed labs have left; others do it before they start")
    clean.set_defaults(run=_run_clean)
    return parser


def _add_matrix(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    matrix = commands.add_parser("matrix", help="measure all methods at all rates and write docs/netlab.*")
    add = matrix.add_argument
    add("--rates", nargs="+", metavar="RATE", help="such as 100mbit; default: 100mbit 1gbit 10gbit")
    add("--workers", nargs="+", type=int, metavar="N", help="default: 4 2 8")
    add("--models", nargs="+", metavar="NAME", help="default: 10M 25M")
    add("--methods", nargs="+", metavar="NAME", help="default: all; a name that does not exist lists them")
    add("--repetitions", type=int, help="default: 5 with 4 workers, else 2")
    add("--two-level", action=argparse.BooleanOptionalAction, default=None, help="default: unless a part is chosen")
    add("--quick", action="store_true", help="2 workers, 10M, 1gbit, 2 repetitions, unless said otherwise")
    add("--runs", type=Path, default=ROOT / "runs" / "netlab", help="folder of the findings; default: runs/netlab")
    add("--out", type=Path, default=ROOT / "docs", help="folder of the report; default: docs")
    add("--earlier", nargs="+", type=Path, default=[], metavar="FOLDER", help="runs whose other cells the report keeps")
    add("--report", action="store_true", help="measure nothing, write the report from the findings so far")
    matrix.set_defaults(run=_run_matrix)


def _add_cells(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    cells = commands.add_parser("cells", help="measure chosen methods at chosen rates, also against another checkout")
    add = cells.add_argument
    add("--rates", nargs="+", metavar="RATE", default=["100mbit", "1gbit"], help="default: 100mbit 1gbit")
    add(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="lioncub[_ALGORITHM][_overlap][:BUCKET_MB] or a peer; default: four",
    )
    add("--old", type=Path, metavar="CHECKOUT", help="measure its library too, turn by turn; print ratios")
    add("--workers", type=int, default=4, help="default: 4")
    add("--model", default="10M", help="10M or 25M parameters; default: 10M")
    add("--steps", type=int, default=10, help="timed steps of a turn; default: 10")
    add("--turn-seconds", type=float, default=6.0, help="take fewer steps where they last longer; default: 6")
    add("--untimed", type=int, default=3, help="steps before them; default: 3")
    add("--repetitions", type=int, default=3, help="turns of each method and rate; default: 3")
    add("--out", type=Path, default=ROOT / "runs" / "netlab" / "cells.jsonl", help="default: runs/netlab/cells.jsonl")
    cells.set_defaults(run=_run_cells)


def choice_of(options: argparse.Namespace) -> Choice:
    """The part of the matrix that the flags choose. Raises ValueError for what does not exist."""
    from netlab.matrix import Choice

    flags = {name: getattr(options, name) for name in ("workers", "models", "methods")}
    chosen: dict[str, Any] = {name: tuple(values) for name, values in flags.items() if values}
    if options.rates:
        chosen["rates"] = chosen["two_level_rates"] = tuple(parse_rate(rate) for rate in options.rates)
    two_level = not (options.quick or chosen)
    if options.quick:
        chosen = {"workers": (2,), "models": ("10M",), "rates": (10**9,), "two_level_rates": (10**9,), **chosen}
        chosen["repetitions"] = 2
    if options.repetitions is not None:
        chosen["repetitions"] = options.repetitions
    return Choice(**chosen, two_level=two_level if options.two_level is None else options.two_level)


def _run_matrix(options: argparse.Namespace) -> int:
    # torch and matplotlib are imported here, since the other commands do without them
    from netlab.crew import WorkerFailedError
    from netlab.matrix import total_seconds
    from netlab.progress import clock_text, shown_progress
    from netlab.report import write_report
    from netlab.run import JOURNAL_NAME, run_matrix

    # read first, since what is measured may replace one of them
    earlier = [read_journal(folder / JOURNAL_NAME) for folder in options.earlier]
    if not options.report:
        choice = choice_of(options)
        require_abilities("iperf3")
        print(f"about {clock_text(total_seconds(choice))} minutes; findings so far: {options.runs / JOURNAL_NAME}")
        try:
            with shown_progress(total_seconds(choice)) as on_progress:
                run_matrix(choice, options.runs, on_progress)
        except WorkerFailedError as error:
            raise LabError(str(error)) from error
    options.out.mkdir(parents=True, exist_ok=True)
    targets = write_report(merged([*earlier, read_journal(options.runs / JOURNAL_NAME)]), options.out)
    for target in targets:
        limit = f"{'<=' if target.at_most else '>='} {target.limit:g}"
        print(f"{'met   ' if target.met else 'MISSED'}  {target.got:8.3g} ({limit})  {target.name}")
    print(f"written: {options.out / 'netlab.md'}")
    return 0


def _run_lab(options: argparse.Namespace) -> int:
    with Lab(options.hosts, parse_rate(options.rate), options.per_host) as lab:
        return wait_for_all([lab.start_worker(rank, options.command) for rank in range(lab.workers)])


def _run_cells(options: argparse.Namespace) -> int:
    from netlab.cells import METHODS, run_cells
    from netlab.crew import WorkerFailedError

    try:
        run_cells(
            [parse_rate(rate) for rate in options.rates],
            options.methods or METHODS,
            workers=options.workers,
            model=options.model,
            old=options.old,
            repetitions=options.repetitions,
            untimed=options.untimed,
            steps=options.steps,
            turn_seconds=options.turn_seconds,
            out=options.out,
        )
    except WorkerFailedError as error:
        raise LabError(f"{error}\n{error.traceback or ''}") from error
    return 0


def _run_cell_worker(options: argparse.Namespace) -> int:
    from netlab.cell_worker import serve

    serve(options.channel, options.model)
    return 0


def _run_worker(options: argparse.Namespace) -> int:
    from netlab import worker

    worker.main(options.channel, options.model)
    return 0


def _run_clean(options: argparse.Namespace) -> int:
    require_abilities()
    print("removed:", ", ".join(remove_stale()) or "nothing")
    return 0


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """0 when all have ended well; else the exit code of the first that did not, as soon as it has ended."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                print(f"netlab: worker {rank} ended with exit code {code}", file=sys.stderr)
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
