"""The command line of the convergence study."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from netlab.lab import Interrupted, interruptible

if TYPE_CHECKING:
    from convergence.stages import Stage
    from convergence.store import Store

ROOT = Path(__file__).parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with interruptible():
            code: int = options.run(options)
            return code
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        print(f"convergence: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(f"convergence: {interruption}; finished runs are kept, the same command goes on", file=sys.stderr)
        return 128 + interruption.number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="convergence", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="do all runs that are missing, and write the report")
    _add_common(run)
    run.add_argument("--stage", nargs="+", metavar="NAME", help="only these; a name that does not exist lists them")
    run.add_argument("--quick", action="store_true", help="one table in minutes; in folders of its own unless given")
    run.add_argument("--hours", type=float, help="begin no run that would end later; default: no limit")
    run.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each; default: 2")
    run.add_argument("--plan", action="store_true", help="run nothing, print how many runs each stage has")
    run.set_defaults(run=_run)
    report = commands.add_parser("report", help="write the report of the runs that are there")
    _add_common(report)
    report.set_defaults(run=_report, quick=False)
    restored = commands.add_parser("restore", help="bring back the runs behind a report, for --keep-old to count")
    _add_folders(restored)
    restored.set_defaults(run=_restore)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    _add_folders(command)
    command.add_argument("--keep-old", action="store_true", help="count runs of other code too; the report says so")


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("--runs", type=Path, help="folder of finished runs; default: runs/study")
    command.add_argument("--out", type=Path, help="folder of the report; default: docs")


def _store(options: argparse.Namespace) -> Store:
    from convergence.store import Store, code_digest

    folder = options.runs or ROOT / "runs" / ("study-quick" if options.quick else "study")
    store = Store(folder, code_digest(), options.keep_old)
    others = sum(count for digest, count in store.digests().items() if digest != store.digest)
    if others:
        treated = "count as well" if options.keep_old else "do not count; --keep-old would keep them"
        print(f"{others} runs in {folder} are of other code: they {treated}", file=sys.stderr)
    return store


def _stages(options: argparse.Namespace) -> dict[str, Stage]:
    from convergence.stages import STAGES, quick

    if options.quick and options.stage:
        raise ValueError(f"--stage: expected none with --quick, which has its own, got {', '.join(options.stage)}")
    if options.quick:
        return {"quick": quick}
    unknown = sorted(set(options.stage or ()) - set(STAGES))
    if unknown:
        raise ValueError(f"--stage: expected some of {', '.join(STAGES)}, got {', '.join(unknown)}")
    return {name: stage for name, stage in STAGES.items() if name in (options.stage or STAGES)}


def _run(options: argparse.Namespace) -> int:
    from convergence.runner import carry_out, plan

    if options.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {options.jobs}")
    if options.hours is not None and options.hours <= 0:
        raise ValueError(f"--hours: expected more than 0, got {options.hours:g}")
    stages, store = _stages(options), _store(options)
    rows = plan(stages, store, options.jobs)
    for name, at_most, left, hours in rows:
        print(f"{name:14} at most {at_most:5} runs, {left:5} missing, {60 * hours:6.0f} minutes")
    total = sum(hours for *_, hours in rows)
    print(f"{'in all':14} at most {sum(row[1] for row in rows):5} runs, {60 * total:25.0f} minutes", flush=True)
    if options.plan:
        return 0
    # expected seconds are those of one core
    complete = carry_out(
        list(stages.values()),
        store,
        jobs=options.jobs,
        hours=options.hours,
        on_progress=lambda seconds, what: print(what),
    )
    if not complete:
        print(f"--hours {options.hours:g} are over: the same command goes on", file=sys.stderr)
    return _report(options)


def _report(options: argparse.Namespace) -> int:
    from convergence.report import write_report

    folder = options.out or (ROOT / "runs" / "study-quick" if options.quick else ROOT / "docs")
    store = _store(options)
    print(f"written: {write_report(store, folder, 'study_quick' if options.quick else 'study')}")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from convergence.archive import SUFFIX, restore

    folder = options.runs or ROOT / "runs" / "study"
    written, known = restore((options.out or ROOT / "docs") / f"study{SUFFIX}", folder)
    print(f"{folder}: {written} runs restored, {known} were there")
    return 0
