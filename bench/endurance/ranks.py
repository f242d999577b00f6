"""Real processes of one Gloo group, each with a pipe to say what it found."""

from __future__ import annotations

import datetime
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "lioncub", "lioncub.kernels.numba_cpu"])
# of process groups, in seconds
TIMEOUT = 10.0


@dataclass
class Rank:
    """A process and the end of its pipe."""

    process: Any
    pipe: Connection

    def answer(self, seconds: float) -> Any:
        """Return what the function returned, a text where it raised; None where it died, or said nothing in time."""
        try:
            return self.pipe.recv() if self.pipe.poll(max(seconds, 0.0)) else None
        except EOFError:
            return None


@contextmanager
def ranks(function: Callable[..., Any], size: int, *arguments: Any) -> Iterator[list[Rank]]:
    """Start ``function(rank, size, say, *arguments)`` as every rank; all processes are gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            target = (theirs, function, rank, size, folder, arguments)
            process = _CONTEXT.Process(target=_run, args=target, daemon=True)
            process.start()
            theirs.close()
            started.append(Rank(process, mine))
        try:
            yield started
        finally:
            for one in started:
                one.process.kill()
                one.process.join()


def answers_of(function: Callable[..., Any], size: int, *arguments: Any, seconds: float) -> list[Any]:
    """Return every rank's answer."""
    deadline = time.monotonic() + seconds
    with ranks(function, size, *arguments) as started:
        return [one.answer(deadline - time.monotonic()) for one in started]


def _run(pipe: Connection, function: Callable[..., Any], rank: int, size: int, folder: str, arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        pipe.send(function(rank, size, pipe.send, *arguments))
    except BaseException:
        pipe.send(traceback.format_exc())
    # threads of a group whose peers are gone may hang
    os._exit(0)
