"""The workers of a session as their starter sees them: requests go to all, answers come from all, or a clear error."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from netlab.lab import Lab, LabError

# after one worker has failed, the others get this long to report theirs
SETTLE_SECONDS = 2.0
_ENTRY = Path(__file__).with_name("__main__.py")


class WorkerFailedError(LabError):
    """A worker ended early; the text says which one and why."""


class Crew:
    """One worker process per rank of a lab, all with the same model; leaving the context ends them."""

    def __init__(self, lab: Lab, model: str, log: Path, environment: Mapping[str, str]) -> None:
        self._lab, self._model, self._log, self._environment = lab, model, log, environment
        self._channels: list[Connection] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Crew:
        with self._log.open("ab") as log:
            for rank in range(self._lab.workers):
                mine, theirs = Pipe()
                command = [sys.executable, str(_ENTRY), "worker", str(theirs.fileno()), self._model]
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
        """Return the answers of all workers, by rank. Raises WorkerFailedError, with its words, where one fails."""
        for channel in self._channels:
            try:
                channel.send({"do": do, **arguments})
            # why it is gone is known below
            except (BrokenPipeError, ConnectionResetError):
                continue
        answers: dict[int, dict[str, Any]] = {}
        waiting, deadline = list(self._channels), float("inf")
        while waiting and time.monotonic() < deadline:
            for ready in wait(waiting, None if deadline == float("inf") else deadline - time.monotonic()):
                assert isinstance(ready, Connection)
                try:
                    answer = ready.recv()
                except (EOFError, ConnectionResetError):
                    answer = {"failure": None}
                waiting.remove(ready)
                answers[self._channels.index(ready)] = answer
                if "failure" in answer:
                    deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
        failed = {rank: answer["failure"] for rank, answer in answers.items() if "failure" in answer}
        if failed:
            raise self._cause(failed)
        return [answers[rank] for rank in range(len(self._channels))]

    def _cause(self, failed: Mapping[int, dict[str, Any] | None]) -> WorkerFailedError:
        """Name a worker that was killed, or else the earliest failure: what comes later are its peers' complaints."""
        reported = [failure for failure in failed.values() if failure is not None]
        where = f"its words are in {self._log}"
        codes = {rank: self._processes[rank].wait(SETTLE_SECONDS) for rank in failed if failed[rank] is None}
        for rank, code in codes.items():
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                return WorkerFailedError(f"worker {rank} was killed by {name}{hint}; {where}")
        if reported:
            first = min(reported, key=lambda failure: failure["time"])
            return WorkerFailedError(f"worker {first['rank']} failed: {first['message']}\n{first['traceback']}")
        rank, code = next(iter(codes.items()))
        return WorkerFailedError(f"worker {rank} ended with exit code {code}; {where}")
