"""The JSONL log of a run: one line per method and step."""

import dataclasses
import json
import os
from pathlib import Path
from typing import IO

from lioncub.training.config import UserError

LOG_NAME = "log.jsonl"


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step of one method. Loss and seconds are means over the workers.

    Attributes:
        method: "lion" or "lioncub".
        step: counts from 1.
        loss: training loss of this step's batches, before the update, in nats per byte.
        val_loss: loss on the validation windows after the update, where it was evaluated.
        lr: learning rate of the step.
        step_seconds: the whole step: batch, forward, backward, communication, optimizer.
        forward_seconds: forward pass.
        backward_seconds: backward pass without the time that it waited for communication.
        communication_seconds: time with a collective under way, hidden behind the backward pass or not.
        exposed_seconds: the part of it that the step waited for.
        optimizer_seconds: optimizer step without communication.
        bytes_sent: bytes sent per worker: counted for lioncub; for lion, computed for a ring all-reduce.
    """

    method: str
    step: int
    val_loss: float | None
    lr: float
    bytes_sent: int
    loss: float
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    communication_seconds: float
    exposed_seconds: float
    optimizer_seconds: float


class LogWriter:
    """Appends records to `directory`/log.jsonl, each line flushed at once."""

    def __init__(self, directory: Path, keep_bytes: int = 0) -> None:
        """Cut the log to its first `keep_bytes` bytes, the state that a checkpoint belongs to.

        Raises:
            UserError: the log is shorter than that.
        """
        path = directory / LOG_NAME
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise UserError(f"{path}: expected the {keep_bytes} bytes that the checkpoint counts, got {size}")
        self._file: IO[bytes] = path.open("ab")
        self._file.truncate(keep_bytes)

    def write(self, record: StepRecord) -> None:
        """Append one line."""
        self._file.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")
        self._file.flush()

    def bytes_written(self) -> int:
        """Length of the log so far, on disk for good."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(directory: Path) -> list[StepRecord]:
    """All records of `directory`/log.jsonl.

    Raises:
        UserError: the log is missing or a line is not a record.
    """
    path = directory / LOG_NAME
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(StepRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, line {number}: not a step record: {error}") from error
    return records
