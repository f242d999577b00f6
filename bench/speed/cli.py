"""``python bench/speed report | save | compare``: what `make bench`, `bench-save` and `bench-compare` run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from speed.compare import TOLERANCE, compare, describe
from speed.results import Results, ResultsError, read_committed, read_results, read_run, write_results

RUN, STORE = Path("runs/bench.json"), Path("runs/bench")
# `make bench` writes this file, so the one that was committed is what a new run is compared with
COMMITTED = "HEAD:docs/benchmarks.json"
SAME, SLOWER, WRONG_INPUT = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 1 where something got slower, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ResultsError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return WRONG_INPUT


def report(options: argparse.Namespace) -> int:
    """Write the tables and the stored results beside them."""
    from speed.report import markdown

    results = read_run(options.run)
    options.document.write_text(markdown(results))
    write_results(results, options.document.with_suffix(".json"))
    print(f"{options.document}: {len(results.by_name)} benchmarks")
    return SAME


def save(options: argparse.Namespace) -> int:
    """Store the latest run under a name, unless there is one."""
    results = read_run(options.run)
    name = options.name or (results.commit[:12] + ("-dirty" if results.is_dirty else "")) or "unnamed"
    path = _stored(name, options.store)
    if path.exists() and not options.overwrite:
        raise ResultsError(f"{path}: there is one already; choose another NAME, or pass --overwrite")
    write_results(results, path)
    print(f"{path}: {len(results.by_name)} benchmarks of {results.title}")
    return SAME


def compare_runs(options: argparse.Namespace) -> int:
    """Print what changed from one run to the other."""
    old = _read(options.old, options.store)
    new = read_run(options.run) if options.new is None else _read(options.new, options.store)
    comparison = compare(old, new, options.tolerance, everything=options.everything)
    print(describe(comparison))
    return SLOWER if comparison.slower else SAME


def _read(name: str, store: Path) -> Results:
    return read_committed(name) if ":" in name else read_results(_stored(name, store))


def _stored(name: str, store: Path) -> Path:
    """A file by its path, or by the name that it was saved under."""
    if name.endswith(".json"):
        return Path(name)
    if not name or "/" in name or name.startswith("."):
        raise ResultsError(f"NAME: expected a file's name, without folders, or a path ending in .json, got {name!r}")
    return store / f"{name}.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python bench/speed", description=__doc__)
    parser.add_argument("--run", type=Path, default=RUN, help="what `make bench` measured last (default: %(default)s)")
    parser.add_argument("--store", type=Path, default=STORE, help="folder of saved runs (default: %(default)s)")
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("report", help="write Markdown tables, and the ratios as JSON beside them")
    one.add_argument("document", type=Path, help="Markdown file to write")
    one.set_defaults(command=report)

    one = commands.add_parser("save", help="store the ratios of the latest run")
    one.add_argument("name", nargs="?", default="", help="default: the commit that was measured")
    one.add_argument("--overwrite", action="store_true")
    one.set_defaults(command=save)

    one = commands.add_parser("compare", help="exit with 1 where something takes longer, in streams, than it did")
    one.add_argument(
        "--old", default=COMMITTED, help="name or path of saved results, or COMMIT:PATH (default: %(default)s)"
    )
    one.add_argument("--new", help="another; unless given, the latest run")
    one.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="0.5: half as long again (default: %(default)s)"
    )
    one.add_argument("--everything", action="store_true", help="the reference and the peers too")
    one.set_defaults(command=compare_runs)
    return parser
