"""Starts the workers on this machine, watches them, and leaves none behind."""

import contextlib
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from lioncub.training.worker import Failure, Job, WorkerFailedError, run_local

# after one worker has failed, the others get this long to tell what they saw
SETTLE_SECONDS = 2.0


def run_workers(job: Job, on_report: Callable[[Any], None]) -> None:
    """Do a job with `job.workers` processes; `on_report` gets what they report, in this process.

    Returns when all are done. However it ends, also by KeyboardInterrupt, no worker is left.

    Raises:
        WorkerFailedError: the first cause, where several workers fail.
    """
    with tempfile.TemporaryDirectory(prefix="lioncub-") as folder:
        workers = _Workers(job, str(Path(folder) / "rendezvous"))
        try:
            workers.start()
            workers.watch(on_report)
        finally:
            workers.stop()


class _Workers:
    def __init__(self, job: Job, rendezvous: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[SpawnProcess] = []
        self.channels: list[Connection] = []
        self.child_ends: list[Connection] = []
        self.failures: list[Failure] = []
        for rank in range(job.workers):
            receiver, sender = context.Pipe(duplex=False)
            args = (rank, job, rendezvous, sender)
            self.processes.append(context.Process(target=run_local, args=args, name=f"worker {rank}", daemon=True))
            self.channels.append(receiver)
            self.child_ends.append(sender)

    def start(self) -> None:
        with _inherited_ignore(signal.SIGINT):
            for process in self.processes:
                process.start()
        for end in self.child_ends:
            # so that a channel reports its end when its worker is gone
            end.close()

    def watch(self, on_report: Callable[[Any], None]) -> None:
        while self._running():
            self._receive(on_report, timeout=None)
            if any(process.exitcode not in (None, 0) for process in self.processes):
                deadline = time.monotonic() + SETTLE_SECONDS
                while self._running() and time.monotonic() < deadline:
                    self._receive(on_report, timeout=deadline - time.monotonic())
                # what a worker sent just before it ended
                self._receive(on_report, timeout=0)
                raise self._cause()
        self._receive(on_report, timeout=0)

    def _running(self) -> list[SpawnProcess]:
        return [process for process in self.processes if process.exitcode is None]

    def _receive(self, on_report: Callable[[Any], None], timeout: float | None) -> None:
        """Handle all that has come; wait for a message or the end of a worker where nothing has."""
        awaited: list[Connection | int] = [*self.channels, *(process.sentinel for process in self._running())]
        # the last worker may have ended since the caller looked, and to wait for nothing would never end
        ready = wait(awaited, timeout) if awaited else []
        for channel in [channel for channel in self.channels if channel in ready]:
            try:
                while channel.poll():
                    message = channel.recv()
                    if isinstance(message, Failure):
                        self.failures.append(message)
                    else:
                        on_report(message)
            # a worker that is killed in the middle of a message leaves an OSError
            except (EOFError, OSError):
                self.channels.remove(channel)

    def _cause(self) -> WorkerFailedError:
        """A worker that was killed, or else the earliest failure: what comes later are its peers' complaints."""
        for rank, process in enumerate(self.processes):
            code = process.exitcode
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                return WorkerFailedError(f"worker {rank} (process {process.pid}) was killed by {name}{hint}")
        if self.failures:
            first = min(self.failures, key=lambda failure: failure.time)
            # a message without traceback is about what the user asked for, not about a worker
            prefix = f"worker {first.rank} failed: " if first.traceback else ""
            return WorkerFailedError(prefix + first.message, first.traceback)
        rank, code = next((rank, p.exitcode) for rank, p in enumerate(self.processes) if p.exitcode)
        return WorkerFailedError(f"worker {rank} ended with exit code {code} and no message")

    def stop(self) -> None:
        """End every worker that still runs."""
        started = [process for process in self.processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join(SETTLE_SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()


@contextlib.contextmanager
def _inherited_ignore(number: signal.Signals) -> Iterator[None]:
    """Processes started meanwhile ignore the signal: on Ctrl-C only the parent speaks, and it ends them."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, previous)
