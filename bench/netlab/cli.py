"""``python bench/netlab cells | matrix | shards``: `make netlab` and `make netlab-shards` run the last two; as root."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.records import RESULTS, ROOT, Journal, read_records, run_record

from netlab.cells import METHODS, Session, Turns, run_session
from netlab.lab import LabError, handling_signals, parse_rate, require_abilities
from netlab.report import write_report, write_shards_report
from netlab.worker import ALGORITHMS, OTHERS, SHARDED, serve

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
    commands = parser.add_subparsers(required=True, metavar="cells | matrix | shards")
    cells = commands.add_parser("cells", help="measure chosen methods at chosen rates, also against another checkout")
    add = cells.add_argument
    names = "[fsdp_]lioncub[_ALGORITHM][_overlap][_signs][:BUCKET_MB] or a peer; default: four"
    add("--rates", nargs="+", metavar="RATE", default=RATES[:2], help="default: 100mbit 1gbit")
    add("--methods", nargs="+", metavar="NAME", default=METHODS, help=names)
    add("--old", type=Path, metavar="CHECKOUT", help="measure its library too, turn by turn; print ratios")
    add("--workers", type=int, default=4, help="default: 4")
    add("--per-host", type=int, default=1, help="workers on each host; default: 1")
    add("--model", default="10M", help="10M or 25M parameters; default: 10M")
    matrix = commands.add_parser("matrix", help="measure all methods at all rates and write docs/results.md; an hour")
    shards = commands.add_parser("shards", help="compare FSDP2 with votes between 2 hosts of 2 workers with HSDP")
    for command in (matrix, shards):
        command.add_argument("--report", action="store_true", help="measure nothing, write the report of the last run")
    kinds = (("cells", cells, _run_cells), ("matrix", matrix, _run_matrix), ("shards", shards, _run_shards))
    for name, command, run in kinds:
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


def _journal(options: argparse.Namespace) -> Journal:
    """Begin the file of a run, where the lab can be built."""
    require_abilities()
    journal = Journal(options.out)
    journal.write(run_record())
    return journal


def _run_cells(options: argparse.Namespace) -> None:
    session, turns = Session(options.workers, options.model, options.per_host), _turns(options)
    rates = [parse_rate(rate) for rate in options.rates]
    with _journal(options) as journal:
        run_session(session, rates, options.methods, turns, journal, options.old)


def _run_matrix(options: argparse.Namespace) -> None:
    turns, rates = _turns(options), [parse_rate(rate) for rate in RATES]
    flat = [f"lioncub_{name}{end}" for end in ("", "_overlap") for name in ALGORITHMS[1:-1]]
    methods = [*OTHERS, *flat, "lioncub", "lioncub_overlap"]
    if not options.report:
        with _journal(options) as journal:
            for workers in (4, 2, 8):
                for model in ("10M", "25M"):
                    run_session(Session(workers, model), rates, methods, turns, journal, None)
            two_level = ["ddp_fp32", *(f"lioncub_{name}" for name in ALGORITHMS[1:])]
            run_session(Session(8, "10M", 4), rates[:2], two_level, turns, journal, None)
    write_report(read_records(options.out), RESULTS)


def _run_shards(options: argparse.Namespace) -> None:
    turns, rates = _turns(options), [parse_rate(rate) for rate in RATES[:2]]
    if not options.report:
        with _journal(options) as journal:
            for model in ("10M", "25M"):
                methods = [*SHARDED, "fsdp_lioncub", "fsdp_lioncub_overlap"]
                run_session(Session(4, model, 2), rates, methods, turns, journal, None)
    write_shards_report(read_records(options.out), RESULTS)
