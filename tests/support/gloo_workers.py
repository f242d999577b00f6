"""Runs functions of a test file on N real Gloo processes: `on_ranks` a whole test, `results_of` any function."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import inspect
import multiprocessing as mp
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
        "torch._dynamo.testing",
        "lioncub.kernels.numba_cpu",
        "lioncub.kernels.triton_gpu",
        "lioncub",
        "pytest",
        "warm_kernels",
    ]
)


@dataclass(frozen=True)
class Raised:
    """An exception in a worker."""

    kind: str
    message: str
    trace: str

    def __str__(self) -> str:
        return f"raised {self.kind}: {self.message}\n{self.trace}"


@dataclass(frozen=True)
class Died:
    """A worker that ended without an answer."""

    exitcode: int | None

    def __str__(self) -> str:
        return f"died with exit code {self.exitcode}"


def said_by(call: Callable[[], Any]) -> str:
    """The kind and text of the exception that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# in a worker


def everyone(value: Any) -> list[Any]:
    """The values of all ranks, on each of them."""
    import torch.distributed as dist

    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def same_on_all(value: Any) -> bool:
    return all(other == value for other in everyone(value))


def shared_folder() -> Path:
    """A folder of this run, the same one on all ranks, which is removed after it."""
    assert _folder is not None
    return _folder


_folder: Path | None = None


# in the test process


def outcomes_of(
    worker: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 30.0, wait: float = 120.0
) -> list[Any]:
    """What ``worker(rank, world_size, *arguments)`` returned on each rank: a value, `Raised` or `Died`.

    ``timeout`` is the process group's, in seconds; all workers are gone after ``wait`` seconds.
    """
    # the server looks for modules here alone
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            mine, theirs = _CONTEXT.Pipe(duplex=False)
            target = (inspect.getfile(worker), worker.__name__, rank, world_size, folder, timeout, arguments)
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
    # of all: where one failed, the others say no more than that it is gone
    wrong = [f"rank {rank} {answer}" for rank, answer in enumerate(answers) if isinstance(answer, Raised | Died)]
    assert not wrong, "\n".join(wrong)
    return answers


def on_ranks(*world_sizes: int, alone: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of ``worker(rank, world_size, ...)``, whose assertions run on each of N processes.

    Tests of one file for the same N share the processes, one after the other, unless they are ``alone``: one that
    ends a process or a group, or looks at all threads, must be.
    """

    def decorate(worker: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(worker)
        def test(request: pytest.FixtureRequest, **_: Any) -> None:
            wrong = _wrong(request)
            assert not wrong, wrong

        parameters = list(inspect.signature(worker).parameters.values())[1:]
        first = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        test.__signature__ = inspect.Signature([first, *keywords])  # type: ignore[attr-defined]
        test.worker, test.is_alone = worker, alone  # type: ignore[attr-defined]
        return pytest.mark.parametrize("world_size", world_sizes)(test)

    return decorate


# by the test's id: "" or what went wrong
_found: dict[str, str] = {}


def _wrong(request: pytest.FixtureRequest) -> str:
    item = request.node
    if item.nodeid not in _found:
        chosen = [item]
        if not item.function.is_alone:
            chosen = [other for other in request.session.items if _group_of(other) == _group_of(item)]
            chosen = [other for other in chosen if other.nodeid not in _found]
        calls = [(other.function.__name__, dict(other.callspec.params)) for other in chosen]
        size = item.callspec.params["world_size"]
        answers = outcomes_of(_each, size, str(item.path), calls, timeout=240.0, wait=270.0)
        # tests after the first that fails get processes of their own
        done = min((len(answer) for answer in answers if isinstance(answer, list)), default=1)
        for i, other in enumerate(chosen[:done]):
            _found[other.nodeid] = _summary(answers, i)
            if _found[other.nodeid]:
                break
    return _found[item.nodeid]


def _group_of(item: Any) -> Any:
    function = getattr(item, "function", None)
    if getattr(function, "is_alone", True):
        return item.nodeid
    return item.path, item.callspec.params["world_size"]


def _summary(answers: list[Any], i: int) -> str:
    outcomes = [answer[i] if isinstance(answer, list) else answer for answer in answers]
    return "\n".join(f"rank {rank} {outcome}" for rank, outcome in enumerate(outcomes) if outcome is not None)


def _each(rank: int, world_size: int, path: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Raised | None]:
    import torch
    import torch.distributed as dist

    module, found = _load(path), list[Raised | None]()
    for name, arguments in calls:
        before = dict(os.environ), Path.cwd(), torch.get_default_dtype()
        try:
            getattr(module, name).worker(rank, **arguments)
            assert (dict(os.environ), Path.cwd(), torch.get_default_dtype()) == before, f"{name} left changes behind"
            if name != calls[-1][0]:
                dist.barrier()
        except Exception as error:
            return [*found, Raised(type(error).__name__, str(error), traceback.format_exc())]
        found.append(None)
    return found


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
    folder: str,
    timeout: float,
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    global _folder
    _folder = Path(folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    module = _load(path)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
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
