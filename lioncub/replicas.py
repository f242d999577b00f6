"""Keeping replicas equal: broadcast at the start, comparison by hash whenever one wants to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.collectives.agreement import WorkersDisagreeError, agreement, by_value, gather_where_different, informing
from lioncub.collectives.transport import Group, check_carried, losing
from lioncub.kernels.dispatch import mark_written

_CHUNK_BYTES = 1 << 24
# odd, so that multiplication by it permutes the 64-bit integers
_MULTIPLIER = -7046029254386353131
# what a logical shift right by 29 leaves, where torch's shift copies the sign
_LOW_BITS = (1 << 35) - 1


def broadcast_module(module: torch.nn.Module, *, group: Group = None) -> None:
    """Overwrite parameters and buffers of ``module`` with those of the group's first rank; a collective call.

    A handshake goes first. Raises WorkersDisagreeError on all workers, with nothing changed, where modules differ in
    names, shapes or dtypes; TypeError or ValueError for what cannot be sent, then WorkersDisagreeError on all others.
    """
    with informing(group):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
        named = [*module.named_parameters(), *module.named_buffers()]
    _broadcast(named, group)


def broadcast_tensors(tensors: Iterable[Tensor], *, group: Group = None) -> None:
    """Overwrite tensors with those of the group's first rank; a collective call, errors as in `broadcast_module`."""
    with informing(group):
        named = [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
    _broadcast(named, group)


def _broadcast(named: Sequence[tuple[str, Tensor]], group: Group) -> None:
    with agreement(group, _device_of(named)) as fingerprint:
        for name, tensor in named:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.device.type == "meta":
                raise ValueError(f"{name}: expected a dense tensor with data, got {tensor.layout} on {tensor.device}")
            check_carried(name, tensor, group)
            fingerprint[name] = f"{tensor.dtype}, shape {tuple(tensor.shape)}"
    with torch.no_grad():
        for _, tensor in named:
            # backends want contiguous memory, and a copy keeps what other strides mean
            whole = tensor.contiguous()
            with losing(group):
                dist.broadcast(whole, group=group, group_src=0)
            if whole is not tensor:
                tensor.copy_(whole)
            else:
                # a collective call does not say that it wrote
                mark_written(tensor)


def _device_of(named: Sequence[tuple[str, object]]) -> torch.device | None:
    """Return the first tensor's device, for messages of a group that carries nothing on the CPU."""
    return next((tensor.device for _, tensor in named if isinstance(tensor, Tensor)), None)


def check_equal(named: Sequence[tuple[str, Tensor]], *, group: Group = None) -> None:
    """Compare tensors bit for bit over workers, by 64-bit hashes; a collective call of 16 bytes while all is well.

    1. Every worker gathers everyone's hash of all hashes: a fixed size, whatever the workers hold.
    2. Only where they differ, the hashes of the tensors are gathered and compared in their order.

    Raises WorkersDisagreeError on all workers, naming the first tensor that differs and each rank's hash.
    """
    with informing(group, device=_device_of(named)):
        hashes = [(name, f"hash {int(hash_bits(tensor)) & (2**64 - 1):016x}") for name, tensor in named]
    stated = gather_where_different(hashes, group, _device_of(named))
    if stated is None:
        return
    for row in zip_longest(*stated, fillvalue=("(none)", "no such parameter")):
        names, values = zip(*row, strict=True)
        if any(name != names[0] for name in names):
            raise WorkersDisagreeError(f"parameters differ between workers: {by_value(names)}")
        if any(value != values[0] for value in values):
            raise WorkersDisagreeError(f"parameter {names[0]} differs between workers: {by_value(values)}")
    raise AssertionError(f"hashes of hashes differ, hashes do not: {stated}")


def hash_bits(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash, int64 scalar on the device, of a tensor's bits in index order."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, raw.numel(), _CHUNK_BYTES):
        piece = raw[start : start + _CHUNK_BYTES]
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        # the sum of words times odd, position-dependent weights, all modulo 2^64
        places = torch.arange(start, start + words.numel(), dtype=torch.int64, device=tensor.device)
        weights = places * _MULTIPLIER * 2 + 1
        total += ((words ^ (words >> 29 & _LOW_BITS)) * weights).sum()
    return total
