"""Records as JSON lines, written as they come: the first has commit, date and machine, every other one is a finding."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
PACKAGES = ("torch", "triton", "numba", "numpy", "lion-pytorch")

Record = dict[str, Any]


class RecordsError(ValueError):
    """A file that is missing or holds no records; the message names it."""


def machine_facts() -> dict[str, str]:
    """Return processor, cores, threads in use and versions, and the GPU where there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        **gpu,
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def run_record(**facts: Any) -> Record:
    """Return the first record of a run: date, commit, whether files differ from it, machine, and further facts."""
    commit, changes = (_git(*words) for words in (("rev-parse", "HEAD"), ("status", "--porcelain")))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"kind": "run", "date": date, "commit": commit, "dirty": bool(changes), "machine": machine_facts(), **facts}


def _git(*words: str) -> str:
    # a copy without history has none
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


class Journal:
    """A file of records that is complete after every line. A context manager.

    With ``append``, a last line that was cut off is removed.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("a" if append else "w")

    def write(self, record: Record) -> None:
        """Add a record; floats keep five digits."""
        self._file.write(json.dumps(_rounded(record)) + "\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write a whole file."""
    with Journal(path) as journal:
        for record in records:
            journal.write(record)


def read_records(source: str | Path) -> list[Record]:
    """Read a file, or ``COMMIT:PATH`` from git's history. A last line that was cut off is left out.

    Raises RecordsError where there is no such file, another line is broken, or the first is not a run's.
    """
    lines = _text_of(str(source)).splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise RecordsError(f"{source}: expected JSON in line {number}, got {line[:60]!r}") from error
    if not records or not isinstance(records[0], dict) or records[0].get("kind") != "run":
        raise RecordsError(f"{source}: expected records of a run, got {(lines or ['nothing'])[0][:60]!r}")
    return records


def _text_of(source: str) -> str:
    if ":" in source:
        done = subprocess.run(["git", "-C", str(ROOT), "show", source], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RecordsError(f"{source}: expected a file in git's history: {done.stderr.strip()}")
        return done.stdout
    try:
        return Path(source).read_text()
    except OSError as error:
        raise RecordsError(f"{source}: {error.strerror}") from error
