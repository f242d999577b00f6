"""The command line of the convergence study."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from itertools import islice, product
from multiprocessing import get_context
from pathlib import Path

import torch
from reporting.records import RESULTS, ROOT, Journal, Record, RecordsError, read_records, run_record

from study.report import cells_of, loss_table, precision_table, write_report
from study.tasks import SHARDS, TASKS
from study.training import METHODS, PRECISIONS, REFERENCE, Config, config_of, run

WORKERS, SEEDS = (4, 16), 32
QUICK = (REFERENCE, "SignVote", "BySize", "SignMean", "TernaryVote", "2-bit l1", "SignVote + staggered 16 int8")
PRECISION_STEPS, PRECISION_LR = 400, 3e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    part = "-quick" if options.quick else "-precision" if options.precision else ""
    options.out = options.out or ROOT / "runs" / f"study{part}.jsonl"
    try:
        if not options.report:
            carry_out(wanted(options.quick, options.precision), options)
        records = read_records(options.out)
        if options.quick:
            print(loss_table(records[1:], cells_of(records[1:])))
        elif options.precision:
            print(precision_table(records[1:]))
        else:
            write_report(records, RESULTS)
        return 0
    except (OSError, ValueError, ImportError) as error:
        print(f"study: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("study: interrupted; finished runs are kept, the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="study", description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="one table on stdout, in minutes")
    add("--precision", action="store_true", help="the table of docs/low-precision.md on stdout, in half an hour")
    add("--hours", type=float, default=float("inf"), help="begin no run later; default: no limit")
    add("--jobs", type=int, default=2, help="runs side by side, one core each; default: 2")
    add("--out", type=Path, help="file of finished runs; default: runs/study.jsonl")
    add("--keep-old", action="store_true", help="add to runs of another commit")
    add("--report", action="store_true", help="run nothing, write the report of the runs that are there")
    return parser


def wanted(quick: bool, precision: bool = False) -> Iterator[Config]:
    """Yield all runs, seed by seed, so that a study that is cut off has as many of each."""
    if precision:
        yield from (Config("text", "iid", 2, 8, name, seed, PRECISION_LR) for seed in range(2) for name in PRECISIONS)
        return
    cells = product(*(("digits",), SHARDS[:1], WORKERS[:1], QUICK) if quick else (TASKS, SHARDS, WORKERS, METHODS))
    yield from (config_of(*cell, seed) for seed, cell in product(range(3 if quick else SEEDS), tuple(cells)))


def carry_out(configs: Iterable[Config], options: argparse.Namespace) -> None:
    """Do the runs that the file lacks, and add each as it ends.

    Raises RecordsError where the file has runs of another commit, ValueError for impossible options.
    """
    if options.jobs < 1 or not options.hours > 0:
        raise ValueError(f"expected --jobs of at least 1 and --hours above 0, got {options.jobs}, {options.hours:g}")
    path = options.out
    done: set[Config] = set()
    header = run_record()
    if path.exists():
        first, *records = read_records(path)
        if first["commit"] != header["commit"] and not options.keep_old:
            raise RecordsError(f"{path}: has runs of commit {first['commit'][:12]}; --keep-old adds to them")
        done = {Config(**{name: record[name] for name in Config.__dataclass_fields__}) for record in records}
    with Journal(path, append=path.exists()) as journal:
        if not done and path.stat().st_size == 0:
            journal.write(header)
        left = [config for config in configs if config not in done]
        function = partial(run, steps=PRECISION_STEPS) if options.precision else run
        for number, record in enumerate(_records(left, options, function), len(done) + 1):
            journal.write(record)
            words = f"{record['task']}, {record['method']}: {record['loss']:.4f}"
            print(f"{number}/{len(done) + len(left)} {words}", flush=True)


def _records(
    configs: Sequence[Config], options: argparse.Namespace, function: Callable[[Config], Record] = run
) -> Iterator[Record]:
    """Yield results as they come, of as many processes as jobs; none is begun after the deadline."""
    deadline = time.monotonic() + 3600 * options.hours
    left = iter(configs)
    context, one_thread = get_context("spawn"), (1,)
    with ProcessPoolExecutor(options.jobs, context, torch.set_num_threads, one_thread) as pool:
        pending: set[Future[Record]] = {pool.submit(function, config) for config in islice(left, options.jobs)}
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                if time.monotonic() < deadline:
                    pending |= {pool.submit(function, config) for config in islice(left, 1)}
                yield future.result()
