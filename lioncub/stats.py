"""What `LionCub.stats` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BucketStats:
    """One bucket: parameters' elements, the algorithm that carries it, bytes sent per step, seconds of its exchange."""

    elements: int
    algorithm: str
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class Stats:
    """Figures of one worker; bytes, seconds and fractions are those of the last step.

    ``communication_seconds`` is the time that the host spent starting and awaiting collectives, on whatever thread;
    ``exposed_seconds`` that part of it, with the votes in between, for which `step` waited. ``tied`` and ``unanimous``
    are fractions of all elements. Bytes include the headers.
    """

    steps: int
    skipped_steps: int
    bytes_sent_per_step: int
    communication_seconds: float
    exposed_seconds: float
    tied: float
    unanimous: float
    buckets: tuple[BucketStats, ...]
