"""Threads that take turns: one runs at a time, until it must wait for another, in an order that never changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

# how long `close` waits for a worker that is in the middle of something
_GRACE_SECONDS = 2.0


class PeerFailedError(RuntimeError):
    """A worker waited for one that raised, or ended, without its part; ``origin`` is what the first one raised."""

    def __init__(self, message: str, origin: str) -> None:
        super().__init__(message)
        self.origin = origin


class Awaited(Protocol):
    """A condition that a worker waits for; printed, it names it."""

    missing: set[int]

    @property
    def is_settled(self) -> bool:
        """Whether waiting is over: nobody is missing, or it can no longer come about."""


class Scheduler:
    """``size`` threads, made once, that run one function at a time and one after the other.

    A worker keeps the turn until it waits or ends; it then goes to the next by rank that can go on, round and round.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # a worker sleeps on its baton, the caller of `run` on home
        self._batons = [_locked() for _ in range(size)]
        self._home, self._dismissal = _locked(), threading.Lock()
        self._job: Callable[[int], Any] | None = None
        self._results: list[Any] = []
        self._errors: dict[int, BaseException] = {}
        self._awaited: list[Awaited | None] = [None] * size
        self._ended = set(range(size))
        self._deadlock: str | None = None
        self._is_closed = False
        # daemons, so that a worker that is stuck does not keep the process from ending
        self._threads = [
            threading.Thread(target=self._serve, args=(rank,), name=f"lioncub-worker-{rank}", daemon=True)
            for rank in range(size)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, job: Callable[[int], Any]) -> tuple[list[Any], dict[int, BaseException]]:
        """Call ``job(rank)`` on every thread; return all results, and the errors by rank.

        Raises RuntimeError when closed and within a run. Whatever interrupts the caller closes the threads.
        """
        if self._is_closed:
            raise RuntimeError("the workers are closed: make new ones")
        if len(self._ended) < self._size:
            raise RuntimeError("run: expected one call at a time, got another before the first has ended")
        self._job, self._results, self._errors, self._deadlock = job, [None] * self._size, {}, None
        self._ended.clear()
        try:
            self._batons[0].release()
            self._home.acquire()
        except BaseException:
            self.close()
            raise
        done = self._results, self._errors
        # else what a job refers to would live until the next one
        self._job, self._results, self._errors = None, [], {}
        return done

    def check(self, rank: int) -> None:
        """Raise RuntimeError unless the calling thread is the worker ``rank``, and not closed."""
        if threading.get_ident() != self._threads[rank].ident:
            raise RuntimeError(
                f"expected messages of simulated worker {rank} from its own function within Workers.run, got one from "
                f"thread {threading.current_thread().name}"
            )
        if self._is_closed:
            raise RuntimeError("the workers were closed")

    def wait(self, rank: int, awaited: Awaited) -> None:
        """Let the others go on until ``awaited`` is settled.

        Raises PeerFailedError where a worker that is missing has ended, RuntimeError where nobody can go on.
        """
        if not awaited.is_settled and self._ended.isdisjoint(awaited.missing):
            self._awaited[rank] = awaited
            self._pass_on(rank)
            self._batons[rank].acquire()
            self._awaited[rank] = None
        if awaited.is_settled:
            return
        self.check(rank)
        if self._deadlock is not None:
            raise RuntimeError(self._deadlock)
        raise self._peer_failed(rank, min(self._ended & awaited.missing), awaited)

    def close(self) -> None:
        """End the threads; what they wait for raises. Nothing happens the second time."""
        self._is_closed = True
        if len(self._ended) == self._size:
            self._dismiss()
        if threading.current_thread() in self._threads:
            # the others can end only when this one has
            return
        deadline = time.monotonic() + _GRACE_SECONDS
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _serve(self, rank: int) -> None:
        while True:
            self._batons[rank].acquire()
            if self._dismissal.locked():
                return
            assert self._job is not None
            try:
                self.check(rank)
                self._results[rank] = self._job(rank)
            except BaseException as error:
                self._errors[rank] = error
            self._ended.add(rank)
            self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        """Give the turn to the next worker that can go on, or back to the caller of `run`."""
        order = [*range(rank + 1, self._size), *range(rank + 1)]
        following = next((peer for peer in order if self._can_go_on(peer)), None)
        if following is not None:
            self._batons[following].release()
        elif len(self._ended) < self._size:
            waiting = {peer: what for peer, what in enumerate(self._awaited) if what is not None}
            self._deadlock = "deadlock: " + "; ".join(
                f"worker {peer} waits for {_names(what.missing)} in {what}" for peer, what in waiting.items()
            )
            self._batons[next(peer for peer in order if peer in waiting)].release()
        else:
            if self._is_closed:
                self._dismiss()
            self._home.release()

    def _can_go_on(self, rank: int) -> bool:
        if rank in self._ended:
            return False
        awaited = self._awaited[rank]
        if awaited is None or awaited.is_settled or self._deadlock is not None or self._is_closed:
            return True
        return not self._ended.isdisjoint(awaited.missing)

    def _peer_failed(self, rank: int, peer: int, awaited: Awaited) -> PeerFailedError:
        error = self._errors.get(peer)
        if isinstance(error, PeerFailedError):
            origin = error.origin
        elif error is not None:
            origin = f"worker {peer} raised {type(error).__name__}: {error}"
        else:
            origin = f"worker {peer} has ended"
        return PeerFailedError(f"worker {rank} waits for {_names(awaited.missing)} in {awaited}, but {origin}", origin)

    def _dismiss(self) -> None:
        # both the closing thread and the last worker may find that all have ended
        if self._dismissal.acquire(blocking=False):
            for baton in self._batons:
                baton.release()


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


def _names(ranks: set[int]) -> str:
    return f"worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
