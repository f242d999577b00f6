"""The process groups on which votes travel: all workers, those of one node, and their counterparts on other nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from lioncub.collectives.handshake import agreement, handshake
from lioncub.collectives.topology import Topology, find_topology
from lioncub.collectives.transport import Group, device_of, rank_of, whole, world_size_of
from lioncub.collectives.virtual import VirtualGroup


@dataclass(frozen=True)
class Routes:
    """Process groups of one arrangement of workers.

    ``group`` holds all workers in rank order. Where the topology has two levels, ``intra`` holds the workers of this
    one's node and ``inter`` those with its place on every node, in the order of ``topology``; else both are None.
    """

    group: Group
    topology: Topology
    intra: Group = None
    inter: Group = None

    @property
    def workers(self) -> int:
        """Number of workers in ``group``."""
        return self.topology.workers

    @classmethod
    def flat(cls, group: Group = None) -> Routes:
        """Routes that know no nodes; communicates nothing."""
        return cls(group, Topology.flat(world_size_of(group)))

    @classmethod
    def build(cls, group: Group, topology: Topology, device: torch.device | None = None) -> Routes:
        """Make the groups of a topology; a collective call of all workers of ``group``.

        Messages are on ``device``, the group's own unless given. Raises ValueError where the topology has another
        number of workers than the group, WorkersDisagreeError on all other workers, and on all where they pass
        different topologies.
        """
        size = world_size_of(group)
        with agreement(group, device) as facts:
            if not isinstance(topology, Topology):
                raise TypeError(f"topology: expected Topology(...), got {type(topology).__name__}")
            if topology.workers != size:
                raise ValueError(f"topology: expected one of the group's {size} workers, got {topology.workers}")
            facts["the nodes"] = topology.nodes
        if not topology.is_two_level:
            return cls(group, topology)
        node, place = topology.place_of(rank_of(group))
        intra = subgroups(group, topology.nodes, device)[node]
        inter = subgroups(group, tuple(zip(*topology.nodes, strict=True)), device)[place]
        return cls(group, topology, intra, inter)

    @classmethod
    def find(cls, group: Group = None, device: torch.device | None = None) -> Routes:
        """Routes by the nodes that host names and LOCAL_WORLD_SIZE tell; a collective call.

        Messages are on ``device``, the group's own unless given.
        """
        return cls.build(group, find_topology(group, device), device)

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh, group: Group = None, device: torch.device | None = None) -> Routes:
        """Routes along a mesh of shape [nodes, workers per node], whose groups are used; a collective call.

        Messages are on ``device``, the group's own unless given. Raises ValueError unless the mesh has two dimensions
        and holds exactly the workers of ``group``.
        """
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        with agreement(group, device) as facts:
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
            if mesh.ndim != 2:
                shape = tuple(mesh.mesh.shape)
                raise ValueError(f"mesh: expected dimensions (nodes, workers per node), got shape {shape}")
            rows = [[int(rank) for rank in row] for row in mesh.mesh.tolist()]
            if sorted(rank for row in rows for rank in row) != sorted(ranks):
                raise ValueError(f"mesh: expected the ranks {sorted(ranks)} of the group, got {rows}")
            facts["the mesh"] = rows
        places = {rank: place for place, rank in enumerate(ranks)}
        topology = Topology(tuple(sorted(tuple(sorted(places[rank] for rank in row)) for row in rows)))
        if not topology.is_two_level:
            return cls(group, topology)
        if [[places[rank] for rank in row] for row in rows] != [list(node) for node in topology.nodes]:
            # the mesh's own order of ranks is not the group's, so its groups would deliver chunks to other places
            return cls.build(group, topology, device)
        return cls(group, topology, mesh.get_group(1), mesh.get_group(0))


def subgroups(group: Group, partition: Sequence[Sequence[int]], device: torch.device | None = None) -> list[Group]:
    """New process groups of ``group``'s ranks, with its backend and timeout; None for those without this worker.

    A collective call of all workers of ``group``, with the same sets of ranks on all; its messages are on ``device``,
    the group's own unless given. Raises WorkersDisagreeError on
    all workers where ``group`` is a part of the world and they are in different numbers of groups.
    """
    me = rank_of(group)
    if isinstance(group, VirtualGroup):
        return [group.subgroup(ranks) if me in ranks else None for ranks in partition]
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    options: dict[str, Any] = {"timeout": _timeout_of(group), "backend": dist.get_backend_config(group)}
    # where all processes are here, all of them make all groups
    local = len(everyone) != dist.get_world_size()
    if local:
        # the name of a group that only its members make is hashed from their ranks and from how many groups each is in
        known = len(distributed_c10d._world.pg_names)
        facts = {"the number of process groups that this process is in": known}
        handshake(facts, group=group, device=device)
    made: list[Group] = []
    for ranks in partition:
        new = None
        if me in ranks or not local:
            new = dist.new_group([everyone[rank] for rank in ranks], use_local_synchronization=local, **options)
        made.append(new if me in ranks else None)
    return made


def _timeout_of(group: Group) -> timedelta:
    timeout: timedelta = whole(group)._get_backend(device_of(group)).options._timeout
    return timeout
