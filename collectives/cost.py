"""How long a vote takes, and so which way is cheapest: the model of links, the choice, the size of buckets.

`LinkCosts` knows a latency per message and a bandwidth; `lioncub.collectives.profile` knows what was measured. Both
are `Costs`. All workers come to the same choice, since they ask the same pure functions with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.topology import Topology
from lioncub.collectives.traffic import (
    ALGORITHMS,
    RESULT_HEADER_BYTES,
    Leg,
    bytes_sent,
    candidates,
    check_possible,
    chunk_bytes,
    dense_legs,
    legs,
    node_bytes,
    ring_all_reduce_bytes,
    traffic,
)

__all__ = [
    "ALGORITHMS",
    "RESULT_HEADER_BYTES",
    "Costs",
    "Link",
    "LinkCosts",
    "best_bucket_bytes",
    "bytes_sent",
    "candidates",
    "choose",
    "chunk_bytes",
    "default_costs",
    "ring_all_reduce_bytes",
    "traffic",
]

# of a link's bytes per second, measured on Gloo with 4 workers at 100 Mb/s; taken to hold for other backends as well
EFFICIENCY = {"ring": 0.94, "exchange": 0.92, "sum": 0.99}
# a round of an exchange ends when a thread has woken up, which takes up to a millisecond where processors are few, and
# saves about a tenth of the time on the wire (Gloo, 4 workers on 2 cores; 100 Mb/s to 10 Gb/s)
ROUND_SECONDS = 10e-3
BUCKET_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Link:
    """A link: seconds per message, bytes per second in each direction."""

    latency_s: float = 100e-6
    bytes_per_s: float = 125e6

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < float("inf"):
            raise ValueError(f"latency_s: expected seconds >= 0, got {self.latency_s}")
        if not 0 < self.bytes_per_s < float("inf"):
            raise ValueError(f"bytes_per_s: expected a bandwidth > 0, got {self.bytes_per_s}")

    def __str__(self) -> str:
        bits = 8 * self.bytes_per_s
        speed = f"{bits / 1e9:.3g} Gb/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mb/s"
        return f"{speed}, {1e6 * self.latency_s:,.0f} us per message"


class Costs(Protocol):
    """Predicted times of votes of one group. ``source`` says in one line what they are based on."""

    @property
    def topology(self) -> Topology:
        """The group's nodes."""

    @property
    def source(self) -> str:
        """What the times are based on."""

    @property
    def is_measured(self) -> bool:
        """Whether they are based on a probe of this group."""

    def seconds(self, algorithm: str, n_bytes: int, header_bytes: int = 0, codes: Codes = VOTES) -> float:
        """Time of one vote on ``8 * n_bytes`` codes. Raises ValueError for an unknown or impossible algorithm."""


@dataclass(frozen=True)
class LinkCosts:
    """Times from the speed of links alone: latency of messages that wait for each other, bytes over bandwidth.

    ``inter`` is a node's link to other nodes, shared by its workers; ``intra`` a worker's link inside its node. Votes
    themselves are not counted.
    """

    topology: Topology
    inter: Link
    intra: Link
    source: str = "links as given"
    is_measured: bool = False

    def seconds(self, algorithm: str, n_bytes: int, header_bytes: int = 0, codes: Codes = VOTES) -> float:
        """See `Costs`."""
        return self.seconds_of(legs(algorithm, n_bytes, self.topology, header_bytes, codes))

    def dense_seconds(self, n_bytes: int) -> float:
        """Time of an all-reduce of ``n_bytes`` of floats: by a flat ring or in two levels, whichever is faster."""
        return min(map(self.seconds_of, dense_legs(n_bytes, self.topology)))

    def seconds_of(self, sequence: Iterable[Leg]) -> float:
        """Time of collectives one after the other."""
        return sum(self._leg_seconds(leg) for leg in sequence)

    def _leg_seconds(self, leg: Leg) -> float:
        shape = self.topology
        local = max(map(len, shape.nodes))
        size = {"flat": shape.workers, "intra": local, "inter": shape.n_nodes}[leg.level]
        inside = 0 if leg.level == "inter" or local == 1 else leg.n_bytes
        if inside and leg.level == "flat" and leg.pattern == "exchange":
            inside = inside // (size - 1) * (local - 1)
        # both kinds of links are in use at the same time
        transfer = max(node_bytes(leg, shape) / self.inter.bytes_per_s, inside / self.intra.bytes_per_s)
        slow = self.intra if leg.level == "intra" or shape.n_nodes == 1 else self.inter
        rounds = (size - 1) * (2 if leg.pattern == "sum" else 1)
        return rounds * slow.latency_s + transfer / EFFICIENCY[leg.pattern]


# what is assumed of a group that nobody has measured: (between nodes, inside a node)
_DEFAULT_LINKS = {
    "gloo": (Link(300e-6, 125e6), Link(200e-6, 1.25e9)),
    "other": (Link(30e-6, 1.25e9), Link(10e-6, 50e9)),
}


def default_costs(topology: Topology, backend: str) -> LinkCosts:
    """Stated defaults, for a group that has not been probed: 1 Gb/s Ethernet for Gloo, 10 Gb/s for other backends."""
    inter, intra = _DEFAULT_LINKS.get(backend, _DEFAULT_LINKS["other"])
    source = f"assumed for {backend}, not measured: {inter} between nodes"
    if topology.n_nodes < topology.workers:
        source += f"; {intra} inside"
    return LinkCosts(topology, inter, intra, source)


def choose(algorithm: str, n_bytes: int, costs: Costs, header_bytes: int = 0, codes: Codes = VOTES) -> str:
    """``algorithm`` itself, or for "auto" the one predicted to be fastest (the first where they are equal).

    Raises ValueError for an unknown algorithm, for "hierarchical" where the nodes do not allow it, and where no field
    holds the sum of ``codes``.
    """
    if not codes.are_votes:
        codes.field_bits(costs.topology.workers)
    if algorithm != "auto":
        check_possible(algorithm, costs.topology)
        return algorithm
    possible = candidates(costs.topology, codes)
    return min(possible, key=lambda name: costs.seconds(name, n_bytes, header_bytes, codes))


def rounds_pay(seconds: float, workers: int) -> bool:
    """Whether a reduce-scatter vote that takes ``seconds`` is better sent in 2 (N - 1) rounds than all at once."""
    return seconds > 2 * (workers - 1) * ROUND_SECONDS


def best_bucket_bytes(
    group_bytes: Sequence[int], algorithm: str, costs: Costs, *, overlap: bool, largest: int = 16 * 2**20
) -> int:
    """The size of buckets, a multiple of 8 bytes, by which the votes of a step take least time.

    Args:
        group_bytes: packed bytes of the parameters that may share buckets, one number for each such set.
        algorithm: how votes travel, or "auto".
        costs: the model.
        overlap: whether votes travel while gradients are being computed. Then what is waited for is about the last
            bucket's vote, while each further bucket costs a latency; else the step waits for all votes, of which as few
            as possible share the link best, whatever single votes were measured to take.
        largest: upper limit in bytes.
    """
    limit, total = max(largest // 8 * 8, 8), sum(group_bytes)
    sizes = dict.fromkeys(min(limit, max(8, -(-total // (8 * count)) * 8)) for count in BUCKET_COUNTS)
    if algorithm != "auto":
        check_possible(algorithm, costs.topology)
    if not overlap:
        return max(sizes)
    return min(sizes, key=lambda size: _seconds_of_step(group_bytes, size, algorithm, costs))


def _seconds_of_step(group_bytes: Sequence[int], size: int, algorithm: str, costs: Costs) -> float:
    whole = sum(n_bytes // size for n_bytes in group_bytes)
    rests = [n_bytes % size for n_bytes in group_bytes if n_bytes % size]
    messages = [(size, whole)] * (whole > 0) + [(rest, 1) for rest in rests]
    if not messages:
        return 0.0
    latency = sum(count * costs.seconds(choose(algorithm, n_bytes, costs), 0) for n_bytes, count in messages)
    return latency + _seconds(max(n_bytes for n_bytes, _ in messages), algorithm, costs)


def _seconds(n_bytes: int, algorithm: str, costs: Costs) -> float:
    return costs.seconds(choose(algorithm, n_bytes, costs), n_bytes)
