"""A majority vote in two levels, by hand: few bytes between nodes, the result of one vote of all ranks.

Run: torchrun --nproc-per-node 4 two_level_vote.py. Its four ranks play two nodes of two.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lioncub.collectives import vote
from lioncub.kernels import count_votes, majority_of_counts, pack_signs, packed_bytes


def gathered(message: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return everyone's ``message``, [ranks of the group, *message.shape]."""
    everyone = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, message, group=group)
    return torch.stack(everyone)


def two_level_vote(packed: Tensor, mesh: DeviceMesh, parity: int = 0) -> Tensor:
    """Return the majority of all ranks' packed signs, uint8[B]; a collective on a mesh of (node, place in it).

    1. Inside a node, all-to-all: the rank at place k receives chunk k of everyone there, and counts its votes.
    2. Between nodes, all-gather among the ranks at place k: the counts of chunk k, as bit planes.
    3. Each rank votes on all counts; then inside the node, all-gather of the voted chunks.
    """
    nodes, local = mesh.shape
    inside, between = mesh.get_group("place"), mesh.get_group("node")
    # a chunk is whole 64-bit words, so that in it a tie at element j still finds the parity of j
    chunk = packed_bytes(8 * len(packed), chunks=local) // local
    sent = torch.nn.functional.pad(packed, (0, local * chunk - len(packed))).view(local, chunk)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=inside)
    planes = gathered(count_votes(received), between)
    voted = majority_of_counts(planes, voters=nodes * local, parity=parity)
    return gathered(voted, inside).view(-1)[: len(packed)]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    nodes = 2
    mesh = init_device_mesh("cpu", (nodes, dist.get_world_size() // nodes), mesh_dim_names=("node", "place"))
    generator = torch.Generator().manual_seed(dist.get_rank())
    packed = pack_signs(torch.randn(100_003, generator=generator))
    for parity in range(2):
        same = torch.equal(two_level_vote(packed, mesh, parity), vote(packed, algorithm="all_gather", parity=parity))
        if dist.get_rank() == 0:
            print(f"{len(packed)} bytes of votes, parity {parity}: {'the same' if same else 'NOT the same'} result")
    dist.destroy_process_group()
