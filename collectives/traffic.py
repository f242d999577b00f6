"""What an algorithm sends: pure functions of message size and topology, shared by votes, cost model and tests.

H bytes of header, b*B of message (B: one bit per code), N workers on M nodes of L, C = chunk_bytes(B, N), r bits of a
code of the result. One worker sends, per vote:

    all_gather      (N-1) * (H + b*B)
    reduce_scatter  (N-1) * (H + b*C  +  32 + r*C)
    hierarchical    inside a node (L-1) * (H + M*b*C)  +  (L-1) * M*(32 + r*C),
                    between nodes (M-1) * (L*H + P*C  +  32 + r*C)
    all_reduce      (N-1) * H  +  2*(N-1)/N * B*f, rounded up

P is the planes of a count 0..L of signs, for other results the bits of a field that a sum of L codes fits into; f those
for a sum of N.
"""

from __future__ import annotations

from dataclasses import dataclass

from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.topology import Topology
from lioncub.kernels.layout import counter_planes

ALGORITHMS = ("all_gather", "reduce_scatter", "hierarchical", "all_reduce")
# words of 8 bytes in front of a chunk on its way back: wire version, status, ties, unanimous votes
RESULT_HEADER_BYTES = 4 * 8
# headers, chunks and so all rows of ballots are multiples of it: a GPU then loads 128 bits at a time
ALIGNMENT = 16


@dataclass(frozen=True)
class Leg:
    """One collective of an algorithm: ``n_bytes`` sent by each worker, to the others of its ``level``.

    ``level`` is "flat" (all workers), "intra" (those of a node) or "inter" (one of each node). ``pattern`` is "ring"
    (all-gather), "exchange" (all-to-all) or "sum" (native all-reduce, taken for a ring).
    """

    level: str
    pattern: str
    n_bytes: int


def chunk_bytes(n_bytes: int, world_size: int) -> int:
    """Bytes of the chunk of an ``n_bytes`` message on which one of ``world_size`` workers votes."""
    return aligned(-(-n_bytes // world_size))


def aligned(n_bytes: int) -> int:
    """``n_bytes`` rounded up to a multiple of `ALIGNMENT`."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def ring_all_reduce_bytes(elements: int, workers: int, bytes_per_element: int = 4) -> int:
    """Bytes that each worker sends in a ring all-reduce: 2 (N-1)/N of the message, rounded up to a byte."""
    return -(-2 * (workers - 1) * elements * bytes_per_element // workers)


def candidates(topology: Topology, codes: Codes = VOTES) -> tuple[str, ...]:
    """The algorithms that can carry ``codes`` on ``topology``, in the order of `ALGORITHMS`."""
    possible = {"all_gather", "reduce_scatter"}
    if topology.is_two_level:
        possible.add("hierarchical")
    try:
        codes.field_bits(topology.workers)
    except ValueError:
        # no field is wide enough for the sum of so many codes; majorities are counted in bit planes
        possible = possible if codes.are_votes else set()
        return tuple(name for name in ALGORITHMS if name in possible)
    return tuple(name for name in ALGORITHMS if name in possible | {"all_reduce"})


def legs(
    algorithm: str,
    n_bytes: int,
    topology: Topology,
    header_bytes: int = 0,
    codes: Codes = VOTES,
) -> tuple[Leg, ...]:
    """The collectives of one vote on ``8 * n_bytes`` codes, in their order.

    Raises ValueError for an unknown algorithm, and for one that is impossible on ``topology``.
    """
    check_possible(algorithm, topology)
    workers, others = topology.workers, topology.workers - 1
    chunk = chunk_bytes(n_bytes, workers)
    if algorithm == "all_gather":
        return (Leg("flat", "ring", others * (header_bytes + n_bytes * codes.bits)),)
    answer = RESULT_HEADER_BYTES + chunk * codes.result_bits(workers)
    if algorithm == "reduce_scatter":
        there = others * (header_bytes + chunk * codes.bits)
        return (Leg("flat", "exchange", there), Leg("flat", "ring", others * answer))
    if algorithm == "all_reduce":
        fields = n_bytes * codes.field_bits(workers)
        return (
            Leg("flat", "ring", others * header_bytes),
            Leg("flat", "sum", ring_all_reduce_bytes(fields, workers, bytes_per_element=1)),
        )
    nodes, local = topology.n_nodes, topology.local_size
    planes = count_bits(local, codes)
    return (
        Leg("intra", "exchange", (local - 1) * (header_bytes + nodes * chunk * codes.bits)),
        Leg("inter", "exchange", (nodes - 1) * (local * header_bytes + planes * chunk)),
        Leg("inter", "ring", (nodes - 1) * answer),
        Leg("intra", "ring", (local - 1) * nodes * answer),
    )


def count_bits(local_size: int, codes: Codes) -> int:
    """Bits per code that a node of ``local_size`` workers sends to others: of a count of signs, or of a sum."""
    return counter_planes(local_size) if codes.are_votes else codes.field_bits(local_size)


def dense_legs(n_bytes: int, topology: Topology) -> tuple[tuple[Leg, ...], ...]:
    """Ways of a dense all-reduce of ``n_bytes``: a flat ring; on two levels also reduce-scatter, sum, all-gather."""
    flat = (Leg("flat", "sum", ring_all_reduce_bytes(n_bytes, topology.workers, bytes_per_element=1)),)
    if not topology.is_two_level:
        return (flat,)
    local = topology.local_size
    shard = -(-n_bytes // local)
    inside = Leg("intra", "ring", (local - 1) * shard)
    between = Leg("inter", "sum", ring_all_reduce_bytes(shard, topology.n_nodes, bytes_per_element=1))
    return flat, (inside, between, inside)


def traffic(
    algorithm: str,
    n_bytes: int,
    topology: Topology | int,
    header_bytes: int = 0,
    codes: Codes = VOTES,
) -> dict[str, int]:
    """Bytes that each worker sends per vote by level: "flat", or "intra" and "inter". A number of workers means flat.

    As many are received. Raises ValueError for an unknown algorithm, and for one that is impossible on ``topology``.
    """
    levels: dict[str, int] = {}
    shape = Topology.flat(topology) if isinstance(topology, int) else topology
    for leg in legs(algorithm, n_bytes, shape, header_bytes, codes):
        levels[leg.level] = levels.get(leg.level, 0) + leg.n_bytes
    return levels


def bytes_sent(
    algorithm: str,
    n_bytes: int,
    topology: Topology | int,
    header_bytes: int = 0,
    codes: Codes = VOTES,
) -> int:
    """Bytes that each worker sends for a vote on ``8 * n_bytes`` codes, headers included: the sum of `traffic`."""
    return sum(traffic(algorithm, n_bytes, topology, header_bytes, codes).values())


def node_bytes(leg: Leg, topology: Topology) -> int:
    """Bytes that the busiest node sends to other nodes in a leg.

    A ring crosses a node's link once per direction, an exchange with every message between two nodes, and the groups
    of the inter level all at once. Ranks of a node are taken to be neighbours in the ring.
    """
    if topology.n_nodes == 1 or leg.level == "intra":
        return 0
    if leg.level == "inter":
        return topology.local_size * leg.n_bytes
    if leg.pattern != "exchange":
        return leg.n_bytes
    message = leg.n_bytes // (topology.workers - 1)
    return message * max(len(node) * (topology.workers - len(node)) for node in topology.nodes)


def check_possible(algorithm: str, topology: Topology) -> None:
    """Raise ValueError unless ``algorithm`` is known and possible on ``topology``."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "hierarchical" and not topology.is_two_level:
        raise ValueError(
            "algorithm: 'hierarchical' expected several nodes with equally many workers, more than one on each, "
            f"got {describe(topology)}"
        )


def describe(topology: Topology) -> str:
    """Nodes and their sizes in words, e.g. ``2 nodes of 4 workers``."""
    nodes = f"{topology.n_nodes} node{'s' * (topology.n_nodes != 1)}"
    if topology.is_even:
        return f"{nodes} of {topology.local_size} worker{'s' * (topology.local_size != 1)}"
    return f"{nodes} of {', '.join(str(len(node)) for node in topology.nodes)} workers"
