"""Signals that ask to stop, as an exception that unwinds what has been built."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked to stop; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted on SIGINT, SIGTERM and SIGHUP, also where a shell had them ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with _handled(stop):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore these signals: for cleaning up."""
    with _handled(signal.SIG_IGN):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
