"""The command line: compile all kernels for all GPUs, with the installed version of Triton or with others."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from reporting.pages import PAGE, insert, markdown_table
from reporting.records import RESULTS, Record, read_records, run_record

from gpu_report.compiling import KINDS, REPORTED, TARGETS, kinds_of, launches_of, read_code, widest_share
from gpu_report.report import broken_claims, write_report

# with the torch that pins each
VERSIONS = {"3.6.0": "torch 2.11", "3.7.1": "torch 2.12, 2.13", "3.8.0": "torch 2.14", "3.9.0": ""}
# names of a case, of the kind of its data and of a target
Job = tuple[str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 where a claim is broken."""
    options = _parser().parse_args(arguments)
    if options.versions is not None:
        return compare_versions(options.versions or list(VERSIONS), options.jobs)
    if options.report:
        write_report(read_records(RESULTS / "gpu.jsonl"), RESULTS)
        return 0
    cases = [(name, kind) for name, case in REPORTED.items() for kind in kinds_of(case)]
    chosen = [(name, kind) for name, kind in cases if kind in options.kinds and name in (options.only or REPORTED)]
    jobs = [(name, kind, target) for name, kind in chosen for target in options.targets]
    findings = list(_measured(jobs, options.jobs, shown=not options.json))
    if options.json:
        json.dump(findings, sys.stdout)
        return 0
    broken = broken_claims(findings)
    for claim, kernels in broken.items():
        print(f"{claim}: {len(findings) - len(kernels)} of {len(findings)}")
        print("".join(f"  {kernel}\n" for kernel in kernels), end="")
    if len(jobs) == len(TARGETS) * len(cases):
        write_report([run_record(), *findings], RESULTS)
        print(f"written: {PAGE}")
    return int(any(broken.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__)
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=f"of {', '.join(TARGETS)}")
    add("--only", nargs="+", choices=REPORTED, default=[], metavar="CASE", help="default: all, which writes the report")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="DTYPE", help=f"of {', '.join(KINDS)}")
    add("--jobs", type=int, default=1, help="processes that compile; default: 1")
    add("--json", action="store_true", help="print the findings as JSON, write nothing")
    add("--report", action="store_true", help="compile nothing, write the report from docs/results/gpu.jsonl")
    add("--versions", nargs="*", metavar="VERSION", help="compile with these versions of Triton, each downloaded")
    return parser


def measure(job: Job) -> list[Record]:
    """Compile the kernels of a case and read their code; ``error`` is why one did not compile."""
    name, kind, target = job
    facts: Record = {"kind": "kernel", "label": name, "dtype": kind, "target": target, "error": ""}
    facts |= {"least_loads": 0, "least_stores": 0}
    try:
        launches, reads, writes = launches_of(REPORTED[name], kind, target)
        found = []
        for i, launch in enumerate(launches):
            record = facts | asdict(read_code(launch.compiled)) | {"hash": launch.compiled.hash}
            # what a case reads is read by its first launch, what it writes by its last
            if i == 0:
                record["least_loads"] = widest_share(reads, launch.threads)
            if i == len(launches) - 1:
                record["least_stores"] = widest_share(writes, launch.threads)
            else:
                record["label"] = f"{name} {launch.kernel.__name__}"
            found.append(record)
        return found
    except Exception as error:
        return [facts | {"error": f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"}]


def _measured(jobs: Sequence[Job], processes: int, *, shown: bool) -> Iterator[Record]:
    """Yield the record of each kernel once, though several cases launch it."""
    seen = set()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for number, found in enumerate(pool.map(measure, jobs) if processes > 1 else map(measure, jobs), 1):
            if shown:
                print(f"\r{number}/{len(jobs)} {', '.join(jobs[number - 1])}\033[K", end="", flush=True)
            for record in found:
                code = (record["target"], record.pop("hash", record["label"]))
                if code not in seen:
                    seen.add(code)
                    yield record
    print(end="\n" * shown)


def compare_versions(versions: Sequence[str], processes: int) -> int:
    """Compile everything with other versions of Triton; writes their table, returns 1 where anything fails."""
    rows, failed = [], 0
    for version in versions:
        findings = compile_with(version, processes)
        broken = broken_claims(findings)
        failed += len(broken["compiles"])
        print(f"triton {version}: {len(findings)} compiled\n" + "\n".join(broken["compiles"]), flush=True)
        counts = (len(findings) - len(broken["compiles"]), len(broken["no spills"]))
        rows.append((version, VERSIONS.get(version, ""), len(findings), *counts))
    header = ("Triton", "pinned by", "kernels", "compiled", "with spills")
    insert(PAGE, "triton versions", markdown_table(header, rows, text_columns=2))
    return int(failed > 0)


def compile_with(version: str, processes: int) -> list[Record]:
    """Compile all with another version of Triton, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/site"]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        environment = {**os.environ, "PYTHONPATH": f"{folder}/site", "TRITON_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, str(Path(__file__).parent), "--jobs", str(processes), "--json"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    findings: list[Any] = json.loads(done.stdout)
    return findings
