"""Keeping replicas equal: broadcast at the start, comparison by hash whenever one wants to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.handshake import digest
from lioncub.collectives.transport import Group, all_gather, gather_objects, world_size_of
from lioncub.kernels.registry import mark_written

_CHUNK_BYTES = 1 << 24
# odd, so that multiplication by it permutes the 64-bit integers
_MULTIPLIER = -7046029254386353131
# what a logical shift right by 29 leaves, where torch's shift copies the sign
_LOW_BITS = (1 << 35) - 1


def broadcast_module(module: torch.nn.Module, *, group: Group = None) -> None:
    """Overwrite parameters and buffers of ``module`` with those of the group's first rank; a collective call."""
    broadcast_tensors([*module.parameters(), *module.buffers()], group=group)


def broadcast_tensors(tensors: Iterable[Tensor], *, group: Group = None) -> None:
    """Overwrite tensors with those of the group's first rank; a collective call, the same tensors on all workers."""
    with torch.no_grad():
        for tensor in tensors:
            # backends want contiguous memory, and a copy keeps what other strides mean
            whole = tensor.contiguous()
            dist.broadcast(whole, group=group, group_src=0)
            if whole is not tensor:
                tensor.copy_(whole)
            else:
                # a collective call does not say that it wrote
                mark_written(tensor)


def check_equal(named: Sequence[tuple[str, Tensor]], *, group: Group = None) -> None:
    """Compare tensors bit for bit over workers, by 64-bit hashes; a collective call of 8 bytes while all is well.

    1. Every worker gathers everyone's hash of all hashes: a fixed size, whatever the workers hold.
    2. Only where they differ, the hashes of the tensors are gathered and compared in their order.

    Raises WorkersDisagreeError on all workers, naming the first tensor that differs and each rank's hash.
    """
    hashes = [(name, f"hash {int(hash_bits(tensor)) & (2**64 - 1):016x}") for name, tensor in named]
    device = named[0][1].device if named else torch.device("cpu")
    mine = torch.tensor([digest(hashes)], dtype=torch.int64, device=device)
    everyone = mine.new_empty(world_size_of(group))
    all_gather(everyone, mine, group).wait()
    if bool((everyone == mine).all()):
        return
    stated: list[list[tuple[str, str]]] = gather_objects(hashes, group, device)
    for row in zip_longest(*stated, fillvalue=("(none)", "no such parameter")):
        names, values = zip(*row, strict=True)
        if any(name != names[0] for name in names):
            raise WorkersDisagreeError(f"parameters differ between workers: {by_value(names)}")
        if any(value != values[0] for value in values):
            raise WorkersDisagreeError(f"parameter {names[0]} differs between workers: {by_value(values)}")
    raise AssertionError(f"hashes of hashes differ, hashes do not: {stated}")


def hash_bits(tensor: Tensor) -> Tensor:
    """A 64-bit hash of a tensor's bits in index order, int64 scalar on its device; equal bits give equal hashes."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, raw.numel(), _CHUNK_BYTES):
        piece = raw[start : start + _CHUNK_BYTES]
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        # the sum of words times odd, position-dependent weights, all modulo 2^64
        weights = torch.arange(start, start + words.numel(), device=tensor.device) * _MULTIPLIER * 2 + 1
        total += ((words ^ (words >> 29 & _LOW_BITS)) * weights).sum()
    return total
