"""Predicted communication and step times of a cluster: pure arithmetic on the cost model."""

import dataclasses
from dataclasses import dataclass

from lioncub.collectives.cost import Costs, Link, LinkCosts, best_bucket_bytes
from lioncub.collectives.header import header_bytes
from lioncub.collectives.profile import Profile
from lioncub.collectives.topology import Topology
from lioncub.collectives.traffic import candidates, dense_legs, describe, legs, node_bytes
from lioncub.kernels.layout import packed_bytes
from lioncub.training.config import UserError

DENSE = {"fp32 all-reduce": 4, "bf16 all-reduce": 2}
BASELINE = "fp32 all-reduce"
WORLDS = tuple(2**i for i in range(1, 13))
# of the time that a step computes: gradients take about twice as long as the forward pass
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Cluster:
    """What is planned: sizes, links, seconds of computation per step, and a profile whose points may be used.

    ``inter`` is a node's link to other nodes, shared by its workers; ``intra`` a worker's link inside its node.
    ``origin`` says in words where the links' figures are from.
    """

    params: int
    nodes: int
    local: int
    inter: Link
    intra: Link
    compute_s: float = 0.0
    profile: Profile | None = None
    origin: str = "as given"

    def __post_init__(self) -> None:
        """Raise UserError for a cluster of fewer than two workers, or impossible figures."""
        if self.nodes < 1 or self.local < 1 or self.nodes * self.local < 2:
            raise UserError(
                "--nodes, --gpus-per-node: expected counts >= 1 with at least 2 workers in all, "
                f"got {self.nodes} and {self.local}"
            )
        if not 0 <= self.compute_s < float("inf"):
            raise UserError(f"--compute-ms: expected a finite number >= 0, got {1e3 * self.compute_s:g}")

    @property
    def topology(self) -> Topology:
        """The nodes, with consecutive ranks on each."""
        return Topology.even(self.nodes, self.local)

    @property
    def links(self) -> LinkCosts:
        """Times from the speed of the links."""
        between = [f"{self.inter} from node to node"] * (self.nodes > 1)
        inside = [f"{self.intra} inside a node"] * (self.local > 1)
        source = f"links {self.origin}: {'; '.join(between + inside)}"
        return LinkCosts(self.topology, self.inter, self.intra, source)

    @property
    def costs(self) -> Costs:
        """Times of votes: measured ones where the profile is of such a group, else from the links."""
        if self.profile is not None and describe(self.profile.topology) == describe(self.topology):
            return self.profile.costs(self.profile.topology, self.profile.backend)
        return self.links


@dataclass(frozen=True)
class Row:
    """One way to communicate: seconds per step, bytes that the busiest node sends to others, seconds of a step.

    ``overlapped_s`` is a step whose communication hides behind the backward pass; speedups are over fp32 all-reduce,
    each against the baseline's own step of the same kind.
    """

    method: str
    way: str
    seconds: float
    node_bytes: int
    step_s: float
    overlapped_s: float
    speedup: float
    overlapped_speedup: float
    is_chosen: bool


def forecast(cluster: Cluster) -> tuple[Row, ...]:
    """The dense all-reduces, then every algorithm that is possible on the cluster; the fastest of these is chosen."""
    dense = {name: _dense(cluster, size) for name, size in DENSE.items()}
    costs = cluster.costs
    votes = {name: _votes(cluster, costs, name) for name in candidates(costs.topology)}
    chosen = min(votes, key=lambda name: votes[name][1])
    baseline = dense[BASELINE][1]
    found = [*dense.items(), *votes.items()]
    return tuple(_row(cluster, name, facts, baseline, is_chosen=name == chosen) for name, facts in found)


def over_worlds(cluster: Cluster) -> list[tuple[int, tuple[Row, ...]]]:
    """(number of workers, forecast) for 2 to 4096 workers on as full nodes as the cluster's, from its links alone."""
    found: dict[int, tuple[Row, ...]] = {}
    for world in WORLDS:
        local = min(world, cluster.local)
        nodes = max(1, world // local)
        found[nodes * local] = forecast(dataclasses.replace(cluster, nodes=nodes, local=local, profile=None))
    return sorted(found.items())


def _dense(cluster: Cluster, bytes_per_element: int) -> tuple[str, float, int]:
    """(way, seconds, bytes between nodes) of one all-reduce of all gradients: the faster of flat and two-level."""
    links = cluster.links
    ways = dense_legs(bytes_per_element * cluster.params, links.topology)
    named = zip(("ring", "2 levels"), ways, strict=False)
    way, best = min(named, key=lambda item: links.seconds_of(item[1]))
    return way, links.seconds_of(best), sum(node_bytes(leg, links.topology) for leg in best)


def _votes(cluster: Cluster, costs: Costs, algorithm: str) -> tuple[str, float, int]:
    """(way, seconds, bytes between nodes) of the votes on all parameters, bucket after bucket."""
    total, head = packed_bytes(cluster.params), header_bytes(0)
    size = best_bucket_bytes([total], algorithm, costs, overlap=False)
    messages = [size] * (total // size) + ([total % size] if total % size else [])
    counts = {n_bytes: messages.count(n_bytes) for n_bytes in set(messages)}
    seconds = sum(count * costs.seconds(algorithm, n_bytes, head) for n_bytes, count in counts.items())
    between = sum(
        count * node_bytes(leg, costs.topology)
        for n_bytes, count in counts.items()
        for leg in legs(algorithm, n_bytes, costs.topology, head)
    )
    return f"{len(messages)} bucket{'s' * (len(messages) != 1)}", seconds, between


def _row(cluster: Cluster, name: str, facts: tuple[str, float, int], baseline: float, *, is_chosen: bool) -> Row:
    way, seconds, between = facts
    step, overlapped = _steps(cluster.compute_s, seconds)
    slow_step, slow_overlapped = _steps(cluster.compute_s, baseline)
    return Row(name, way, seconds, between, step, overlapped, slow_step / step, slow_overlapped / overlapped, is_chosen)


def _steps(compute: float, wire: float) -> tuple[float, float]:
    """Seconds of a step without and with overlap."""
    backward = BACKWARD_SHARE * compute
    return compute + wire, compute - backward + max(backward, wire)
