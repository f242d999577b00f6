"""Compiles every Triton kernel for every GPU with several versions of Triton, and writes what came of it.

python bench/triton_versions.py --out docs                 # downloads each version into a folder of its own
python bench/triton_versions.py --here fp32:sm_90          # prints the same of the installed version, as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from gpu_report.claims import claims_of
from gpu_report.cli import Job, measure
from gpu_report.compiling import TARGETS
from gpu_report.findings import Finding
from gpu_report.variants import all_variants

ROOT = Path(__file__).parents[1]
# with the torch that pins each
VERSIONS = {"3.6.0": "torch 2.11", "3.7.1": "torch 2.12, 2.13", "3.8.0": "torch 2.14", "3.9.0": ""}
INTRODUCTION = """\
# Versions of Triton

Written by `make triton-versions`: every kernel in every dtype, compiled ahead of time for each GPU, without one. Shared
memory is counted where threads need not exchange values, as in [Compiled for GPUs](gpu.md). `make test` compiles the
same kernels with the installed version.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 where any kernel did not compile."""
    parser = argparse.ArgumentParser(prog="triton_versions", description="Compile all kernels with versions of Triton.")
    parser.add_argument("--here", action="store_true", help="print what the installed version gives, as JSON")
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), metavar="VERSION")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile; default: 2")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the table; default: docs")
    options = parser.parse_args(arguments)
    if options.here:
        json.dump(compile_here(options.jobs), sys.stdout)
        return 0
    results = [compile_with(version, options.jobs) for version in options.versions]
    (options.out / "triton_versions.md").write_text(document(results))
    print(f"written: {options.out / 'triton_versions.md'}")
    return int(any(row["failed"] for result in results for row in result["targets"].values()))


def compile_here(processes: int) -> dict[str, Any]:
    """What the installed version compiles: by target, numbers of kernels and of claims that are missed."""
    import triton

    jobs: list[Job] = [(variant.label, variant.dtype, target, None) for target in TARGETS for variant in all_variants()]
    with ProcessPoolExecutor(processes) as pool:
        outcomes = list(zip(jobs, pool.map(_attempt, jobs), strict=True))
    targets = {}
    for target in TARGETS:
        found = [(job, outcome) for job, outcome in outcomes if job[2] == target]
        failed = [f"{job[0]}, {job[1]}: {outcome}" for job, outcome in found if isinstance(outcome, str)]
        findings = [outcome for _, outcome in found if isinstance(outcome, Finding)]
        missed = {claim.text: len(claim.unexpected) for claim in claims_of(findings)}
        targets[target] = {"kernels": len(found), "failed": failed, "missed": missed}
    return {"triton": triton.__version__, "targets": targets}


def _attempt(job: Job) -> Finding | str:
    """The finding, or the error: a version that cannot compile one kernel is asked for all the others too."""
    try:
        return measure(job)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[-1] if str(error) else ''}"


def compile_with(version: str, processes: int) -> dict[str, Any]:
    """`compile_here` by another version of Triton, in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        print(f"triton {version}: installing", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}/site"]
        subprocess.run([*pip, f"triton=={version}"], check=True)
        environment = {**os.environ, "PYTHONPATH": f"{folder}/site", "TRITON_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, __file__, "--jobs", str(processes), "--here"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["triton"] == version, result["triton"]
    for target, row in result["targets"].items():
        print(f"triton {version}: {row['kernels'] - len(row['failed'])} of {row['kernels']} for {target}", flush=True)
        print("".join(f"  {failure}\n" for failure in row["failed"]), end="", flush=True)
    return result


def document(results: Sequence[dict[str, Any]]) -> str:
    """The page."""
    rows = []
    for result in results:
        for target, row in result["targets"].items():
            compiled, missed = row["kernels"] - len(row["failed"]), row["missed"]
            shared = sum(missed[claim] for claim in missed if "shared memory" in claim)
            cells = (result["triton"], VERSIONS.get(result["triton"], ""), target, row["kernels"], compiled)
            rows.append("| " + " | ".join(map(str, (*cells, missed["no spills"], shared))) + " |")
    head = "| Triton | pinned by | GPU | kernels | compiled | with spills | with needless shared memory |"
    return "\n".join([INTRODUCTION, head, "|---|---|---|---:|---:|---:|---:|", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
