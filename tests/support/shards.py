"""Models sharded over a mesh, and the same ones whole: with the same gradients both must move alike, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

WIDTH = 12


class Block(nn.Module):
    """A norm and two linear layers."""

    def __init__(self, hidden: int, bias: bool = True, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks of sizes that no mesh divides, and one matrix that is large enough for signs."""

    def __init__(self, hidden: tuple[int, ...] = (7, 100, 8), width: int = WIDTH, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(size, width=width) for size in hidden)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch_of(step: int, row: int) -> Tensor:
    """What the ranks of one replica see in a step."""
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1000 * step + row))


def whole(tensor: Tensor | None) -> Tensor | None:
    """A tensor with all of its shards; a collective where it has some."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fsdp(net: Net, mesh: DeviceMesh) -> Net:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(net: Net, mesh: DeviceMesh, *, sequence: bool = False) -> Net:
    plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        # norms are replicated, and their gradients partial sums
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0)),
        }
    for block in net.blocks:
        parallelize_module(block, mesh, plan)
    return net


def grid(rows: int, columns: int) -> DeviceMesh:
    return init_device_mesh("cpu", (rows, columns), mesh_dim_names=("replicate", "shard"))


def local_bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: (tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()).contiguous().numpy().tobytes()
        for name, tensor in tensors.items()
    }
