"""Finished runs: one JSON file each, named by a hash of everything that the run is a function of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from convergence.methods import METHODS
from convergence.training import Config
from lioncub import Quantized

Record = dict[str, Any]
ROOT = Path(__file__).parents[2]
# code that a run's numbers depend on; the rest of this folder only chooses and reports runs
CODE = ("kernels", "collectives", "lioncub/*.py", "bench/demo/gpt.py")
HARNESS = ("tasks.py", "training.py")


@cache
def code_digest() -> str:
    """Hash of the code that the numbers of a run depend on, as it is on disk at the first call."""
    patterns = [f"{part}/**/*.py" if "." not in part else part for part in CODE]
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    files += [Path(__file__).parent / name for name in HARNESS]
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


@cache
def key_of(config: Config) -> str:
    """The name of a run: its configuration, and what its method's name stands for."""
    return _name(dataclasses.asdict(config), meaning(METHODS[config.method]))


def name_of(record: Record) -> str:
    """The name of a finished run, whatever its method's name stands for by now."""
    return _name(record["config"], record["means"])


def _name(config: dict[str, Any], means: str) -> str:
    facts = {**config, "means": means}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=10).hexdigest()


def meaning(value: Any) -> str:
    """``value`` as a dataclass, without what is at its default: an option that is new says nothing of older runs."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    told = [
        f"{field.name}={meaning(getattr(value, field.name))}"
        for field in dataclasses.fields(value)
        if getattr(value, field.name) != field.default
    ]
    if isinstance(value, Quantized):
        # stored runs say which of two results they had, and those of the other one are not of this method
        told.insert(len(told) - (value.share_scales_every is not None), "down='sign'")
    return f"{type(value).__name__}({', '.join(told)})"


class Store:
    """The runs of a folder.

    Args:
        folder: is made where it is missing.
        digest: of the code at hand; runs of another are as good as missing unless ``keep_old``.
    """

    def __init__(self, folder: Path, digest: str, keep_old: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.digest, self.keep_old = folder, digest, keep_old
        # goes up with every run that is added
        self.version = 0
        self._records = {path.stem: _read(path) for path in sorted(folder.glob("*.json"))}

    def find(self, config: Config) -> Record | None:
        """A finished run, or None."""
        record = self._records.get(key_of(config))
        return record if record is not None and self._counts(record) else None

    def add(self, config: Config, record: Record) -> None:
        """Write a run, all of it or nothing."""
        path = self.folder / f"{key_of(config)}.json"
        write_whole(path, json.dumps(record).encode() + b"\n")
        self._records[path.stem] = record
        self.version += 1

    def records(self) -> list[Record]:
        """All runs that count, in the order of their names."""
        return [record for record in self._records.values() if self._counts(record)]

    def digests(self) -> dict[str, int]:
        """Runs in the folder by the digest of their code, those that do not count included."""
        found: dict[str, int] = {}
        for record in self._records.values():
            found[record["digest"]] = found.get(record["digest"], 0) + 1
        return found

    def _counts(self, record: Record) -> bool:
        return self.keep_old or record["digest"] == self.digest


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _read(path: Path) -> Record:
    try:
        record: Record = json.loads(path.read_text())
        return {"digest": record["digest"], **record}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a run's JSON, got {type(error).__name__}: {error}") from error


def missing(store: Store, wanted: Iterable[Config]) -> list[Config]:
    """Those without a finished run, each once, in their order."""
    return [config for config in dict.fromkeys(wanted) if store.find(config) is None]


def stamped(run: Callable[[Config], Record], config: Config) -> Record:
    """Run, with the digest of the code that did it and what the method's name stood for."""
    return {**run(config), "digest": code_digest(), "means": meaning(METHODS[config.method])}
