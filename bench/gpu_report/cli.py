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
from pathlib import Path
from typing import Any

from reporting.pages import PAGE, insert, markdown_table
from reporting.records import RESULTS, Record, run_record

from gpu_report.compiling import TARGETS, compile_variant
from gpu_report.report import broken_claims, write_report
from gpu_report.variants import all_variants

# with the torch that pins each
VERSIONS = {"3.6.0": "torch 2.11", "3.7.1": "torch 2.12, 2.13", "3.8.0": "torch 2.14", "3.9.0": ""}
# label, dtype, target
Job = tuple[str, str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 where a claim is broken or a name does not exist."""
    options = _parser().parse_args(arguments)
    if options.versions is not None:
        return compare_versions(options.versions or list(VERSIONS), options.jobs)
    names = [f"{variant.label}/{variant.dtype}" for variant in all_variants()]
    if unknown := set(options.only) - set(names):
        print(f"gpu_report: --only: expected names such as {names[0]}, got {sorted(unknown)}", file=sys.stderr)
        return 1
    chosen = [name.split("/") for name in names if name in (options.only or names)]
    jobs: list[Job] = [(label, dtype, target) for label, dtype in chosen for target in options.targets]
    findings = list(_measured(jobs, options.jobs, shown=not options.json))
    if options.json:
        json.dump(findings, sys.stdout)
        return 0
    broken = broken_claims(findings)
    for claim, kernels in broken.items():
        print(f"{claim}: {len(findings) - len(kernels)} of {len(findings)}")
        print("".join(f"  {kernel}\n" for kernel in kernels), end="")
    if len(jobs) == len(TARGETS) * len(all_variants()):
        write_report([run_record(), *findings], RESULTS)
        print(f"written: {PAGE}")
    return int(any(broken.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_report", description="What the Triton kernels compile to.")
    add = parser.add_argument
    add("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME", help=f"of {', '.join(TARGETS)}")
    add("--only", nargs="+", default=[], metavar="LABEL/DTYPE", help="kernels; default: all, which writes the report")
    add("--jobs", type=int, default=1, help="processes that compile; default: 1")
    add("--json", action="store_true", help="print the findings as JSON, write nothing")
    add("--versions", nargs="*", metavar="VERSION", help="compile with these versions of Triton, each downloaded")
    return parser


def measure(job: Job) -> Record:
    """Compile one variant and read its code; ``error`` says what came of it where it did not compile."""
    label, dtype, target = job
    variant = next(v for v in all_variants() if (v.label, v.dtype) == (label, dtype))
    # where a thread has 128 bits of some tensor, the widest access must have as many
    parts = {"loads": variant.reads, "stores": variant.writes}
    least = {name: max(variant.widths(part), default=0) for name, part in parts.items()}
    found: Record = {"kind": "kernel", "label": label, "dtype": dtype, "target": target, "error": ""}
    found |= {f"least_{name}": bits for name, bits in least.items()}
    try:
        return found | asdict(compile_variant(variant, TARGETS[target]))
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"}


def _measured(jobs: Sequence[Job], processes: int, *, shown: bool) -> Iterator[Record]:
    with ProcessPoolExecutor(processes) as pool:
        for number, found in enumerate(pool.map(measure, jobs) if processes > 1 else map(measure, jobs), 1):
            if shown:
                words = f"{number}/{len(jobs)} {found['label']}, {found['dtype']}, {found['target']}"
                print(f"\r{words}\033[K", end="\n" * (number == len(jobs)), flush=True)
            yield found


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
