"""The workers of a session as their starter sees them: requests go to all, answers come from all, or a clear error."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from netlab.lab import LabError

# after one worker has failed, the others get this long to end
SETTLE_SECONDS = 2.0
_TAIL = 3000


class WorkerFailedError(LabError):
    """A worker ended early; the text names it, its exit code and the end of the log."""


class Crew:
    """One worker process per rank of a lab, all with the same model; leaving the context ends them."""

    def __init__(self, lab: Any, model: str, log: Path, environment: Mapping[str, str], device: str = "cpu") -> None:
        self._lab, self._log, self._environment = lab, log, environment
        self._arguments = (model, device)
        self._channels: list[Connection] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Crew:
        with self._log.open("ab") as log:
            for rank in range(self._lab.workers):
                mine, theirs = Pipe()
                entry = str(Path(__file__).parent)
                command = [sys.executable, entry, "worker", str(theirs.fileno()), *self._arguments]
                options = {"pass_fds": (theirs.fileno(),), "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                self._processes.append(self._lab.start_worker(rank, command, self._environment, **options))
                # so that the channel reports its end when the worker is gone
                theirs.close()
                self._channels.append(mine)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            if kind is not None:
                process.kill()
            try:
                process.wait(SETTLE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Return the answers of all workers, by rank. Raises WorkerFailedError where one has ended."""
        for channel in self._channels:
            # a worker that is gone is named below
            with suppress(BrokenPipeError, ConnectionResetError):
                channel.send({"do": do, **arguments})
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._channels):
            for ready in wait([channel for rank, channel in enumerate(self._channels) if rank not in answers]):
                assert isinstance(ready, Connection)
                rank = self._channels.index(ready)
                try:
                    answers[rank] = ready.recv()
                except (EOFError, ConnectionResetError):
                    raise WorkerFailedError(self._describe_end(rank)) from None
        return [answers[rank] for rank in range(len(self._channels))]

    def _describe_end(self, rank: int) -> str:
        """Name a worker that was killed, or else ``rank``, the first that ended: its peers only miss it."""
        self._processes[rank].wait()
        time.sleep(SETTLE_SECONDS)
        codes = [process.poll() for process in self._processes]
        rank = next((i for i, code in enumerate(codes) if code is not None and code < 0), rank)
        code = codes[rank]
        assert code is not None
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"worker {rank} {end}{hint}; the end of {self._log}:\n{self._log.read_text()[-_TAIL:]}"
