"""Which workers share a node: the two levels of a hierarchical vote."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lioncub.collectives.transport import Group, device_of, gather_objects
from lioncub.collectives.virtual import VirtualGroup


@dataclass(frozen=True)
class Topology:
    """The workers of a group by node: each node's ranks within the group, ascending, nodes by their first rank."""

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if not ranks or ranks != list(range(len(ranks))) or not all(self.nodes):
            raise ValueError(f"nodes: expected every rank from 0 up on exactly one node, got {self.nodes}")
        if list(self.nodes) != sorted(tuple(sorted(node)) for node in self.nodes):
            raise ValueError(f"nodes: expected ascending ranks, nodes by their first rank, got {self.nodes}")

    @classmethod
    def flat(cls, workers: int) -> Topology:
        """Every worker on a node of its own."""
        return cls(tuple((rank,) for rank in range(workers)))

    @classmethod
    def even(cls, n_nodes: int, local_size: int) -> Topology:
        """``n_nodes`` nodes of ``local_size`` consecutive ranks each."""
        return cls(tuple(tuple(range(i * local_size, (i + 1) * local_size)) for i in range(n_nodes)))

    @property
    def workers(self) -> int:
        """Number of workers on all nodes."""
        return sum(map(len, self.nodes))

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @property
    def is_even(self) -> bool:
        """Whether all nodes have equally many workers."""
        return len({len(node) for node in self.nodes}) == 1

    @property
    def local_size(self) -> int:
        """Workers per node. Raises ValueError where nodes differ."""
        if not self.is_even:
            raise ValueError(
                f"nodes: expected equally many workers on each, got {', '.join(str(len(n)) for n in self.nodes)}"
            )
        return len(self.nodes[0])

    @property
    def is_two_level(self) -> bool:
        """Whether a hierarchical vote is possible: several nodes of several workers, equally many on each."""
        return self.n_nodes > 1 and self.is_even and self.local_size > 1

    def place_of(self, rank: int) -> tuple[int, int]:
        """(index of the node, index within the node) of a rank."""
        return next((m, node.index(rank)) for m, node in enumerate(self.nodes) if rank in node)


def find_topology(group: Group = None, device: torch.device | None = None) -> Topology:
    """Who shares a node, from host names and, where launchers set it, LOCAL_WORLD_SIZE; a collective call.

    Workers with the same host name share a node. Where LOCAL_WORLD_SIZE says that fewer do (several launchers on one
    host), a host's workers are cut into that many at a time, in the order of their ranks. Simulated workers
    are on simulated hosts. Messages are on ``device``, the group's own unless given.
    """
    if isinstance(group, VirtualGroup):
        mine = (group.host, "")
    else:
        mine = (socket.gethostname(), os.environ.get("LOCAL_WORLD_SIZE", ""))
    stated = gather_objects(mine, group, device_of(group, device))
    # read only now, so that a value that is no number is an error on all workers
    return group_by_host([(host, _local_size(rank, value)) for rank, (host, value) in enumerate(stated)])


def _local_size(rank: int, value: str) -> int:
    if value and not value.isdecimal():
        raise ValueError(f"LOCAL_WORLD_SIZE: expected a number of workers, got {value!r} on rank {rank}")
    return int(value or "0")


def group_by_host(stated: Sequence[tuple[str, int]]) -> Topology:
    """The topology that (host name, LOCAL_WORLD_SIZE or 0) of every rank tell."""
    hosts: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(stated):
        hosts.setdefault(host, []).append(rank)
    nodes = []
    for ranks in hosts.values():
        size = stated[ranks[0]][1]
        size = size if 0 < size < len(ranks) else len(ranks)
        nodes += [tuple(ranks[i : i + size]) for i in range(0, len(ranks), size)]
    return Topology(tuple(sorted(nodes)))
