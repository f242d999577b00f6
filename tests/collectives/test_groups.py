"""Topologies and process groups over real Gloo processes: nodes by host, by mesh, and what is refused."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by
from torch.distributed.device_mesh import DeviceMesh

from lioncub.collectives import ProcessGroups, Topology, find_topology, vote
from lioncub.collectives.groups import subgroups
from lioncub.kernels import pack_signs

Nodes = tuple[tuple[int, ...], ...]


@on_ranks(3, alone=True)
def test_groups_whose_names_would_differ_are_refused(rank: int, world_size: int) -> None:
    part = dist.new_group([0, 1], use_local_synchronization=True) if rank < 2 else None
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    if part is not None:
        differ = "the number of process groups that this process is in: rank 0: 3; rank 1: 2"
        assert said_by(lambda: subgroups(part, [[0, 1]])) == f"WorkersDisagreeError: workers disagree on {differ}"


@on_ranks(3)
def test_impossible_nodes_are_refused_by_all(rank: int, world_size: int) -> None:
    for nodes, got in ((((0, 1, 2),), "1 node"), (((0,), (1, 2)), "1, 2")):
        groups = ProcessGroups.build(None, Topology(nodes))
        with pytest.raises(ValueError, match="hierarchical") as caught:
            vote(torch.zeros(8, dtype=torch.uint8), algorithm="hierarchical", groups=groups)
        assert got in str(caught.value)
    with pytest.raises(ValueError, match=r"topology: expected one of the group's 3 workers, got 4"):
        ProcessGroups.build(None, Topology.even(2, 2))
    with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="2" if rank else "two"):
        said = said_by(find_topology)
    assert said == "ValueError: LOCAL_WORLD_SIZE: expected a number of workers, got 'two' on rank 0"


@pytest.mark.parametrize("nodes", [(), ((0, 2),), ((1, 0),), ((2, 3), (0, 1)), ((0,), ())])
def test_nodes_that_are_none(nodes: Nodes) -> None:
    with pytest.raises(ValueError, match="nodes: expected"):
        Topology(nodes)


MESHES = [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 2], [1, 0]]]
# host names, LOCAL_WORLD_SIZE, and the nodes that they give
HOSTS: list[tuple[str, list[int], Nodes]] = [
    ("abab", [2, 2, 2, 2], ((0, 2), (1, 3))),
    ("aaaa", [2, 2, 2, 2], ((0, 1), (2, 3))),
    ("aaaa", [4, 4, 4, 4], ((0, 1, 2, 3),)),
    ("aaab", [3, 3, 3, 1], ((0, 1, 2), (3,))),
]


@on_ranks(4)
def test_nodes_are_found_by_mesh_by_host_and_by_local_world_size(rank: int, world_size: int) -> None:
    packed = pack_signs(torch.randn(1009, generator=torch.Generator().manual_seed(rank)))
    expected = vote(packed)
    for ranks in MESHES:
        groups = ProcessGroups.of_mesh(DeviceMesh("cpu", ranks))
        assert torch.equal(vote(packed, algorithm="hierarchical", groups=groups), expected), ranks
        assert groups.topology.nodes == tuple(sorted(tuple(sorted(row)) for row in ranks))
    for hosts, local, nodes in HOSTS:
        host, size = mock.patch("socket.gethostname", lambda hosts=hosts: hosts[rank]), str(local[rank])
        with host, mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=size):
            assert ProcessGroups.find().topology.nodes == nodes
