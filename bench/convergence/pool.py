"""Processes side by side that do runs, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

Job = TypeVar("Job")


class RunFailedError(RuntimeError):
    """A run raised, or its process ended."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """``size`` fresh processes that call ``function(job)``, with one thread each. A context manager.

    Leaving it ends them at once: what was under way is lost.
    """

    def __init__(self, size: int, function: Callable[[Any], Any]) -> None:
        if size < 1:
            raise ValueError(f"jobs: expected at least 1, got {size}")
        context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, function), daemon=True)
            process.start()
            there.close()
            self._workers.append(_Worker(process, here))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def results(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Any]]:
        """(job, result) as they come. Jobs are taken from the iterable when a process is free.

        Raises RunFailedError where one raises.
        """
        waiting = iter(jobs)
        idle, busy = list(self._workers), dict[Connection, tuple[_Worker, Job]]()
        while True:
            while idle and (job := next(waiting, None)) is not None:
                worker = idle.pop()
                worker.pipe.send(job)
                busy[worker.pipe] = worker, job
            if not busy:
                return
            for ready in wait(list(busy)):
                worker, job = busy.pop(ready)  # type: ignore[index]
                result = _received(worker, job)
                idle.append(worker)
                yield job, result


def _received(worker: _Worker, job: object) -> Any:
    try:
        ended_well, result = worker.pipe.recv()
    except EOFError as error:
        worker.process.join()
        raise RunFailedError(f"{job}: its process ended with exit code {worker.process.exitcode}") from error
    if not ended_well:
        raise RunFailedError(f"{job}:\n{result}")
    return result


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    # an interrupt from the terminal reaches all processes; the parent's decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(job))
        except Exception:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return
