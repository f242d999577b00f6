"""The command line of the network lab."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from netlab.lab import Interrupted, Lab, LabError, interruptible, parse_rate, remove_stale, require_abilities

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
    add("--per-host", type=int, default=1, help="workers on each host; default: 1")
    add("--model", default="10M", help="10M or 25M parameters; default: 10M")
    add("--out", type=Path, default=ROOT / "runs" / "netlab" / "cells.jsonl", help="default: runs/netlab/cells.jsonl")
    cells.set_defaults(run=_run_cells)

    matrix = commands.add_parser("matrix", help="measure all methods at all rates and write docs/results.md; an hour")
    add = matrix.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "netlab" / "matrix.jsonl", help="default: runs/netlab/matrix.jsonl")
    add("--report", action="store_true", help="measure nothing, write the report from what was measured last")
    matrix.set_defaults(run=_run_matrix)
    for command in (cells, matrix):
        add = command.add_argument
        add("--steps", type=int, default=10, help="timed steps of a turn; default: 10")
        add("--turn-seconds", type=float, default=6.0, help="take fewer steps where they last longer; default: 6")
        add("--untimed", type=int, default=3, help="steps before them; default: 3")
        add("--repetitions", type=int, default=3, help="turns of each method and rate; default: 3")

    worker = commands.add_parser("worker", help=argparse.SUPPRESS)
    worker.add_argument("channel", type=int)
    worker.add_argument("model")
    worker.add_argument("device")
    worker.set_defaults(run=_run_worker)
    clean = commands.add_parser("clean", help="remove what killed labs have left; others do it before they start")
    clean.set_defaults(run=_run_clean)
    return parser


def _run_cells(options: argparse.Namespace) -> int:
    # torch is imported here, since the other commands do without it
    from reporting.records import Journal, run_record

    from netlab.cells import METHODS, Session, Turns, run_session

    session = Session(options.workers, options.model, options.per_host)
    turns = Turns(options.repetitions, options.untimed, options.steps, options.turn_seconds)
    rates = [parse_rate(rate) for rate in options.rates]
    require_abilities()
    with Journal(options.out) as journal:
        journal.write(run_record())
        run_session(session, rates, options.methods or METHODS, turns, journal, options.old)
    return 0


def _run_matrix(options: argparse.Namespace) -> int:
    from reporting.records import RESULTS, Journal, read_records, run_record

    from netlab.cells import Session, Turns, run_session
    from netlab.report import write_report
    from netlab.worker import ALGORITHMS, OTHERS

    turns = Turns(options.repetitions, options.untimed, options.steps, options.turn_seconds)
    rates = [10**8, 10**9, 10**10]
    flat = [f"lioncub_{name}{end}" for end in ("", "_overlap") for name in ALGORITHMS[1:-1]]
    flat += ["lioncub", "lioncub_overlap"]
    if not options.report:
        require_abilities()
        with Journal(options.out) as journal:
            journal.write(run_record())
            for workers in (4, 2, 8):
                for model in ("10M", "25M"):
                    run_session(Session(workers, model), rates, [*OTHERS, *flat], turns, journal, None)
            two_level = ["ddp_fp32", *(f"lioncub_{name}" for name in ALGORITHMS[1:])]
            run_session(Session(8, "10M", 4), rates[:2], two_level, turns, journal, None)
    write_report(read_records(options.out), RESULTS)
    return 0


def _run_lab(options: argparse.Namespace) -> int:
    with Lab(options.hosts, parse_rate(options.rate), options.per_host) as lab:
        return wait_for_all([lab.start_worker(rank, options.command) for rank in range(lab.workers)])


def _run_worker(options: argparse.Namespace) -> int:
    from netlab.worker import serve

    serve(options.channel, options.model, options.device)
    return 0


def _run_clean(options: argparse.Namespace) -> int:
    require_abilities()
    print("removed:", ", ".join(remove_stale()) or "nothing")
    return 0


def wait_for_all(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Return 0 when all have ended well, else the exit code of the first that did not, as soon as it has ended."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                print(f"netlab: worker {rank} ended with exit code {code}", file=sys.stderr)
                return code if code > 0 else 128 - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
