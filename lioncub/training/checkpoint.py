"""Checkpoints: a folder per step with the models, and each worker's optimizer state in a file of its own.

The momentum of LionCub differs between workers, so a run continues only with as many workers as it had.
A folder gets its final name when every file in it is complete; one that does not have it is not read.
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lioncub.training.config import UserError
from lioncub.training.methods import Method

FOLDER = "checkpoints"


class Position(NamedTuple):
    """Where a checkpoint stands: step, number of workers, length of the log and hash of the text."""

    step: int
    workers: int
    log_bytes: int
    text_sha256: str


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint of the run in `directory`."""
    found = [path for path in (directory / FOLDER).glob("step-*") if path.suffix != ".partial"]
    return max(found, default=None)


def read_position(checkpoint: Path) -> Position:
    """Where `checkpoint` stands.

    Raises:
        UserError: its position.json is missing or spoilt.
    """
    path = checkpoint / "position.json"
    try:
        return Position(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def check_position(position: Position, checkpoint: Path, *, workers: int, text_sha256: str) -> None:
    """Raise UserError unless a run with `workers` on this text can continue from `checkpoint`."""
    if position.workers != workers:
        raise UserError(
            f"{checkpoint}: expected {position.workers} workers, as when it was saved (each has its own momentum),"
            f" got {workers}"
        )
    if position.text_sha256 != text_sha256:
        raise UserError(
            f"{checkpoint}: the text is not the one it was trained on: expected SHA-256"
            f" {position.text_sha256[:16]}..., got {text_sha256[:16]}...; name the same text with --data"
        )


def save(directory: Path, position: Position, methods: Mapping[str, Method], rank: int) -> None:
    """Write a checkpoint and remove the older ones. Collective: every worker calls it."""
    target = directory / FOLDER / f"step-{position.step:08d}"
    staging = target.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    _save_file({name: method.optimizer.state_dict() for name, method in methods.items()}, _rank_file(staging, rank))
    if rank == 0:
        _save_file({name: method.model.state_dict() for name, method in methods.items()}, staging / "models.pt")
        (staging / "position.json").write_text(json.dumps(position._asdict()) + "\n", encoding="utf-8")
    # the name becomes final only after every worker's file is complete
    dist.barrier()
    if rank == 0:
        older = [path for path in target.parent.iterdir() if path != staging]
        shutil.rmtree(target, ignore_errors=True)
        staging.replace(target)
        for path in older:
            if path != target:
                shutil.rmtree(path)


def restore(checkpoint: Path, methods: Mapping[str, Method], rank: int) -> None:
    """Load models and this worker's optimizer state, in place.

    Raises:
        UserError: a file is missing, spoilt or of another model.
    """
    models = _load_file(checkpoint / "models.pt")
    optimizers = _load_file(_rank_file(checkpoint, rank))
    for name, method in methods.items():
        try:
            method.model.load_state_dict(models[name])
            method.optimizer.load_state_dict(optimizers[name])
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(f"{checkpoint}: does not fit this run's {name}: {error}") from error


def _rank_file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"optimizers-rank-{rank}.pt"


def _save_file(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def _load_file(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    return content
