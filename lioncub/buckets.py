"""Buckets: which parameters' votes travel in one message, and where in it each one stands.

A bucket holds parameters of one param group on one device, compressed alike. Its momentum is one flat buffer in which,
as in the message, every parameter starts on a 64-element boundary, so that the index of a code is that of its momentum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.collectives.traffic import aligned
from lioncub.compression import AnyCompression, Compression, compression_of
from lioncub.kernels.layout import WORD_SIGNS, packed_bytes

# parameters of a group have consecutive numbers, and no group has as many
_GROUP_NUMBERS = 1 << 20


@dataclass(frozen=True)
class Slot:
    """One parameter of a bucket, at code ``start`` of the message.

    ``number`` is its own wherever buckets begin and end, and grows with the order of the param groups.
    """

    number: int
    name: str
    param: Tensor
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    n_bytes: int

    @property
    def end(self) -> int:
        """The code behind the parameter's last one, padding included."""
        return self.start + 8 * self.n_bytes

    def check_unchanged(self, device: torch.device) -> None:
        """Raise ValueError where the parameter is no longer what the bucket was laid out for."""
        p = self.param
        if p.shape != self.shape or p.stride() != self.stride or p.dtype is not self.dtype or p.device != device:
            expected = (self.dtype, self.shape, self.stride, device)
            got = (p.dtype, tuple(p.shape), p.stride(), p.device)
            raise ValueError(
                f"parameter {self.name}: expected (dtype, shape, strides, device) {expected} as when the optimizer was "
                f"built, got {got}"
            )


class Bucket:
    """Parameters that share a message, their flat momentum, and 1-d views of it.

    ``n_bytes`` are those of one bit per code, padded so that rows of messages are aligned.
    """

    def __init__(
        self,
        group_index: int,
        slots: Sequence[Slot],
        device: torch.device,
        compression: Compression,
        momentum_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.group_index, self.slots, self.device = group_index, tuple(slots), device
        self.compression = compression
        self.n_bytes = aligned(slots[-1].end // 8)
        self.elements = sum(slot.numel for slot in slots)
        self.exp_avg = torch.zeros(8 * self.n_bytes, dtype=momentum_dtype, device=device)
        self.momenta = [self.exp_avg[slot.start : slot.start + slot.numel] for slot in slots]
        # what `state` holds: views of each parameter's in the parameter's shape and strides
        self.views = [self.exp_avg.as_strided(slot.shape, slot.stride, slot.start) for slot in slots]
        self._zeros: dict[torch.dtype, Tensor] = {}

    def split(self, packed: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Each parameter's part of packed codes of ``bits``, uint8[bits * n_bytes], as views."""
        sizes = [bits * slot.n_bytes for slot in self.slots]
        parts: tuple[Tensor, ...] = torch.split(packed[: sum(sizes)], sizes)
        return parts

    def zeros_for(self, slot: Slot) -> Tensor:
        """Zeros in place of a missing gradient, to be read only: all of a bucket's share one buffer per dtype."""
        if slot.dtype not in self._zeros:
            largest = max(other.numel for other in self.slots if other.dtype == slot.dtype)
            self._zeros[slot.dtype] = torch.zeros(largest, dtype=slot.dtype, device=self.device)
        return self._zeros[slot.dtype][: slot.numel]

    def layout(self) -> list[object]:
        """What workers must have in common to vote on this bucket."""
        return [
            self.compression,
            *((self.group_index, s.name, s.shape, s.stride, str(s.dtype), s.start) for s in self.slots),
        ]


Members = Mapping[int, Sequence[tuple[str, Tensor]]]


def build_buckets(
    members: Members,
    bucket_bytes: int,
    compressions: Sequence[AnyCompression],
    ready: Mapping[Tensor, int] | None = None,
    momentum_dtype: torch.dtype = torch.float32,
) -> list[Bucket]:
    """Buckets of at most ``bucket_bytes`` of one bit per code; a parameter that is larger stands alone.

    ``members`` has the named parameters of param groups, ``compressions`` what each of all groups is compressed by.
    Parameters stand in their own order or, where ``ready`` says when each one's gradient is ready, in that order; then
    buckets too come in the order in which they are complete.
    """
    buckets = []
    numbers = {
        param: number_of(group_index, i) for group_index, named in members.items() for i, (_, param) in enumerate(named)
    }
    for (group_index, device, compression), named in _alike(members, compressions).items():
        slots: list[Slot] = []
        for name, param in named if ready is None else sorted(named, key=lambda pair: ready[pair[1]]):
            if slots and slots[-1].end // 8 + packed_bytes(param.numel()) > bucket_bytes:
                buckets.append(Bucket(group_index, slots, device, compression, momentum_dtype))
                slots = []
            slots.append(_next_slot(slots, numbers[param], name, param))
        buckets.append(Bucket(group_index, slots, device, compression, momentum_dtype))
    if ready is not None:
        buckets.sort(key=lambda bucket: max(ready[slot.param] for slot in bucket.slots))
    return buckets


def number_of(group_index: int, i: int) -> int:
    """The number of the i-th parameter of a group, its own wherever buckets begin and end."""
    return group_index * _GROUP_NUMBERS + i


def packed_sizes(members: Members, compressions: Sequence[AnyCompression]) -> list[int]:
    """Packed bytes of each set of parameters that may share buckets: those alike in group, device and compression."""
    return [sum(packed_bytes(param.numel()) for _, param in named) for named in _alike(members, compressions).values()]


def _alike(
    members: Members, compressions: Sequence[AnyCompression]
) -> dict[tuple[int, torch.device, Compression], list[tuple[str, Tensor]]]:
    sets: dict[tuple[int, torch.device, Compression], list[tuple[str, Tensor]]] = {}
    for group_index, named in members.items():
        for name, param in named:
            compression = compression_of(compressions[group_index], param.numel())
            sets.setdefault((group_index, param.device, compression), []).append((name, param))
    return sets


def bucket_bytes_of(bucket_mb: Any) -> int:
    """Bytes of ``bucket_mb`` MiB, at least one word. Raises ValueError unless that is a finite number > 0."""
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, int | float) or not 0 < bucket_mb < math.inf:
        raise ValueError(f"bucket_mb: expected MiB of packed votes > 0, got {bucket_mb!r}")
    return max(int(bucket_mb * 2**20), 8)


def slot_of(number: int, name: str, param: Tensor, start: int = 0) -> Slot:
    """The slot of a parameter as it is."""
    shape, n = tuple(param.shape), param.numel()
    return Slot(number, name, param, start, shape, param.stride(), param.dtype, n, packed_bytes(n))


def _next_slot(slots: Sequence[Slot], number: int, name: str, param: Tensor) -> Slot:
    start = slots[-1].end if slots else 0
    assert start % WORD_SIGNS == 0
    return slot_of(number, name, param, start)
