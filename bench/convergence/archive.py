"""All finished runs in one file beside the report, so that a study can go on in another clone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from convergence.store import Record, Store, name_of, write_whole

SUFFIX = "_runs.jsonl.gz"


def write_archive(store: Store, path: Path) -> None:
    """One run a line, in the order of their names; the same runs give the same bytes."""
    lines = [
        json.dumps(record, sort_keys=True, separators=(",", ":")) + "\n"
        for record in sorted(store.records(), key=name_of)
    ]
    # without a time stamp
    write_whole(path, gzip.compress("".join(lines).encode(), mtime=0))


def read_archive(path: Path) -> dict[str, Record]:
    """Runs by name. Raises ValueError where the file is none of `write_archive`'s, OSError where it is missing."""
    try:
        records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        return {name_of(record): record for record in records}
    except (EOFError, gzip.BadGzipFile, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected runs of a study, got {type(error).__name__}: {error}") from error


def restore(path: Path, folder: Path) -> tuple[int, int]:
    """Write those of an archive's runs that ``folder`` lacks; gives how many were written, and how many were there."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {file.stem for file in folder.glob("*.json")}
    records = read_archive(path)
    for name in sorted(records.keys() - known):
        write_whole(folder / f"{name}.json", json.dumps(records[name]).encode() + b"\n")
    return len(records.keys() - known), len(records.keys() & known)
