"""``python bench/speed run | save | compare | report``: what `make bench`, `bench-save` and `bench-compare` run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.records import RESULTS, ROOT, Record, RecordsError, read_records, write_records

from speed.compare import TOLERANCE, changes_of, describe, run_both

RUN, STORE = ROOT / "runs" / "bench.jsonl", ROOT / "runs" / "bench"
# `make bench` writes this file, so the one that was committed is what a new run is compared with
COMMITTED = "HEAD:docs/results/speed.jsonl"
SAME, SLOWER, WRONG_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 where something got slower, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (RecordsError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return WRONG_INPUT


def run(options: argparse.Namespace) -> int:
    """Time everything, or what is named."""
    from speed.runner import run as run_all

    run_all(options.run, options.only)
    return SAME


def report(options: argparse.Namespace) -> int:
    """Write table and picture of docs/results.md, and the records beside them."""
    from speed.report import write_report

    write_report(read_records(options.run), options.out)
    return SAME


def save(options: argparse.Namespace) -> int:
    """Store the latest run under a name, unless there is one."""
    records = read_records(options.run)
    name = options.name or records[0]["commit"][:12] or "unnamed"
    path = _stored(name, options.store)
    if path.exists() and not options.overwrite:
        raise RecordsError(f"{path}: there is one already; choose another NAME, or pass --overwrite")
    write_records(path, records)
    print(f"{path}: {len(records) - 1} benchmarks")
    return SAME


def compare(options: argparse.Namespace) -> int:
    """Print what changed from one run to the other."""
    if not 0 < options.tolerance < float("inf"):
        raise ValueError(f"tolerance: expected a number > 0, got {options.tolerance}")
    if Path(options.old).is_dir():
        old, new = run_both(Path(options.old).resolve(), options.only, options.rounds)
    else:
        old = _read(options.old, options.store)
        new = read_records(options.run) if options.new is None else _read(options.new, options.store)
    changes = changes_of(old, new, everything=options.everything)
    print(describe(old, new, changes, options.tolerance))
    return SLOWER if any(change.verdict(options.tolerance) == "slower" for change in changes) else SAME


def _read(name: str, store: Path) -> list[Record]:
    return read_records(name if ":" in name else _stored(name, store))


def _stored(name: str, store: Path) -> Path:
    """Return a file by its path, or by the name that it was saved under."""
    if name.endswith(".jsonl"):
        return Path(name)
    if not name or "/" in name or name.startswith("."):
        raise RecordsError(f"NAME: expected a file's name, a path ending in .jsonl or a checkout, got {name!r}")
    return store / f"{name}.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python bench/speed", description=__doc__)
    parser.add_argument("--run", type=Path, default=RUN, help="file of the latest run (default: %(default)s)")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of saved runs (default: %(default)s)")
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("run", help="time everything")
    one.add_argument("--only", nargs="+", default=[], metavar="WORD", help="whose names have all these words")
    one.set_defaults(command=run)

    one = commands.add_parser("report", help="write table, picture and records of docs/results.md")
    one.add_argument("--out", type=Path, default=RESULTS, help="folder of picture and records (default: %(default)s)")
    one.set_defaults(command=report)

    one = commands.add_parser("save", help="store the ratios of the latest run")
    one.add_argument("name", nargs="?", default="", help="default: the commit that was measured")
    one.add_argument("--overwrite", action="store_true")
    one.set_defaults(command=save)

    one = commands.add_parser("compare", help="exit with 1 where something takes longer, in streams, than it did")
    add = one.add_argument
    add("--old", default=COMMITTED, help="name or path of a saved run, COMMIT:PATH, or a checkout, which is then timed")
    add("--new", help="another; unless given, the latest run")
    add("--only", nargs="+", default=[], metavar="WORD", help="with a checkout: what is timed")
    add("--rounds", type=int, default=2, help="with a checkout: runs of each, by turns (default: %(default)s)")
    add("--tolerance", type=float, default=TOLERANCE, help="0.5: half as long again (default: %(default)s)")
    add("--everything", action="store_true", help="the reference and the peers too")
    one.set_defaults(command=compare)
    return parser
