"""Many workers in one process: the optimizer, its collectives and kernels unchanged, for studies on one machine.

    with lioncub.simulate.Workers(8) as workers:
        optimizers = workers.run(lambda rank, group: LionCub(models[rank].parameters(), process_group=group))
        for batch in data:
            for rank, model in enumerate(models):
                loss_of(model, batch[rank]).backward()
            workers.run(lambda rank, group: optimizers[rank].step())

Steps are bit for bit those of as many processes.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import TypeVar

import torch

from lioncub.arguments import check_count
from lioncub.collectives.scheduler import PeerFailedError
from lioncub.collectives.simulated import SimulatedProcessGroup, World

__all__ = ["SimulatedProcessGroup", "Workers"]

Result = TypeVar("Result")


class Workers:
    """``size`` simulated workers. Each has its own thread, but only one runs at a time, in an order that is always
    the same: a worker goes on until it must wait for another. `torch.distributed` need not be initialised.

    Args:
        size: number of workers, at least 1.
        local_size: workers per simulated node, consecutive ranks; all share one node unless given.

    A context manager; `close` ends the threads. Raises ValueError for impossible arguments.
    """

    def __init__(self, size: int, *, local_size: int | None = None) -> None:
        check_count("size", size, "a number of workers")
        if local_size is not None and size % check_count("local_size", local_size, "a number of workers"):
            raise ValueError(f"local_size: expected a divisor of the {size} workers, got {local_size}")
        self._world = World([f"virtual-{rank // (local_size or size)}" for rank in range(size)])
        self.groups = [self._world.group(rank) for rank in range(size)]
        # the threads refer to the turns alone, so that workers nobody closed end with their last reference
        self._finalizer = weakref.finalize(self, self._world.scheduler.close)

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.groups)

    def run(self, function: Callable[[int, SimulatedProcessGroup], Result]) -> list[Result]:
        """Call ``function(rank, group)`` as every worker, and return the results in rank order.

        Within it, ``group`` is the worker's process group. It runs with the caller's grad mode and current CUDA device
        and stream; other state that torch keeps by thread (autocast, default device) is that of a fresh thread.

        Where workers raise, their lowest rank's error is raised, but not one that a worker got only because a peer had
        failed; a note tells the others'. Calls in progress are dropped, so that workers can be run again. A worker
        that waits for one that has ended gets RuntimeError, as do all where nobody can go on.
        Raises RuntimeError after `close` (which an interrupt of the caller implies).
        """
        context = _Context()

        def job(rank: int) -> Result:
            with context.entered():
                return function(rank, self.groups[rank])

        results, errors = self._world.scheduler.run(job)
        if errors:
            self._world.drop_messages("the call was dropped because a worker failed in the same run")
            raise _first_error(errors)
        return results

    def close(self) -> None:
        """End the threads."""
        self._finalizer()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Context:
    """The thread-local settings of torch in the caller's thread."""

    def __init__(self) -> None:
        self._grad = torch.is_grad_enabled()
        has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        self._stream = torch.cuda.current_stream() if has_cuda else None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Apply them to the calling thread."""
        with torch.set_grad_enabled(self._grad):
            if self._stream is None:
                yield
                return
            # a stream brings its device along
            with torch.cuda.stream(self._stream):
                yield


def _first_error(errors: Mapping[int, BaseException]) -> BaseException:
    """Return the error to raise, with a note of who raised what."""
    ranks = sorted(errors)
    first = next((rank for rank in ranks if not isinstance(errors[rank], PeerFailedError)), ranks[0])
    raised: dict[str, list[int]] = {}
    for rank in ranks:
        what = "" if str(errors[rank]) == str(errors[first]) else f" {type(errors[rank]).__name__}: {errors[rank]}"
        raised.setdefault(what or " this", []).append(rank)
    chosen = errors[first]
    for what, by in raised.items():
        chosen.add_note(f"raised by simulated worker {', '.join(map(str, by))}:{what}")
    return chosen
