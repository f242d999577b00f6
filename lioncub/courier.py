"""A thread that carries messages while backward goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from lioncub.collectives import Voter
from lioncub.collectives.average import Averaging
from lioncub.collectives.exchange import Exchange
from lioncub.voting import Mail

# what is done next with a vote whose headers are known, and the future of what that gives
Follower = Callable[[Exchange], Averaging | None]
Followed = Future[Averaging | None] | None


class Courier:
    """Moves each message to its last phase, always in the order they were given.

    On a CPU a message's first phase starts at once, since it may be on its way while the courier waits for an earlier
    one; later phases are point-to-point messages with tags of their own, whose order does not matter. On a GPU all
    phases start on the courier's stream, one message after the other, so that collectives come in the same order on
    all workers, whenever each gets round to them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # a daemon, so that a worker whose peers are gone can still end
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lioncub-courier", daemon=True)
        self._thread.start()

    def send(self, voter: Voter, mail: Mail, then: Follower | None = None) -> tuple[Future[Exchange], Followed]:
        """Start a vote; the first future is done when only the last phase is under way.

        ``then`` is called with the vote when its headers are known, before or after other votes' phases; the second
        future has what it returns, and is None without it.
        """
        vote: Future[Exchange] = Future()
        followed: Followed = None if then is None else Future()
        if self._stream is None:
            exchange = voter.start(mail.packed, mail.header, mail.status)
            self._jobs.put(lambda: self._finish(vote, lambda: _move(exchange), followed, then))
        else:
            encoded = torch.cuda.current_stream(mail.packed.device).record_event()
            self._jobs.put(lambda: self._finish(vote, lambda: self._carry(voter, mail, encoded), followed, then))
        return vote, followed

    def _finish(
        self,
        vote: Future[Exchange],
        job: Callable[[], Exchange],
        followed: Followed,
        then: Follower | None,
    ) -> None:
        _fulfil(vote, job)
        if followed is None or then is None:
            return
        if vote.exception() is not None:
            followed.set_result(None)
        elif self._stream is None:
            # votes that are waiting go first: their order does not matter, and a step needs them before averages
            self._jobs.put(lambda: _fulfil(followed, lambda: then(vote.result())))
        else:
            with torch.cuda.stream(self._stream):
                _fulfil(followed, lambda: then(vote.result()))

    def close(self) -> None:
        """End the thread when it has nothing left to do."""
        self._jobs.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def join_stream(self) -> None:
        """Make the current stream wait for what has been sent so far; nothing to do on a CPU."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _carry(self, voter: Voter, mail: Mail, encoded: Any) -> Exchange:
        with torch.cuda.stream(self._stream):
            assert self._stream is not None
            self._stream.wait_event(encoded)
            return _move(voter.start(mail.packed, mail.header, mail.status))


def _move(exchange: Exchange) -> Exchange:
    while exchange.advance():
        pass
    return exchange


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # else the message, and its gradients, would live on until the next one comes
        del job


def _fulfil(future: Future[Any], job: Callable[[], Any]) -> None:
    try:
        future.set_result(job())
    except Exception as error:
        future.set_exception(error)
