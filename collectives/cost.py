"""The cost model: bytes and seconds of every algorithm over two links, the choice of algorithm, the size of buckets.

B bytes of one bit per code, b bits per code, N ranks on M nodes of L, C = chunk_bytes(B, N), r bits of a code of the
result. One rank sends, per vote:

    all_gather      (N-1) * b*B
    reduce_scatter  (N-1) * (b*C  +  16 + r*C)
    hierarchical    inside a node (L-1) * M*b*C  +  (L-1) * M*(16 + r*C),
                    between nodes (M-1) * (P*C  +  16 + r*C)
    all_reduce      2*(N-1)/N * B*f, rounded up

P is the planes of a count 0..L of signs, for other results the bits of a field that a sum of L codes fits into; f those
for a sum of N. All ranks come to the same choice, since they evaluate the same pure functions with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lioncub.collectives.codes import VOTES, CodeFormat
from lioncub.collectives.groups import Topology
from lioncub.kernels.layout import counter_planes

ALGORITHMS = ("all_gather", "reduce_scatter", "hierarchical", "all_reduce")
# numbers of ties and of unanimous votes in front of a voted chunk, int64 each
COUNT_BYTES = 16
# chunks and so all rows of codes are multiples of it: a GPU then loads 128 bits at a time
ALIGNMENT = 16
# of a link's bytes per second, measured on Gloo with 4 workers at 100 Mb/s; taken to hold for other backends as well
EFFICIENCY = {"ring": 0.94, "exchange": 0.92, "sum": 0.99}
# a round of a pairwise exchange ends when a thread has woken up, which takes up to a millisecond where processors are
# few, and saves about a tenth of the time on the wire (Gloo, 4 workers on 2 cores; 100 Mb/s to 10 Gb/s)
ROUND_SECONDS = 10e-3
BUCKET_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


@dataclass(frozen=True)
class Phase:
    """One collective of an algorithm: ``n_bytes`` sent by each rank, to the others of its ``level``.

    ``level`` is "flat" (all ranks), "intra" (those of a node) or "inter" (one of each node). ``pattern`` is "ring"
    (all-gather), "exchange" (all-to-all) or "sum" (native all-reduce, taken for a ring).
    """

    level: str
    pattern: str
    n_bytes: int


def aligned(n_bytes: int) -> int:
    """Round ``n_bytes`` up to a multiple of `ALIGNMENT`."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def chunk_bytes(n_bytes: int, world_size: int) -> int:
    """Return the bytes of the chunk of an ``n_bytes`` message on which one of ``world_size`` ranks votes."""
    return aligned(-(-n_bytes // world_size))


def count_bits(local_size: int, form: CodeFormat) -> int:
    """Return the bits per code that a node of ``local_size`` ranks sends to others: of a count, or of a sum."""
    return counter_planes(local_size) if form.are_votes else form.field_bits(local_size)


def ring_all_reduce_bytes(elements: int, workers: int, bytes_per_element: int = 4) -> int:
    """Return the bytes that each rank sends in a ring all-reduce: 2 (N-1)/N of the message, rounded up to a byte."""
    return -(-2 * (workers - 1) * elements * bytes_per_element // workers)


def candidates(topology: Topology, form: CodeFormat = VOTES) -> tuple[str, ...]:
    """Return the algorithms that can carry ``form`` on ``topology``, in the order of `ALGORITHMS`."""
    possible = {"all_gather", "reduce_scatter", "all_reduce"}
    if topology.is_two_level:
        possible.add("hierarchical")
    try:
        form.field_bits(topology.workers)
    except ValueError:
        # no field is wide enough for the sum of so many codes; majorities are counted in bit planes
        possible = possible - {"all_reduce"} if form.are_votes else set()
    return tuple(name for name in ALGORITHMS if name in possible)


def check_possible(algorithm: str, topology: Topology) -> None:
    """Raise ValueError unless ``algorithm`` is known and possible on ``topology``."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm: expected one of {('auto', *ALGORITHMS)}, got {algorithm!r}")
    if algorithm == "hierarchical" and not topology.is_two_level:
        raise ValueError(
            "algorithm: 'hierarchical' expected several nodes with equally many workers, more than one on each, "
            f"got {topology.describe()}"
        )


def phases(algorithm: str, n_bytes: int, topology: Topology, form: CodeFormat = VOTES) -> tuple[Phase, ...]:
    """Return the collectives of one vote on ``8 * n_bytes`` codes, in their order.

    Raises ValueError for an unknown algorithm, and for one that is impossible on ``topology``.
    """
    check_possible(algorithm, topology)
    workers, others = topology.workers, topology.workers - 1
    chunk = chunk_bytes(n_bytes, workers)
    if algorithm == "all_gather":
        return (Phase("flat", "ring", others * n_bytes * form.bits),)
    if algorithm == "all_reduce":
        fields = n_bytes * form.field_bits(workers)
        return (Phase("flat", "sum", ring_all_reduce_bytes(fields, workers, bytes_per_element=1)),)
    reply = COUNT_BYTES + chunk * form.result_bits(workers)
    if algorithm == "reduce_scatter":
        return (Phase("flat", "exchange", others * chunk * form.bits), Phase("flat", "ring", others * reply))
    nodes, local = topology.n_nodes, topology.local_size
    return (
        Phase("intra", "exchange", (local - 1) * nodes * chunk * form.bits),
        Phase("inter", "exchange", (nodes - 1) * count_bits(local, form) * chunk),
        Phase("inter", "ring", (nodes - 1) * reply),
        Phase("intra", "ring", (local - 1) * nodes * reply),
    )


def dense_phases(n_bytes: int, topology: Topology) -> tuple[tuple[Phase, ...], ...]:
    """Return ways of a dense all-reduce: a flat ring; on two levels also reduce-scatter, sum, all-gather."""
    flat = (Phase("flat", "sum", ring_all_reduce_bytes(n_bytes, topology.workers, bytes_per_element=1)),)
    if not topology.is_two_level:
        return (flat,)
    local = topology.local_size
    shard = -(-n_bytes // local)
    inside = Phase("intra", "ring", (local - 1) * shard)
    between = Phase("inter", "sum", ring_all_reduce_bytes(shard, topology.n_nodes, bytes_per_element=1))
    return flat, (inside, between, inside)


def bytes_by_level(algorithm: str, n_bytes: int, topology: Topology | int, form: CodeFormat = VOTES) -> dict[str, int]:
    """Return the bytes that each rank sends per vote by level: "flat", or "intra" and "inter".

    As many are received. A number of ranks means a flat topology. Raises ValueError as `phases`.
    """
    levels: dict[str, int] = {}
    shape = Topology.flat(topology) if isinstance(topology, int) else topology
    for phase in phases(algorithm, n_bytes, shape, form):
        levels[phase.level] = levels.get(phase.level, 0) + phase.n_bytes
    return levels


def bytes_sent(algorithm: str, n_bytes: int, topology: Topology | int, form: CodeFormat = VOTES) -> int:
    """Return the bytes that each rank sends for a vote on ``8 * n_bytes`` codes: the sum of `bytes_by_level`."""
    return sum(bytes_by_level(algorithm, n_bytes, topology, form).values())


def node_bytes(phase: Phase, topology: Topology) -> int:
    """Return the bytes that the busiest node sends to other nodes in a phase.

    A ring crosses a node's link once per direction, an exchange with every message between two nodes, and the groups
    of the inter level all at once. Ranks of a node are taken to be neighbours in the ring.
    """
    if topology.n_nodes == 1 or phase.level == "intra":
        return 0
    if phase.level == "inter":
        return topology.local_size * phase.n_bytes
    if phase.pattern != "exchange":
        return phase.n_bytes
    message = phase.n_bytes // (topology.workers - 1)
    return message * max(len(node) * (topology.workers - len(node)) for node in topology.nodes)


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


@dataclass(frozen=True)
class Costs:
    """Predicted times of one group's votes: latency of messages that wait for each other, bytes over bandwidth.

    ``inter`` is a node's link to other nodes, shared by its ranks; ``intra`` a rank's link inside its node. ``source``
    tells in one line what they are based on; ``error`` is the root mean square of the relative errors over the times
    that they were fitted to, None where nothing was measured.
    """

    topology: Topology
    inter: Link
    intra: Link
    source: str = "links as given"
    error: float | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the links were measured on this group."""
        return self.error is not None

    def seconds(self, algorithm: str, n_bytes: int, form: CodeFormat = VOTES) -> float:
        """Predict the time of one vote on ``8 * n_bytes`` codes. Raises ValueError as `phases`."""
        return self.seconds_of(phases(algorithm, n_bytes, self.topology, form))

    def dense_seconds(self, n_bytes: int) -> float:
        """Predict an all-reduce of ``n_bytes`` of floats: by a flat ring or in two levels, whichever is faster."""
        return min(map(self.seconds_of, dense_phases(n_bytes, self.topology)))

    def seconds_of(self, sequence: Iterable[Phase]) -> float:
        """Predict the time of phases one after the other."""
        return sum(self._phase_seconds(phase) for phase in sequence)

    def _phase_seconds(self, phase: Phase) -> float:
        shape = self.topology
        local = max(map(len, shape.nodes))
        size = {"flat": shape.workers, "intra": local, "inter": shape.n_nodes}[phase.level]
        inside = 0 if phase.level == "inter" or local == 1 else phase.n_bytes
        if inside and phase.level == "flat" and phase.pattern == "exchange":
            inside = inside // (size - 1) * (local - 1)
        # both kinds of links are in use at the same time
        transfer = max(node_bytes(phase, shape) / self.inter.bytes_per_s, inside / self.intra.bytes_per_s)
        slow = self.intra if phase.level == "intra" or shape.n_nodes == 1 else self.inter
        rounds = (size - 1) * (2 if phase.pattern == "sum" else 1)
        return rounds * slow.latency_s + transfer / EFFICIENCY[phase.pattern]


# assumed of a group that nobody has measured: (between nodes, inside a node)
_DEFAULT_LINKS = {
    "gloo": (Link(300e-6, 125e6), Link(200e-6, 1.25e9)),
    "other": (Link(30e-6, 1.25e9), Link(10e-6, 50e9)),
}


def default_costs(topology: Topology, backend: str) -> Costs:
    """Return stated defaults for a group that is not measured: 1 Gb/s Ethernet for Gloo, 10 Gb/s for other backends."""
    inter, intra = _DEFAULT_LINKS.get(backend, _DEFAULT_LINKS["other"])
    source = f"assumed for {backend}, not measured: {inter} between nodes"
    if topology.n_nodes < topology.workers:
        source += f"; {intra} inside"
    return Costs(topology, inter, intra, source)


def choose(algorithm: str, n_bytes: int, costs: Costs, form: CodeFormat = VOTES) -> str:
    """Return ``algorithm`` itself, or for "auto" the one predicted to be fastest (the first where they are equal).

    Raises ValueError for an unknown algorithm, for "hierarchical" where the nodes do not allow it, and where no field
    holds the sum of the codes.
    """
    if not form.are_votes:
        form.field_bits(costs.topology.workers)
    if algorithm != "auto":
        check_possible(algorithm, costs.topology)
        return algorithm
    return min(candidates(costs.topology, form), key=lambda name: costs.seconds(name, n_bytes, form))


def rounds_pay(seconds: float, workers: int) -> bool:
    """Whether a reduce-scatter vote that takes ``seconds`` is better sent in 2 (N - 1) rounds than all at once."""
    return seconds > 2 * (workers - 1) * ROUND_SECONDS


def best_bucket_bytes(
    group_bytes: Sequence[int], algorithm: str, costs: Costs, *, overlap: bool, largest: int = 16 * 2**20
) -> int:
    """Return the size of buckets, a multiple of 8 bytes, by which the votes of a step take least time.

    Args:
        group_bytes: packed bytes of the parameters that may share buckets, one number for each such set.
        algorithm: the algorithm, or "auto".
        costs: the model.
        overlap: whether votes are sent while gradients are being computed. Then the step waits for about the last
            bucket's vote, while each further bucket costs a latency; else it waits for all votes, of which as few as
            possible share the link best, whatever single votes were measured to take.
        largest: upper limit in bytes.
    """
    limit, total = max(largest // 8 * 8, 8), sum(group_bytes)
    sizes = dict.fromkeys(min(limit, max(8, -(-total // (8 * count)) * 8)) for count in BUCKET_COUNTS)
    if algorithm != "auto":
        check_possible(algorithm, costs.topology)
    if not overlap:
        return max(sizes)
    return min(sizes, key=lambda size: seconds_of_step(group_bytes, size, algorithm, costs))


def seconds_of_step(group_bytes: Sequence[int], size: int, algorithm: str, costs: Costs) -> float:
    """Predict how long a step waits for buckets of ``size`` that are sent while gradients are being computed."""
    whole = sum(n_bytes // size for n_bytes in group_bytes)
    rests = [n_bytes % size for n_bytes in group_bytes if n_bytes % size]
    messages = [(size, whole)] * (whole > 0) + [(rest, 1) for rest in rests]
    if not messages:
        return 0.0
    latency = sum(count * costs.seconds(choose(algorithm, n_bytes, costs), 0) for n_bytes, count in messages)
    largest = max(n_bytes for n_bytes, _ in messages)
    return latency + costs.seconds(choose(algorithm, largest, costs), largest)
