"""Starts each stage as a process with its own time limit; what a stage that is cut off has found stays in the file."""

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

from gpu import profiling
from gpu.report import markdown
from gpu.rows import Rows

ROOT = Path(__file__).parents[2]
CARRIED = ROOT / "build" / "gpu"
DRIVER = "stages"
# of a stage's limit, rows are begun in this part
_ROWS_SHARE = 0.85
_TAIL = 2000
_NOT_FOUND, _CUT_OFF = 127, 124


@dataclass(frozen=True)
class Stage:
    """``run`` of ``gpu.<module>``, for at most so many seconds; ``under`` is a program that runs it.

    A dry run has only rows whose name contains ``dry_only``.
    """

    name: str
    seconds: float
    module: str
    under: tuple[str, ...] = ()
    dry_only: str = ""


def _sanitized(name: str, tool: str) -> Stage:
    return Stage(name, 120, "bits", ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9"), "votes")


STAGES = {
    stage.name: stage
    for stage in (
        Stage("facts", 60, "facts"),
        Stage("test", 150, "testing"),
        Stage("speed", 220, "bandwidth"),
        Stage("bits", 110, "bits"),
        Stage("graphs", 90, "graphs"),
        Stage("steps", 90, "steps"),
        Stage("nccl", 60, "nccl"),
        Stage("dist", 190, "dist"),
        Stage("sweep", 75, "sweep"),
        Stage("ncu", 90, "profiling", profiling.COMMAND),
        _sanitized("sanitize", "memcheck"),
        _sanitized("race", "racecheck"),
    )
}


def run_stages(names: Sequence[str], out: Path, device: str, only: str = "") -> int:
    """Run the stages one after the other and write the report after each; gives 1 where a row or a stage failed."""
    rows, is_dry, failed = Rows(out / "gpu.json"), device == "cpu", False
    environment = environment_of_stages(is_dry)
    for name in names:
        stage, began = STAGES[name], time.monotonic()
        rows.drop(name)
        command = command_of(stage, out, device, only or (stage.dry_only if is_dry else ""))
        shown = " ".join([*stage.under, "python bench/gpu stage", name])
        code = _run(stage, [] if is_dry else list(stage.under), command, environment, out / "log.txt")
        if name == "ncu" and not is_dry:
            profiling.add_metrics(rows, name, out / "log.txt")
        wrong = {"error": _describe(code, stage)} if code else {}
        rows.add(DRIVER, name, seconds=time.monotonic() - began, command=shown, **wrong)
        failed = failed or bool(code) or any("error" in row for row in rows.read(name))
        (out / "gpu.md").write_text(markdown(rows.read(), is_dry=is_dry))
    return int(failed)


def entry() -> Path:
    """What `python` is started with."""
    return Path(__file__).parent


def command_of(stage: Stage, out: Path, device: str, only: str = "") -> list[str]:
    """The argv of a stage's process."""
    options = ["--out", str(out), "--device", device, "--seconds", f"{_ROWS_SHARE * stage.seconds:g}"]
    return [sys.executable, str(entry()), "stage", stage.name, *options, *(["--only", only] if only else [])]


def environment_of_stages(is_dry: bool) -> dict[str, str]:
    """Paths and settings of a stage: the package that is installed, else the copy that `prepare` made.

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


def _run(stage: Stage, under: list[str], command: list[str], environment: dict[str, str], log: Path) -> int:
    """The exit code of a stage, whose words go to the log, and the last of them to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if under and shutil.which(under[0]) is None:
        return _NOT_FOUND
    with log.open("a+b") as words:
        words.write(f"=== {stage.name}\n".encode())
        words.flush()
        began = words.tell()
        # in a session of its own, which ends with it
        process = subprocess.Popen(
            [*under, *command], env=environment, cwd=ROOT, stdout=words, stderr=words, start_new_session=True
        )
        try:
            code = process.wait(stage.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = _CUT_OFF
        words.seek(max(began, words.seek(0, os.SEEK_END) - _TAIL))
        print(f"=== {stage.name}: exit code {code}\n{words.read().decode(errors='replace')}", flush=True)
    return code


def _describe(code: int, stage: Stage) -> str:
    known = {_CUT_OFF: f"cut off after {stage.seconds:g} s", _NOT_FOUND: f"not found: {(*stage.under, '')[0]}"}
    return known.get(code, f"exit code {code}")
