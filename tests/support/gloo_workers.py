"""Runs a function of a test file on N real Gloo processes and brings back what each returned or raised."""

from __future__ import annotations

import datetime
import importlib.util
import inspect
import multiprocessing as mp
import multiprocessing.connection
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.device_mesh",
        "torch.nn.parallel",
        "torch._dynamo.testing",
        "lioncub.kernels.numba_cpu",
        "lioncub.kernels.triton_gpu",
        "lioncub",
        "pytest",
    ]
)


@dataclass(frozen=True)
class Raised:
    """An exception in a worker."""

    kind: str
    message: str
    trace: str


@dataclass(frozen=True)
class Died:
    """A worker that ended without an answer."""

    exitcode: int | None


def outcomes_of(
    worker: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 30.0, wait: float = 120.0
) -> list[Any]:
    """What ``worker(rank, world_size, *arguments)`` gave on each rank: a value, `Raised` or `Died`.

    ``timeout`` is the process group's, in seconds; all workers are gone after ``wait`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            target = (inspect.getfile(worker), worker.__name__, rank, world_size, f"{folder}/store", timeout, arguments)
            process = _CONTEXT.Process(target=_run, args=(theirs, *target), daemon=True)
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        deadline = time.monotonic() + wait
        answers = [_answer(pipe, process, deadline) for pipe, process in zip(pipes, processes, strict=True)]
        for process in processes:
            process.join(max(deadline - time.monotonic(), 1))
            if process.is_alive():
                process.kill()
                process.join()
    return answers


def results_of(worker: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 30.0) -> list[Any]:
    """As `outcomes_of`; a worker that raised or died fails the test with its traceback."""
    # a worker that waits for another must be able to say so
    answers = outcomes_of(worker, world_size, *arguments, timeout=timeout, wait=max(120.0, timeout + 30.0))
    wrong = []
    for rank, answer in enumerate(answers):
        if isinstance(answer, Raised):
            wrong.append(f"rank {rank} raised {answer.kind}: {answer.message}\n{answer.trace}")
        if isinstance(answer, Died):
            wrong.append(f"rank {rank} died with exit code {answer.exitcode}")
    # of all: where one failed, the others say no more than that it is gone
    assert not wrong, "\n".join(wrong)
    return answers


def together(world_size: int, *workers: Callable[..., Any], timeout: float = 240.0) -> dict[str, list[Any]]:
    """`results_of` several functions of one file, one after the other on the same processes, by their names."""
    names = [worker.__name__ for worker in workers]
    answers = results_of(_each, world_size, inspect.getfile(workers[0]), names, timeout=timeout)
    return {name: [answer[i] for answer in answers] for i, name in enumerate(names)}


def _each(rank: int, world_size: int, path: str, names: list[str]) -> list[Any]:
    module = _load(path)
    return [getattr(module, name)(rank, world_size) for name in names]


def _load(path: str) -> Any:
    if path == __file__:
        # another copy would have other classes of answers
        return sys.modules[__name__]
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _answer(pipe: multiprocessing.connection.Connection, process: Any, deadline: float) -> Any:
    if not pipe.poll(max(deadline - time.monotonic(), 0)):
        process.kill()
        raise AssertionError(f"{process.name} gave no answer in time: it hangs")
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join(10)
        return Died(process.exitcode)


def _run(
    pipe: multiprocessing.connection.Connection,
    path: str,
    name: str,
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    module = _load(path)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        answer = getattr(module, name)(rank, world_size, *arguments)
    except Exception as error:
        answer = Raised(type(error).__name__, str(error), traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    pipe.close()
    if dist.is_initialized() and not isinstance(answer, Raised):
        dist.destroy_process_group()
