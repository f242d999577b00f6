"""One worker process: joins the group, does its part of the job, and tells its parent how it went."""

import dataclasses
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
import torch.distributed as dist

from lioncub.training.config import UserError


class Job(Protocol):
    """What the workers of a group do together. It is pickled on its way to them."""

    @property
    def workers(self) -> int:
        """How many there are."""

    @property
    def timeout(self) -> float:
        """Seconds to wait for a silent worker."""

    def run(self, report: Callable[[Any], None]) -> None:
        """One worker's part, under an initialised default group; what it reports reaches whoever started the job."""


class WorkerFailedError(RuntimeError):
    """A worker ended early; the text says which one and why, `traceback` is for a bug report."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


@dataclasses.dataclass(frozen=True)
class Failure:
    """How a worker ended. `traceback` is empty where `message` says all that the user needs."""

    rank: int
    message: str
    traceback: str
    time: float


def describe(error: Exception, rank: int) -> Failure:
    """A Failure from an exception that is being handled."""
    if isinstance(error, UserError):
        return Failure(rank, str(error), "", time.time())
    return Failure(rank, f"{type(error).__name__}: {error}", traceback.format_exc(), time.time())


def join_group(job: Job, *, local_workers: int, init_method: str, rank: int) -> None:
    """Enter the default Gloo group; the processor's threads are shared out among `local_workers`."""
    torch.set_num_threads(max(1, torch.get_num_threads() // local_workers))
    dist.init_process_group(
        "gloo",
        init_method=init_method,
        rank=rank,
        world_size=job.workers,
        timeout=timedelta(seconds=job.timeout),
    )


def leave_group() -> None:
    """Leave the default group; after an error the peers may be gone, and the process ends anyway."""
    # a DDP model that is garbage would be the group's last holder, and freeing the group from there joins threads that
    # may be waiting for the interpreter's lock
    gc.collect()
    dist.destroy_process_group()


def run_local(rank: int, job: Job, rendezvous: str, channel: Connection) -> None:
    """Entry of a worker that :mod:`lioncub.training.launch` started.

    Sends to `channel` what the job reports and, when it fails, one Failure.
    """
    _end_with_parent()
    if sys.platform == "linux":
        # all workers are on this machine; a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        join_group(job, local_workers=job.workers, init_method=f"file://{rendezvous}", rank=rank)
        job.run(channel.send)
    except Exception as error:
        channel.send(describe(error, rank))
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(1)
    channel.close()
    # all is written and sent; leaving the group would join threads, which may be waiting for the interpreter's lock
    os._exit(0)


def run_joined(job: Job, on_report: Callable[[Any], None]) -> None:
    """Do the part of the worker that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name (as torchrun sets them).

    Raises:
        UserError: bad settings or text.
        WorkerFailedError: anything else went wrong.
    """
    rank, local_workers = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        join_group(job, local_workers=local_workers, init_method="env://", rank=rank)
        job.run(on_report)
        leave_group()
    except UserError:
        raise
    except Exception as error:
        raise WorkerFailedError(
            f"worker {rank} failed: {type(error).__name__}: {error}", traceback.format_exc()
        ) from error


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however that ended."""
    parent = parent_process()
    assert parent is not None, "run_local runs in a child process"

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, name="end-with-parent", daemon=True).start()
