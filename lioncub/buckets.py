"""Buckets: the parameters whose codes share one message, and where in it each one begins.

A bucket holds parameters of one param group on one device with one compression. Its momentum is one flat buffer in
which, as in the message, every parameter starts on a 64-element boundary, so that the index of a code is that of its
momentum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import parameter_names
from lioncub.collectives.agreement import digest
from lioncub.collectives.cost import aligned
from lioncub.compression import AnyCompression, Compression, compression_of
from lioncub.kernels.checks import FLOAT_DTYPES
from lioncub.kernels.layout import WORD_SIGNS, packed_bytes
from lioncub.params import Meshes, Part, is_sharded, like_param, local_gradient_of, local_of

# parameters of a group have consecutive ids, and no group has as many
_GROUP_IDS = 1 << 20
_DTYPE: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]
_DEVICE: Callable[[Tensor], torch.device] = Tensor.device.__get__
_LAYOUT: Callable[[Tensor], torch.layout] = Tensor.layout.__get__  # type: ignore[attr-defined]
_GRAD: Callable[[Tensor], Tensor | None] = Tensor.grad.__get__  # type: ignore[union-attr]


@dataclass(frozen=True)
class Slot:
    """One parameter of a bucket, at code ``start`` of the message.

    ``param_id`` does not depend on where buckets begin and end, and grows with the order of the param groups. Shape,
    strides and sizes are those of the local tensor, which is ``part`` of the parameter.
    """

    param_id: int
    name: str
    param: Tensor
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    n_bytes: int
    part: Part

    @property
    def end(self) -> int:
        """The code behind the parameter's last one, padding included."""
        return self.start + 8 * self.n_bytes

    def check_unchanged(self, device: torch.device) -> None:
        """Raise ValueError where the parameter is no longer what the bucket was laid out for."""
        p = local_of(self.param)
        if p.shape != self.shape or p.stride() != self.stride or p.dtype is not self.dtype or p.device != device:
            expected = (self.dtype, self.shape, self.stride, device)
            got = (p.dtype, tuple(p.shape), p.stride(), p.device)
            raise ValueError(
                f"parameter {self.name}: expected (dtype, shape, strides, device) {expected} as when the optimizer was "
                f"built, got {got}; build it when the model has been moved, cast or prepared"
            )


class Bucket:
    """Parameters that share a message, their flat momentum ``exp_avg`` and codes ``packed``, and 1-d views of both.

    ``n_bytes`` are those of one bit per code, padded so that rows of messages are aligned. ``first`` is the index of
    the first parameter among those of all buckets. ``params`` are local tensors. ``parity`` is that of the parameters'
    parts. Where ``is_late``, gradients or scales come from other ranks of a mesh, at `StepEngine.exchange`.
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
        self.compression, self.first = compression, 0
        self.n_bytes = aligned(slots[-1].end // 8)
        self.elements = sum(slot.numel for slot in slots)
        self.starts = [slot.start for slot in slots]
        self.param_ids = [slot.param_id for slot in slots]
        self.stream_starts = [slot.part.stream_start for slot in slots]
        self.owners = [slot.param for slot in slots]
        self.named = [(slot.name, slot.param) for slot in slots]
        self.params = [local_of(param) for param in self.owners]
        self.is_sharded = any(map(is_sharded, self.owners))
        self.parity, self.is_late = slots[0].part.parity, _is_late(compression, slots)
        self._kinds = _kinds_of(self.params)
        self.exp_avg = torch.zeros(8 * self.n_bytes, dtype=momentum_dtype, device=device)
        self.momenta = [self.exp_avg[slot.start : slot.start + slot.numel] for slot in slots]
        # the entry of `state`: in the parameter's shape and strides
        self.views = [
            like_param(slot.param, self.exp_avg.as_strided(slot.shape, slot.stride, slot.start)) for slot in slots
        ]
        bits = compression.form.bits
        # pad codes stay zero
        self.packed = torch.zeros(bits * self.n_bytes, dtype=torch.uint8, device=device)
        self._zeros: dict[torch.dtype, Tensor] = {}

    @property
    def span(self) -> slice:
        """Indices of the parameters among those of all buckets."""
        return slice(self.first, self.first + len(self.slots))

    def split(self, packed: Tensor, bits: int) -> tuple[Tensor, ...]:
        """Return each parameter's part of packed codes of ``bits``, uint8[bits * n_bytes], as views."""
        sizes = [bits * slot.n_bytes for slot in self.slots]
        parts: tuple[Tensor, ...] = torch.split(packed[: sum(sizes)], sizes)
        return parts

    def check_unchanged(self) -> None:
        """Raise ValueError where a parameter is no longer what the bucket was laid out for."""
        if self.is_sharded:
            # fully_shard moves them to other memory at the first forward
            self.params = [local_of(param) for param in self.owners]
        if _kinds_of(self.params) != self._kinds:
            for slot in self.slots:
                slot.check_unchanged(self.device)

    def gradients(self) -> tuple[list[Tensor], list[bool]]:
        """Return the gradients, of the parameters' shape or 1-d in storage order, and who has one; zeros where none.

        Raises TypeError or ValueError for gradients that cannot be read.
        """
        found = list(map(_GRAD, self.owners))
        present = [grad is not None for grad in found]
        if all(present) and not self.is_sharded and not torch.compiler.is_compiling() and self._are_like_params(found):  # type: ignore[arg-type]
            return found, present  # type: ignore[return-value]
        grads = []
        for slot, param in zip(self.slots, self.params, strict=True):
            grad = local_gradient_of(slot.name, slot.param, param)
            grads.append(self._zeros_for(slot) if grad is None else grad)
        return grads, present

    def no_gradients(self) -> tuple[list[Tensor], list[bool]]:
        """Return what `gradients` does where no parameter has one."""
        return list(map(self._zeros_for, self.slots)), [False] * len(self.slots)

    def _are_like_params(self, grads: list[Tensor]) -> bool:
        """Whether gradients are dense and as the parameters but, maybe, of another float dtype."""
        return (
            set(map(_LAYOUT, grads)) <= {torch.strided}
            and set(map(_DTYPE, grads)) <= set(FLOAT_DTYPES)
            and set(map(_DEVICE, grads)) <= {self.device}
            and list(map(Tensor.size, grads)) == self._kinds[0]
            and list(map(Tensor.stride, grads)) == self._kinds[1]
        )

    def _zeros_for(self, slot: Slot) -> Tensor:
        """Return zeros in place of a missing gradient, to be read only: a bucket's share one buffer per dtype."""
        if torch.compiler.is_compiling():
            return torch.zeros_like(slot.param)
        if slot.dtype not in self._zeros:
            largest = max(other.numel for other in self.slots if other.dtype == slot.dtype)
            self._zeros[slot.dtype] = torch.zeros(largest, dtype=slot.dtype, device=self.device)
        return self._zeros[slot.dtype][: slot.numel]

    def layout(self) -> list[object]:
        """Return what ranks must have in common to vote on this bucket."""
        return [
            self.compression,
            *((self.group_index, s.name, s.shape, s.stride, str(s.dtype), s.start) for s in self.slots),
        ]


def _kinds_of(params: list[Tensor]) -> tuple[list[Any], ...]:
    """Return shapes, strides, dtypes and devices, each by a method of C mapped over the list."""
    return tuple(list(map(of, params)) for of in (Tensor.size, Tensor.stride, _DTYPE, _DEVICE))


Members = Mapping[int, Sequence[tuple[str, Tensor]]]


def _is_late(compression: Compression, slots: Sequence[Slot]) -> bool:
    """Whether codes need what other ranks of a mesh have: the rest of a gradient, or of what has one scale."""
    return any(slot.part.may_be_partial or (compression.has_one_scale and bool(slot.part.sharded)) for slot in slots)


def build_buckets(
    members: Members,
    bucket_bytes: int,
    compressions: Sequence[AnyCompression],
    meshes: Meshes,
    ready: Mapping[Tensor, int] | None = None,
    momentum_dtype: torch.dtype = torch.float32,
) -> list[Bucket]:
    """Build buckets of at most ``bucket_bytes`` of one bit per code; a parameter that is larger has one to itself.

    ``members`` has the named parameters of param groups, ``compressions`` that of each of all groups. Parameters are in
    their own order or, where ``ready`` tells when each one's gradient is ready, in that order; then buckets too come in
    the order in which they are complete.
    """
    buckets = []
    ids = {
        param: param_id_of(group_index, i)
        for group_index, named in members.items()
        for i, (_, param) in enumerate(named)
    }
    for (group_index, device, compression, _), named in _by_kind(members, compressions, meshes).items():
        slots: list[Slot] = []
        for name, param in named if ready is None else sorted(named, key=lambda pair: ready[pair[1]]):
            if slots and slots[-1].end // 8 + packed_bytes(local_of(param).numel()) > bucket_bytes:
                buckets.append(Bucket(group_index, slots, device, compression, momentum_dtype))
                slots = []
            start = slots[-1].end if slots else 0
            slots.append(slot_of(ids[param], name, param, meshes.part_of(param), start))
        buckets.append(Bucket(group_index, slots, device, compression, momentum_dtype))
    if ready is not None:
        # those that are not sent early do not hold up others
        buckets.sort(key=lambda bucket: (bucket.is_late, max(ready[slot.param] for slot in bucket.slots)))
    return buckets


def param_id_of(group_index: int, i: int) -> int:
    """Return the id of the i-th parameter of a group, wherever buckets begin and end."""
    return group_index * _GROUP_IDS + i


def slot_of(param_id: int, name: str, param: Tensor, part: Part, start: int = 0) -> Slot:
    """Return the slot of a parameter as it is."""
    assert start % WORD_SIGNS == 0
    local = local_of(param)
    shape, n = tuple(local.shape), local.numel()
    return Slot(param_id, name, param, start, shape, local.stride(), local.dtype, n, packed_bytes(n), part)


_Kind = tuple[int, torch.device, Compression, int]


def _by_kind(
    members: Members, compressions: Sequence[AnyCompression], meshes: Meshes
) -> dict[_Kind, list[tuple[str, Tensor]]]:
    sets: dict[_Kind, list[tuple[str, Tensor]]] = {}
    for group_index, named in members.items():
        for name, param in named:
            # of the whole parameter
            compression = compression_of(compressions[group_index], param.numel())
            kind = group_index, local_of(param).device, compression, meshes.part_of(param).parity
            sets.setdefault(kind, []).append((name, param))
    return sets


def bucket_bytes_of(bucket_mb: Any) -> int:
    """Return the bytes of ``bucket_mb`` MiB, at least 8. Raises ValueError unless that is a finite number > 0."""
    if isinstance(bucket_mb, bool) or not isinstance(bucket_mb, int | float) or not 0 < bucket_mb < math.inf:
        raise ValueError(f"bucket_mb: expected MiB of packed votes > 0, got {bucket_mb!r}")
    return max(int(bucket_mb * 2**20), 8)


class BucketList:
    """The buckets of an optimizer and the hash of their layout: laid out once, extended by groups, reordered.

    ``state`` is the optimizer's: each parameter's ``exp_avg`` is kept a view into its bucket. ``compressions`` has one
    for every param group; ``choose_bytes`` chooses the size of buckets from the packed bytes of each set of parameters
    that may share them.
    """

    def __init__(
        self,
        state: Mapping[Tensor, dict[str, Any]],
        compressions: Sequence[AnyCompression],
        momentum_dtype: torch.dtype,
        choose_bytes: Callable[[Sequence[int]], int],
        meshes: Meshes,
    ) -> None:
        self._state, self._compressions, self._momentum_dtype = state, compressions, momentum_dtype
        self._meshes = meshes
        self.choose_bytes = choose_bytes
        self.all: list[Bucket] = []
        self.layout = digest([])

    @property
    def slots(self) -> list[tuple[Bucket, int, Slot]]:
        """(bucket, place in it, slot) in the order of the parameters, whatever the buckets."""
        found = [(bucket, j, slot) for bucket in self.all for j, slot in enumerate(bucket.slots)]
        return sorted(found, key=lambda place: place[2].param_id)

    def order(self, n_buckets: int) -> list[int]:
        """Return the places in the first buckets of their parameters, in the order of the param groups."""
        ids = [slot.param_id for bucket in self.all[:n_buckets] for slot in bucket.slots]
        return sorted(range(len(ids)), key=ids.__getitem__)

    def append(self, param_groups: Sequence[dict[str, Any]], groups: range, *, by_readiness: bool) -> list[Tensor]:
        """Lay out new groups behind those there are; their parameters. Where it raises, nothing has changed."""
        params = [param for i in groups for param in param_groups[i]["params"]]
        # gradients come in about the reverse of the order of use
        ready = {param: -i for i, param in enumerate(params)} if by_readiness else None
        self._use(self.all + self._lay_out(param_groups, groups, ready))
        return params

    def rearrange(self, param_groups: Sequence[dict[str, Any]], ready: Mapping[Tensor, int] | None) -> None:
        """Lay out all groups anew, in the order in which gradients get ready, if given; momentum moves along."""
        self._use(self._lay_out(param_groups, range(len(param_groups)), ready))

    def _lay_out(
        self, param_groups: Sequence[dict[str, Any]], groups: range, ready: Mapping[Tensor, int] | None
    ) -> list[Bucket]:
        members = {
            i: list(zip(parameter_names(param_groups[i], i), param_groups[i]["params"], strict=True)) for i in groups
        }
        sets = _by_kind(members, self._compressions, self._meshes).values()
        n_bytes = self.choose_bytes([sum(packed_bytes(local_of(p).numel()) for _, p in named) for named in sets])
        return build_buckets(members, n_bytes, self._compressions, self._meshes, ready, self._momentum_dtype)

    def _use(self, buckets: list[Bucket]) -> None:
        first = 0
        for bucket in buckets:
            bucket.first, first = first, first + len(bucket.slots)
            for slot, view in zip(bucket.slots, bucket.views, strict=True):
                state = self._state[slot.param]
                if "exp_avg" in state and state["exp_avg"] is not view:
                    local_of(view).copy_(local_of(state["exp_avg"]))
                state["exp_avg"] = view
        self.all, self.layout = buckets, digest([bucket.layout() for bucket in buckets])
