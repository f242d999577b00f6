"""The command line of the report."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

from gpu_report.compiling import TARGETS, compile_variant
from gpu_report.findings import Finding, finding_of
from gpu_report.trials import TARGETS as TRIED_TARGETS
from gpu_report.trials import trials_of
from gpu_report.variants import DTYPES, Variant, all_variants

ROOT = Path(__file__).parents[2]
# label, dtype, target, and the number of the tile shape; None for the one that is launched
Job = tuple[str, str, str, int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    options = _parser().parse_args(arguments)
    variants = [variant for variant in all_variants() if variant.dtype in options.dtypes]
    if options.labels:
        unknown = set(options.labels) - {variant.label for variant in variants}
        if unknown:
            print(f"gpu_report: --labels: expected names of kernels, got {sorted(unknown)}", file=sys.stderr)
            return 1
        variants = [variant for variant in variants if variant.label in options.labels]
    jobs = [(v.label, v.dtype, target, None) for v in variants for target in options.targets]
    if options.json:
        json.dump([asdict(finding) for finding in _measured(jobs, options.jobs)], sys.stdout)
        return 0
    from gpu_report.report import write_report

    trials = _trial_jobs(variants, [target for target in TRIED_TARGETS if target in options.targets])
    findings = list(_shown(jobs + trials, options.jobs))
    write_report(findings[: len(jobs)], findings[len(jobs) :], options.out)
    print(f"\rwritten: {options.out / 'gpu.md'}\033[K")
    return 0


def measure(job: Job) -> Finding:
    """Compile one variant and read its code."""
    label, dtype, target, shape = job
    variant = next(v for v in all_variants() if (v.label, v.dtype) == (label, dtype))
    if shape is not None:
        variant = trials_of(variant)[shape]
    return finding_of(variant, TARGETS[target], compile_variant(variant, TARGETS[target]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_report", description="What the Triton kernels compile to.")
    add, dtypes = parser.add_argument, [*DTYPES, "codes"]
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=f"of {', '.join(TARGETS)}")
    add("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="NAME", help=f"of {', '.join(dtypes)}")
    add("--labels", nargs="+", metavar="LABEL", help="kernels, as the report names them; default: all")
    add("--jobs", type=int, default=1, help="processes that compile; default: 1")
    add("--json", action="store_true", help="print the findings instead of writing the report")
    add("--out", type=Path, default=ROOT / "docs", help="folder of the report; default: docs")
    return parser


def _trial_jobs(variants: Sequence[Variant], targets: Sequence[str]) -> list[Job]:
    return [
        (variant.label, variant.dtype, target, shape)
        for variant in variants
        for shape in range(len(trials_of(variant)))
        for target in targets
    ]


def _shown(jobs: Sequence[Job], processes: int) -> Iterator[Finding]:
    """As `_measured`, with a line that says how far it is."""
    for number, finding in enumerate(_measured(jobs, processes), start=1):
        print(f"\r{number}/{len(jobs)} {finding.label}, {finding.dtype}, {finding.target}\033[K", end="", flush=True)
        yield finding


def _measured(jobs: Sequence[Job], processes: int) -> Iterator[Finding]:
    if processes == 1:
        yield from map(measure, jobs)
        return
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(measure, jobs)
