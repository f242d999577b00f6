"""Starts each stage as a process with its own time limit; the rows of a stage that is cut off stay in the file."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reporting.records import ROOT

from gpu import counters
from gpu.report import Rows, markdown

CARRIED = ROOT / "build" / "gpu"
ENTRY = Path(__file__).parent
DRIVER = "stages"
# of a stage's limit, rows are begun in this part
_ROWS_SHARE = 0.85
_TAIL = 2000
_NOT_FOUND, _CUT_OFF = 127, 124
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")


@dataclass(frozen=True)
class Stage:
    """``function``, such as "bits.run" for that of ``gpu.bits``, for at most so many seconds.

    ``under`` is a program that runs it. A dry run has only rows whose name contains ``dry_only``.
    """

    seconds: float
    function: str
    under: tuple[str, ...] = ()
    dry_only: str = ""


STAGES = {
    "facts": Stage(60, "machine.facts"),
    "test": Stage(150, "machine.test"),
    "speed": Stage(220, "bandwidth.run"),
    "bits": Stage(110, "bits.run"),
    "graphs": Stage(90, "graphs.run"),
    "steps": Stage(90, "steps.run"),
    "nccl": Stage(60, "nccl.run"),
    "dist": Stage(190, "dist.run"),
    "sweep": Stage(75, "tiles.run"),
    "ncu": Stage(90, "tiles.launch_once", counters.COMMAND),
    "sanitize": Stage(120, "bits.run", (*_SANITIZER, "memcheck"), "votes"),
    "race": Stage(120, "bits.run", (*_SANITIZER, "racecheck"), "votes"),
}


def run_stages(names: Sequence[str], out: Path, device: str, only: str = "") -> int:
    """Run the stages one after the other and write the report after each; gives 1 where a row or a stage failed."""
    rows, is_dry, failed = Rows(out / "gpu.jsonl"), device == "cpu", False
    environment = environment_of_stages(is_dry)
    for name in names:
        stage, began = STAGES[name], time.monotonic()
        rows.drop(name)
        command = command_of(name, out, device, only or (stage.dry_only if is_dry else ""))
        code = _run(name, [] if is_dry else list(stage.under), command, environment, out / "log.txt")
        if name == "ncu" and not is_dry:
            counters.add_metrics(rows, name, out / "log.txt")
        wrong = {"error": _describe(code, stage)} if code else {}
        shown = " ".join([*stage.under, "python bench/gpu stage", name])
        rows.add(DRIVER, name, seconds=time.monotonic() - began, command=shown, **wrong)
        failed = failed or bool(code) or any("error" in row for row in rows.read(name))
        (out / "gpu.md").write_text(markdown(rows.read(), is_dry=is_dry))
    return int(failed)


def command_of(name: str, out: Path, device: str, only: str = "") -> list[str]:
    """Return the argv of a stage's process."""
    options = ["--out", str(out), "--device", device, "--seconds", f"{_ROWS_SHARE * STAGES[name].seconds:g}"]
    return [sys.executable, str(ENTRY), "stage", name, *options, *(["--only", only] if only else [])]


def environment_of_stages(is_dry: bool) -> dict[str, str]:
    """Return paths and settings of a stage: the package that is installed, else the copy that `prepare` made.

    Raises:
        FileNotFoundError: there is neither.
    """
    # from the root, the bare folder lioncub/ must not be what is imported
    settings = {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    settings |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if is_dry else {"TRITON_INTERPRET": "0"}
    paths = [ROOT / "tests" / "support"]
    if not _is_installed():
        if not (CARRIED / "copy").is_dir():
            expected = f"expected it installed or in {CARRIED / 'copy'}"
            raise FileNotFoundError(f"lioncub: {expected}: python bench/gpu prepare")
        paths = [CARRIED / "copy", CARRIED / "extra", *paths]
    settings["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    return {**os.environ, **settings}


def _is_installed() -> bool:
    try:
        importlib.metadata.version("lioncub")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run(name: str, under: list[str], command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run a stage with its output in the log, print the end of that, and return the exit code."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if under and shutil.which(under[0]) is None:
        return _NOT_FOUND
    with log.open("a+b") as words:
        words.write(f"=== {name}\n".encode())
        words.flush()
        began = words.tell()
        options = {"env": environment, "cwd": ROOT, "stdout": words, "stderr": words}
        # in its own session, so that its children end with it
        process = subprocess.Popen([*under, *command], **options, start_new_session=True)
        try:
            code = process.wait(STAGES[name].seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = _CUT_OFF
        words.seek(max(began, words.seek(0, os.SEEK_END) - _TAIL))
        print(f"=== {name}: exit code {code}\n{words.read().decode(errors='replace')}", flush=True)
    return code


def _describe(code: int, stage: Stage) -> str:
    known = {_CUT_OFF: f"cut off after {stage.seconds:g} s", _NOT_FOUND: f"not found: {(*stage.under, '')[0]}"}
    return known.get(code, f"exit code {code}")
