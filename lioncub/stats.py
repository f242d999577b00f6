"""What `LionCub.stats` reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BucketStats:
    """One bucket: parameters' elements, the algorithm that carries it, bytes sent per step, seconds of its exchange.

    ``compression`` is the compression's text.
    """

    elements: int
    algorithm: str
    bytes_sent: int
    seconds: float
    compression: str


@dataclass(frozen=True)
class Stats:
    """Figures of one worker; bytes, seconds and fractions are those of the last step.

    ``communication_seconds`` is the time that the host spent starting and awaiting collectives, on whatever thread;
    ``exposed_seconds`` that part of it, with the votes in between, for which `step` waited. ``tied`` and ``unanimous``
    are fractions of all elements. Bytes include the headers; ``sync_bytes_sent`` of them were for synchronizing
    momentum and measuring its drift. ``drift`` is the variance of momentum over workers relative to its mean square,
    by name of parameter, as last measured, or None.
    """

    steps: int
    skipped_steps: int
    bytes_sent_per_step: int
    sync_bytes_sent: int
    communication_seconds: float
    exposed_seconds: float
    tied: float
    unanimous: float
    drift: dict[str, float] | None
    buckets: tuple[BucketStats, ...]
