"""The workers of a session as their starter sees them: requests go to all, answers come from all, or a clear error."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from netlab.lab import Lab, LabError

# after one worker has failed, the others get this long to tell what they saw
SETTLE_SECONDS = 2.0
_ENTRY = Path(__file__).with_name("__main__.py")


class WorkerFailedError(LabError):
    """A worker ended early; the text says which one and why."""


class Crew:
    """One worker process per rank of a lab, all with the same model; leaving the context ends them."""

    def __init__(self, lab: Lab, model: str, log: Path, environment: Mapping[str, str]) -> None:
        self._lab, self._model, self._log, self._environment = lab, model, log, environment
        self._channels: list[socket.socket] = []
        self._processes: list[subprocess.Popen[Any]] = []
        self._unread: list[bytes] = []

    def __enter__(self) -> Crew:
        with self._log.open("ab") as log:
            for rank in range(self._lab.workers):
                mine, theirs = socket.socketpair()
                command = [sys.executable, str(_ENTRY), "worker", str(theirs.fileno()), self._model]
                options = {"pass_fds": (theirs.fileno(),), "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                process = self._lab.start_worker(rank, command, self._environment, **options)
                # so that the channel reports its end when the worker is gone
                theirs.close()
                self._channels.append(mine)
                self._processes.append(process)
                self._unread.append(b"")
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
        """The answers of all workers, by rank. Raises WorkerFailedError where one fails, with its own message."""
        line = (json.dumps({"do": do, **arguments}) + "\n").encode()
        answers: dict[int, dict[str, Any]] = {}
        for channel in self._channels:
            try:
                channel.sendall(line)
            # why it is gone is known below
            except (BrokenPipeError, ConnectionResetError):
                continue
        self._gather(answers, lambda: len(answers) == len(self._channels))
        return [answers[rank] for rank in range(len(self._channels))]

    def _gather(self, answers: dict[int, dict[str, Any]], done: Callable[[], bool]) -> None:
        failures: list[dict[str, Any]] = []
        ended: set[int] = set()
        deadline: float | None = None
        while not done() and len(ended) < len(self._channels):
            open_channels = [c for rank, c in enumerate(self._channels) if rank not in ended]
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            for ready in wait(open_channels, left):
                rank = self._channels.index(ready)  # type: ignore[arg-type]
                answer = self._receive(rank)
                if answer is None:
                    ended.add(rank)
                elif "failure" in answer:
                    failures.append(answer["failure"])
                else:
                    answers[rank] = answer
            if (failures or ended) and deadline is None:
                deadline = time.monotonic() + SETTLE_SECONDS
        if not done():
            raise self._cause(failures, ended)

    def _receive(self, rank: int) -> dict[str, Any] | None:
        """A whole answer of a worker; None where it is gone."""
        while b"\n" not in self._unread[rank]:
            try:
                more = self._channels[rank].recv(1 << 16)
            except ConnectionResetError:
                return None
            if not more:
                return None
            self._unread[rank] += more
        line, _, self._unread[rank] = self._unread[rank].partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cause(self, failures: list[dict[str, Any]], ended: set[int]) -> WorkerFailedError:
        """A worker that was killed, or else the earliest failure: what comes later are its peers' complaints."""
        for rank in sorted(ended):
            code = self._processes[rank].wait(SETTLE_SECONDS)
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                return WorkerFailedError(f"worker {rank} was killed by {name}{hint}; its words are in {self._log}")
        if failures:
            first = min(failures, key=lambda failure: failure["time"])
            return WorkerFailedError(f"worker {first['rank']} failed: {first['message']}\n{first['traceback']}")
        rank = min(ended)
        code = self._processes[rank].wait(SETTLE_SECONDS)
        return WorkerFailedError(f"worker {rank} ended with exit code {code}; its words are in {self._log}")
