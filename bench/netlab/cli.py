"""``python bench/netlab cells | matrix``: `make netlab` runs the second; as root."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.records import RESULTS, ROOT, Journal, read_records, run_record

from netlab.cells import METHODS, Session, Turns, run_session
from netlab.lab import LabError, handling_signals, parse_rate, require_abilities
from netlab.report import write_report
from netlab.worker import ALGORITHMS, OTHERS, serve

RUNS = ROOT / "runs" / "netlab"
RATES = ("100mbit", "1gbit", "10gbit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with handling_signals(signal.default_int_handler):
            options.run(options)
    except (LabError, FileNotFoundError, ValueError) as error:
        print(f"netlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("netlab: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="netlab", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="cells | matrix")
    cells = commands.add_parser("cells", help="measure chosen methods at chosen rates, also against another checkout")
    add = cells.add_argument
    names = "lioncub[_ALGORITHM][_overlap][_signs][:BUCKET_MB] or a peer; default: four"
    add("--rates", nargs="+", metavar="RATE", default=RATES[:2], help="default: 100mbit 1gbit")
    add("--methods", nargs="+", metavar="NAME", default=METHODS, help=names)
    add("--old", type=Path, metavar="CHECKOUT", help="measure its library too, turn by turn; print ratios")
    add("--workers", type=int, default=4, help="default: 4")
    add("--per-host", type=int, default=1, help="workers on each host; default: 1")
    add("--model", default="10M", help="10M or 25M parameters; default: 10M")
    matrix = commands.add_parser("matrix", help="measure all methods at all rates and write docs/results.md; an hour")
    matrix.add_argument("--report", action="store_true", help="measure nothing, write the report of the last run")
    for name, command, run in (("cells", cells, _run_cells), ("matrix", matrix, _run_matrix)):
        command.set_defaults(run=run)
        add = command.add_argument
        add("--out", type=Path, default=RUNS / f"{name}.jsonl", help=f"default: runs/netlab/{name}.jsonl")
        add("--steps", type=int, default=10, help="timed steps of a turn; default: 10")
        add("--turn-seconds", type=float, default=6.0, help="take fewer steps where they last longer; default: 6")
        add("--untimed", type=int, default=3, help="steps before them; default: 3")
        add("--repetitions", type=int, default=3, help="turns of each method and rate; default: 3")
    worker = commands.add_parser("worker", help=argparse.SUPPRESS)
    for argument, kind in (("channel", int), ("model", str), ("device", str)):
        worker.add_argument(argument, type=kind)
    worker.set_defaults(run=lambda options: serve(options.channel, options.model, options.device))
    return parser


def _turns(options: argparse.Namespace) -> Turns:
    return Turns(options.repetitions, options.untimed, options.steps, options.turn_seconds)


def _run_cells(options: argparse.Namespace) -> None:
    session, turns = Session(options.workers, options.model, options.per_host), _turns(options)
    rates = [parse_rate(rate) for rate in options.rates]
    require_abilities()
    with Journal(options.out) as journal:
        journal.write(run_record())
        run_session(session, rates, options.methods, turns, journal, options.old)


def _run_matrix(options: argparse.Namespace) -> None:
    turns, rates = _turns(options), [parse_rate(rate) for rate in RATES]
    flat = [f"lioncub_{name}{end}" for end in ("", "_overlap") for name in ALGORITHMS[1:-1]]
    methods = [*OTHERS, *flat, "lioncub", "lioncub_overlap"]
    if not options.report:
        require_abilities()
        with Journal(options.out) as journal:
            journal.write(run_record())
            for workers in (4, 2, 8):
                for model in ("10M", "25M"):
                    run_session(Session(workers, model), rates, methods, turns, journal, None)
            two_level = ["ddp_fp32", *(f"lioncub_{name}" for name in ALGORITHMS[1:])]
            run_session(Session(8, "10M", 4), rates[:2], two_level, turns, journal, None)
    write_report(read_records(options.out), RESULTS)
