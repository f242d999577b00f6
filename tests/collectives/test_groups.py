"""Topologies and process groups over real Gloo processes: nodes by host, by mesh, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of
from torch.distributed.device_mesh import DeviceMesh

from lioncub.collectives import ProcessGroups, Topology, WorkersDisagreeError, find_topology, vote
from lioncub.collectives import groups as groups_module
from lioncub.collectives.groups import subgroups
from lioncub.kernels import pack_signs

Nodes = tuple[tuple[int, ...], ...]


def in_different_numbers_of_groups(rank: int, world_size: int) -> str:
    part = dist.new_group([0, 1], use_local_synchronization=True) if rank < 2 else None
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    if part is None:
        return ""
    with pytest.raises(WorkersDisagreeError) as caught:
        subgroups(part, [[0, 1]])
    return str(caught.value)


def test_groups_whose_names_would_differ_are_refused() -> None:
    said = "workers disagree on the number of process groups that this process is in: rank 0: 3; rank 1: 2"
    assert results_of(in_different_numbers_of_groups, 3) == [said, said, ""]


def refusals(rank: int, world_size: int) -> tuple[list[str], str]:
    said = []
    for nodes in (((0, 1, 2),), ((0,), (1, 2))):
        groups = ProcessGroups.build(None, Topology(nodes))
        with pytest.raises(ValueError, match="hierarchical") as caught:
            vote(torch.zeros(8, dtype=torch.uint8), algorithm="hierarchical", groups=groups)
        said.append(str(caught.value))
    with pytest.raises(ValueError, match=r"topology: expected one of the group's 3 workers, got 4"):
        ProcessGroups.build(None, Topology.even(2, 2))
    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank else "two"
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE") as caught:
        find_topology()
    return said, str(caught.value)


def test_impossible_nodes_are_refused_by_all() -> None:
    for (one_node, uneven), variable in results_of(refusals, 3):
        assert "1 node" in one_node
        assert "1, 2" in uneven
        assert variable == "LOCAL_WORLD_SIZE: expected a number of workers, got 'two' on rank 0"


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


def nodes_of_meshes_and_hosts(rank: int, world_size: int) -> tuple[list[Nodes], list[Nodes]]:
    packed = pack_signs(torch.randn(1009, generator=torch.Generator().manual_seed(rank)))
    expected, by_mesh, by_host = vote(packed), [], []
    for ranks in MESHES:
        groups = ProcessGroups.of_mesh(DeviceMesh("cpu", ranks))
        assert torch.equal(vote(packed, algorithm="hierarchical", groups=groups), expected), ranks
        by_mesh.append(groups.topology.nodes)
    for hosts, local, _ in HOSTS:
        groups_module.socket.gethostname = lambda hosts=hosts: hosts[rank]
        os.environ["LOCAL_WORLD_SIZE"] = str(local[rank])
        by_host.append(ProcessGroups.find().topology.nodes)
    return by_mesh, by_host


def test_nodes_are_found_by_mesh_by_host_and_by_local_world_size() -> None:
    for by_mesh, by_host in results_of(nodes_of_meshes_and_hosts, 4):
        assert by_mesh == [tuple(sorted(tuple(sorted(row)) for row in ranks)) for ranks in MESHES]
        assert by_host == [nodes for *_, nodes in HOSTS]
