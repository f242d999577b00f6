"""Topology and process groups: all ranks of a vote, those of one node, and their counterparts on other nodes."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from lioncub.collectives.agreement import agreement, handshake
from lioncub.collectives.simulated import SimulatedProcessGroup
from lioncub.collectives.transport import (
    Group,
    backend_of,
    device_of,
    gather_objects,
    is_listed,
    losing,
    rank_of,
    store_of,
    whole,
    world_size_of,
)


@dataclass(frozen=True)
class Topology:
    """The ranks of a group by node: each node's ranks within the group, ascending, nodes by their first rank."""

    nodes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        ranks = sorted(rank for node in self.nodes for rank in node)
        if not ranks or ranks != list(range(len(ranks))) or not all(self.nodes):
            raise ValueError(f"nodes: expected every rank from 0 up on exactly one node, got {self.nodes}")
        if list(self.nodes) != sorted(tuple(sorted(node)) for node in self.nodes):
            raise ValueError(f"nodes: expected ascending ranks, nodes by their first rank, got {self.nodes}")

    @classmethod
    def flat(cls, workers: int) -> Topology:
        """Return a topology of ``workers`` nodes of one rank each."""
        return cls(tuple((rank,) for rank in range(workers)))

    @classmethod
    def even(cls, n_nodes: int, local_size: int) -> Topology:
        """Return a topology of ``n_nodes`` nodes of ``local_size`` consecutive ranks each."""
        return cls(tuple(tuple(range(i * local_size, (i + 1) * local_size)) for i in range(n_nodes)))

    @property
    def workers(self) -> int:
        """Number of ranks on all nodes."""
        return sum(map(len, self.nodes))

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @property
    def is_even(self) -> bool:
        """Whether all nodes have equally many ranks."""
        return len({len(node) for node in self.nodes}) == 1

    @property
    def local_size(self) -> int:
        """Ranks per node. Raises ValueError where nodes differ."""
        if not self.is_even:
            raise ValueError(
                f"nodes: expected equally many workers on each, got {', '.join(str(len(n)) for n in self.nodes)}"
            )
        return len(self.nodes[0])

    @property
    def is_two_level(self) -> bool:
        """Whether a hierarchical vote is possible: several nodes of several ranks, equally many on each."""
        return self.n_nodes > 1 and self.is_even and self.local_size > 1

    def place_of(self, rank: int) -> tuple[int, int]:
        """Return (index of the node, index within the node) of a rank."""
        return next((m, node.index(rank)) for m, node in enumerate(self.nodes) if rank in node)

    def describe(self) -> str:
        """Name nodes and their sizes, e.g. ``2 nodes of 4 workers``."""
        nodes = f"{self.n_nodes} node{'s' * (self.n_nodes != 1)}"
        if self.is_even:
            return f"{nodes} of {self.local_size} worker{'s' * (self.local_size != 1)}"
        return f"{nodes} of {', '.join(str(len(node)) for node in self.nodes)} workers"


def find_topology(group: Group = None, device: torch.device | None = None) -> Topology:
    """Find the ranks that share a node, by host names and, where launchers set it, LOCAL_WORLD_SIZE; a collective.

    Ranks with the same host name share a node. Where LOCAL_WORLD_SIZE is less than their number (several launchers on
    one host), a host's ranks are cut into that many at a time, in their order. Simulated workers are on simulated
    hosts. Messages are on ``device``, the group's own unless given.
    """
    if isinstance(group, SimulatedProcessGroup):
        mine = (group.host, "")
    else:
        mine = (socket.gethostname(), os.environ.get("LOCAL_WORLD_SIZE", ""))
    stated = gather_objects(mine, group, device_of(group, device))
    # read only now, so that a value that is no number is an error on all ranks
    return group_by_host([(host, _local_size(rank, value)) for rank, (host, value) in enumerate(stated)])


def _local_size(rank: int, value: str) -> int:
    if value and not value.isdecimal():
        raise ValueError(f"LOCAL_WORLD_SIZE: expected a number of workers, got {value!r} on rank {rank}")
    return int(value or "0")


def group_by_host(stated: Sequence[tuple[str, int]]) -> Topology:
    """Return the topology that (host name, LOCAL_WORLD_SIZE or 0) of every rank give."""
    hosts: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(stated):
        hosts.setdefault(host, []).append(rank)
    nodes = []
    for ranks in hosts.values():
        size = stated[ranks[0]][1]
        size = size if 0 < size < len(ranks) else len(ranks)
        nodes += [tuple(ranks[i : i + size]) for i in range(0, len(ranks), size)]
    return Topology(tuple(sorted(nodes)))


@dataclass(frozen=True)
class ProcessGroups:
    """The process groups of one topology.

    ``group`` holds all ranks in their order. Where the topology has two levels, ``intra`` holds the ranks of this one's
    node and ``inter`` those with its place on every node, in the order of ``topology``; else both are None.
    """

    group: Group
    topology: Topology
    intra: Group = None
    inter: Group = None

    @property
    def workers(self) -> int:
        """Number of ranks in ``group``."""
        return self.topology.workers

    @classmethod
    def flat(cls, group: Group = None) -> ProcessGroups:
        """Return a group without nodes; no collective."""
        return cls(group, Topology.flat(world_size_of(group)))

    @classmethod
    def build(cls, group: Group, topology: Topology, device: torch.device | None = None) -> ProcessGroups:
        """Create the groups of a topology; a collective of all ranks of ``group``.

        Messages are on ``device``, the group's own unless given. Raises ValueError where the topology has another
        number of ranks than the group, WorkersDisagreeError on all other ranks, and on all where they pass different
        topologies.
        """
        size = world_size_of(group)
        with agreement(group, device) as fingerprint:
            if not isinstance(topology, Topology):
                raise TypeError(f"topology: expected Topology(...), got {type(topology).__name__}")
            if topology.workers != size:
                raise ValueError(f"topology: expected one of the group's {size} workers, got {topology.workers}")
            fingerprint["the nodes"] = topology.nodes
        if not topology.is_two_level:
            return cls(group, topology)
        node, place = topology.place_of(rank_of(group))
        intra = subgroups(group, topology.nodes, device)[node]
        inter = subgroups(group, tuple(zip(*topology.nodes, strict=True)), device)[place]
        return cls(group, topology, intra, inter)

    @classmethod
    def find(cls, group: Group = None, device: torch.device | None = None) -> ProcessGroups:
        """Create the groups of the topology that `find_topology` finds; a collective, as `build`."""
        return cls.build(group, find_topology(group, device), device)

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh, group: Group = None, device: torch.device | None = None) -> ProcessGroups:
        """Take the groups of a mesh of shape [nodes, workers per node]; a collective.

        Messages are on ``device``, the group's own unless given. Raises ValueError unless the mesh has two dimensions
        and holds exactly the ranks of ``group``.
        """
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        with agreement(group, device) as fingerprint:
            if not isinstance(mesh, DeviceMesh):
                raise TypeError(f"mesh: expected a DeviceMesh, got {type(mesh).__name__}")
            if mesh.ndim != 2:
                shape = tuple(mesh.mesh.shape)
                raise ValueError(f"mesh: expected dimensions (nodes, workers per node), got shape {shape}")
            rows = [[int(rank) for rank in row] for row in mesh.mesh.tolist()]
            if sorted(rank for row in rows for rank in row) != sorted(ranks):
                raise ValueError(f"mesh: expected the ranks {sorted(ranks)} of the group, got {rows}")
            fingerprint["the mesh"] = rows
        places = {rank: place for place, rank in enumerate(ranks)}
        topology = Topology(tuple(sorted(tuple(sorted(places[rank] for rank in row)) for row in rows)))
        if not topology.is_two_level:
            return cls(group, topology)
        if [[places[rank] for rank in row] for row in rows] != [list(node) for node in topology.nodes]:
            # the mesh's own order of ranks is not the group's, so its groups would deliver chunks to other places
            return cls.build(group, topology, device)
        return cls(group, topology, mesh.get_group(1), mesh.get_group(0))


def subgroups(group: Group, partition: Sequence[Sequence[int]], device: torch.device | None = None) -> list[Group]:
    """Create process groups of ``group``'s ranks, with its backend and timeout; None for those without this rank.

    A collective of all ranks of ``group``, with the same sets of ranks on all; its messages are on ``device``, the
    group's own unless given. Raises WorkersDisagreeError on all ranks where ``group`` is a part of the world and they
    are in different numbers of groups.
    """
    me = rank_of(group)
    if isinstance(group, SimulatedProcessGroup):
        return [group.subgroup(ranks) if me in ranks else None for ranks in partition]
    if group is not None and not is_listed(group):
        return [_unlisted_part(ranks, group) if me in ranks else None for ranks in partition]
    everyone = dist.get_process_group_ranks(group or dist.group.WORLD)
    options = _options_of(group)
    # where all processes are here, all of them make all groups
    local = len(everyone) != dist.get_world_size()
    if local:
        _check_names(group, device)
    made: list[Group] = []
    for ranks in partition:
        new = None
        if me in ranks or not local:
            new = dist.new_group([everyone[rank] for rank in ranks], use_local_synchronization=local, **options)
        made.append(new if me in ranks else None)
    return made


def new_group(ranks: Sequence[int], like: Group, device: torch.device | None = None) -> dist.ProcessGroup:
    """Create a group of ``ranks``, numbered in the world, with backend and timeout of ``like``; a collective of them.

    Raises WorkersDisagreeError on the ranks of ``like`` where they are a part of the world and are in different numbers
    of groups: torch names such a group by that number.
    """
    local = len(ranks) != dist.get_world_size()
    if local:
        _check_names(like, device)
    made: dist.ProcessGroup = dist.new_group(list(ranks), use_local_synchronization=local, **_options_of(like))
    return made


def _check_names(group: Group, device: torch.device | None) -> None:
    """Raise WorkersDisagreeError on all ranks of a group whose next group of their own would have other names.

    torch hashes the name of a group that only its members make from their ranks and from how many groups each is in.
    """
    known = len(distributed_c10d._world.pg_names)
    handshake({"the number of process groups that this process is in": known}, group=group, device=device)


def _unlisted_part(ranks: Sequence[int], group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Create a group of some ranks of a group that torch.distributed did not make; a collective of them."""
    store = PrefixStore(f"lioncub/{','.join(map(str, ranks))}", store_of(group))
    return _unlisted_group(store, list(ranks).index(group.rank()), len(ranks), group)


def grid_of(
    group: dist.ProcessGroup, meshes: Sequence[dist.ProcessGroup], ranks: Sequence[int], device: torch.device
) -> tuple[dist.ProcessGroup, list[int]]:
    """Create a group of all ranks of several replicas, each with a world of its own; a collective of them.

    ``group``, which torch.distributed did not make, has the ranks of one place in each replica, ``meshes`` connect
    ``ranks`` of this replica's world. Returns the group, replica after replica, and for each of its ranks the first one
    that ``group`` connects with it. Raises ValueError where replicas differ.
    """
    place = list(ranks).index(dist.get_rank())
    stated = gather_objects((len(ranks), place), group, device)
    if any(theirs != stated[0] for theirs in stated) or len(ranks) != dist.get_world_size():
        raise ValueError(
            f"process_group: expected the same place in replicas that are sharded over all of their "
            f"{dist.get_world_size()} ranks, got (ranks, place) {stated}"
        )
    store = store_of(group)
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        raise ValueError(f"process_group: expected a group made through a TCPStore, got {type(store).__name__}")
    # each place may have a store of its own: all take that of the first rank of the first replica
    host, port, name = store.host, store.port, uuid.uuid4().hex
    for one in (*meshes, group):
        host, port, name = gather_objects((host, port, name), one, device)[0]
    with losing(group):
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_timeout_of(group))
    size = len(ranks)
    made = _unlisted_group(
        PrefixStore(f"lioncub/{name}", store), group.rank() * size + place, group.size() * size, group
    )
    return made, [rank % size for rank in range(made.size())]


def _unlisted_group(store: Store, rank: int, size: int, like: dist.ProcessGroup) -> dist.ProcessGroup:
    """Create a Gloo group through a store, with the timeout of another one. Raises ValueError for other backends."""
    carried = like._device_types[0]
    backend = backend_of(like, carried.type)
    if backend != "gloo":
        raise ValueError(f"process_group: expected one on Gloo, whose parts can be connected, got one on {backend}")
    with losing(like):
        gloo = dist.ProcessGroupGloo(store, rank, size, _timeout_of(like))
        gloo._set_sequence_number_for_group()
    made = dist.ProcessGroup(store, rank, size)
    made._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    for device in like._device_types:
        made._register_backend(device, dist.ProcessGroup.BackendType.GLOO, gloo)
    return made


def _options_of(group: Group) -> dict[str, Any]:
    """Return timeout and backend of a group, as new_group takes them."""
    config = dist.get_backend_config(group)
    names = {part.rpartition(":")[2] for part in config.split(",")}
    # by its plain name where it is one: a group without a default backend warns when it ends, wherever that happens
    return {"timeout": _timeout_of(group), "backend": names.pop() if len(names) == 1 else config}


def destroy_groups(groups: list[dist.ProcessGroup]) -> None:
    """Destroy process groups, where destroy_process_group() has not done it before, and empty the list."""
    while groups:
        group = groups.pop()
        if group in distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def _timeout_of(group: Group) -> timedelta:
    timeout: timedelta = whole(group)._get_backend(device_of(group)).options._timeout
    return timeout
