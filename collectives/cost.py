"""What an algorithm sends and how long it takes: pure functions of message size and world size.

The time is latency per message that waits for another, plus bytes over bandwidth: N - 1 messages follow one another
in a ring all-gather and in an all-to-all. The default link is 1 Gb/s Ethernet with 100 us per message.
"""

from __future__ import annotations

from dataclasses import dataclass

from lioncub.kernels.layout import packed_bytes

ALGORITHMS = ("all_gather", "reduce_scatter")
# words of 8 bytes in front of a chunk on its way back: wire version, status, ties, unanimous votes
RESULT_HEADER_BYTES = 4 * 8


@dataclass(frozen=True)
class Link:
    """A worker's link: seconds per message, bytes per second in each direction."""

    latency_s: float = 100e-6
    bytes_per_s: float = 125e6

    def __post_init__(self) -> None:
        if not self.latency_s >= 0:
            raise ValueError(f"latency_s: expected seconds >= 0, got {self.latency_s}")
        if not self.bytes_per_s > 0:
            raise ValueError(f"bytes_per_s: expected a bandwidth > 0, got {self.bytes_per_s}")


def chunk_bytes(n_bytes: int, world_size: int) -> int:
    """Bytes of the chunk of an ``n_bytes`` message on which one of ``world_size`` workers votes."""
    return packed_bytes(8 * n_bytes, chunks=world_size) // world_size


def bytes_sent(algorithm: str, n_bytes: int, world_size: int, header_bytes: int = 0) -> int:
    """Bytes that each worker sends for a vote on ``n_bytes``, headers included; as many are received.

    all_gather: N - 1 copies of the message. reduce_scatter: N - 1 chunks there, N - 1 voted chunks back.
    Raises ValueError for an unknown algorithm.
    """
    others = world_size - 1
    if algorithm == "all_gather":
        return others * (header_bytes + n_bytes)
    if algorithm == "reduce_scatter":
        return others * (header_bytes + RESULT_HEADER_BYTES + 2 * chunk_bytes(n_bytes, world_size))
    raise ValueError(f"algorithm: expected one of {ALGORITHMS}, got {algorithm!r}")


def predicted_seconds(algorithm: str, n_bytes: int, world_size: int, link: Link, header_bytes: int = 0) -> float:
    """Latency and transfer time of one vote on an idle link; votes themselves are not counted."""
    phases = {"all_gather": 1, "reduce_scatter": 2}
    sent = bytes_sent(algorithm, n_bytes, world_size, header_bytes)
    return phases[algorithm] * (world_size - 1) * link.latency_s + sent / link.bytes_per_s


def choose(algorithm: str, n_bytes: int, world_size: int, link: Link, header_bytes: int = 0) -> str:
    """``algorithm`` itself, or for "auto" the one predicted to be fastest (the first where they are equal)."""
    if algorithm in ALGORITHMS:
        return algorithm
    if algorithm != "auto":
        raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
    return min(ALGORITHMS, key=lambda name: predicted_seconds(name, n_bytes, world_size, link, header_bytes))
