"""Parameters that may be shards: the only module that knows DTensor.

A parameter is the key of its state, whole or sharded. Kernels and collectives get its local tensor and local gradient;
compressions, which go by size, the whole parameter's number of elements.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.arguments import gradient_of
from lioncub.collectives.transport import Transport
from lioncub.control import Attempt

Named = Sequence[tuple[str, Tensor]]

# a counter of random words covers so many elements
_WORDS = 4
# what a rank has of a gradient that may be a partial sum
_NONE, _READY, _PARTIAL, _FAILED = range(4)
RECIPE = """
    mesh = init_device_mesh("cuda", (nodes, gpus_per_node), mesh_dim_names=("replicate", "shard"))
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    opt = LionCub(model.named_parameters(), lr=1e-3, process_group=mesh.get_group("replicate"))"""


@dataclass(frozen=True)
class Part:
    """The elements of a whole parameter that this rank holds; indices are those of the storage order.

    Where ``is_run``, local element j is element ``first + j`` of the whole's ``numel``. ``parity`` is that of the
    whole's index minus the local one, which is 0 where it is not the same for all elements. ``sharded`` are the
    places, in `Meshes.groups`, of the groups over which the parameter is sharded.
    """

    numel: int
    first: int = 0
    is_run: bool = True
    parity: int = 0
    sharded: tuple[int, ...] = ()
    may_be_partial: bool = False

    @property
    def stream_start(self) -> int:
        """The whole's element whose random word the first local element gets: ``first``, where words allow it."""
        return self.first // _WORDS * _WORDS


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    # importing the module takes half a second, and where there is a DTensor somebody has done it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return a DTensor's local tensor, which shares its memory; any other tensor as it is."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def locals_of(named: Named) -> list[tuple[str, Tensor]]:
    """Return named local tensors."""
    return [(name, local_of(tensor)) for name, tensor in named]


def like_param(param: Tensor, local: Tensor) -> Tensor:
    """Return a local tensor with the parameter's mesh, placements and shape, sharing its memory."""
    if not is_sharded(param):
        return local
    whole: Any = param
    # a DTensor takes over the place in the storage, by which asynchronous checkpoints take it for one with data
    place = torch.empty_strided(local.shape, local.stride(), dtype=local.dtype, device=local.device)
    kind = whole.device_mesh, whole.placements
    made: Any = type(whole.data).from_local(place, *kind, run_check=False, shape=whole.shape, stride=whole.stride())
    made._local_tensor = local
    return made  # type: ignore[no-any-return]


def local_part_of(name: str, saved: Tensor, mine: Tensor) -> Tensor:
    """Return the local part of a saved tensor, sharded as ``mine`` or whole. Raises ValueError for other shards."""
    if is_sharded(saved):
        theirs: Any = saved
        ours: Any = mine
        expected = (ours.device_mesh, ours.placements) if is_sharded(mine) else "a whole tensor"
        if expected != (theirs.device_mesh, theirs.placements):
            raise ValueError(
                f"state_dict: expected {name} sharded as {expected}, got {(theirs.device_mesh, theirs.placements)}; "
                "torch.distributed.checkpoint loads shards of another mesh"
            )
        return local_of(saved)
    if not is_sharded(mine) or saved.shape != mine.shape:
        return saved
    whole: Any = mine
    from torch.distributed.tensor import distribute_tensor

    # every rank has the whole, so nothing is sent
    there = saved.to(whole.device)
    return local_of(distribute_tensor(there, whole.device_mesh, whole.placements, src_data_rank=None))


def local_gradient_of(name: str, param: Tensor, local: Tensor) -> Tensor | None:
    """Return `gradient_of` the local tensor: the local part of the parameter's gradient.

    Raises RuntimeError where it is a partial sum, or sharded otherwise: what it holds is no gradient of the local part.
    """
    grad: Any = param.grad
    if grad is None or local is param:
        return gradient_of(name, local, grad)
    if not is_sharded(grad) or grad.placements != param.placements:  # type: ignore[attr-defined]
        got = grad.placements if is_sharded(grad) else type(grad).__name__
        raise RuntimeError(f"gradient of {name}: expected placements {param.placements}, got {got}")  # type: ignore[attr-defined]
    return gradient_of(name, local, local_of(grad))


def describe(param: Tensor) -> str:
    """Return a parameter's dtype, shape and strides, and placements where it has some: all ranks' alike."""
    text = f"{param.dtype}, shape {tuple(param.shape)}, strides {param.stride()}"
    if is_sharded(param):
        whole: Any = param
        sizes = tuple(whole.device_mesh.mesh.shape)
        text += f", placements {tuple(map(str, whole.placements))} on a mesh of {sizes}"
    return text


def align_gradient(param: Tensor) -> None:
    """Give a gradient that is a partial sum, or sharded otherwise, the parameter's placements; a collective."""
    grad: Any = param.grad
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        param.grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


class Meshes:
    """The device meshes of sharded parameters: over which groups a parameter is in parts, or replicated.

    ``groups`` are those of several ranks, in the order of the parameters; ``ranks`` all of their ranks and this one,
    numbered in the world.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.groups: list[dist.ProcessGroup] = []
        self.ranks: set[int] = {dist.get_rank()} if dist.is_initialized() else {0}
        self._places: dict[str, int] = {}
        self.add(params)

    def add(self, params: Iterable[Tensor]) -> None:
        """Take in the meshes of further parameters."""
        for param in filter(is_sharded, params):
            mesh: Any = param.device_mesh  # type: ignore[attr-defined]
            self.ranks |= set(mesh.mesh.flatten().tolist())
            for group in mesh.get_all_groups():
                if group.size() > 1 and group.group_name not in self._places:
                    self._places[group.group_name] = len(self.groups)
                    self.groups.append(group)

    def part_of(self, param: Tensor) -> Part:
        """Return which part of a parameter this rank holds."""
        if not is_sharded(param):
            return Part(param.numel())
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        whole: Any = param
        local = local_of(param)
        shape, offset = compute_local_shape_and_global_offset(whole.shape, whole.device_mesh, whole.placements)
        strides, sizes = whole.stride(), tuple(local.shape)
        first = sum(at * stride for at, stride in zip(offset, strides, strict=True)) if local.numel() else 0
        # one of another shape was not cut as torch cuts, so that nobody knows where it begins
        is_known = tuple(shape) == sizes
        differs = any((a - b) % 2 for a, b, n in zip(strides, local.stride(), sizes, strict=True) if n > 1)
        pairs = list(zip(whole.device_mesh.get_all_groups(), whole.placements, strict=True))
        shared = [(group, placement) for group, placement in pairs if group.size() > 1]
        return Part(
            numel=param.numel(),
            first=first if is_known else 0,
            is_run=is_known and _is_run(tuple(whole.shape), strides, sizes),
            parity=first % 2 if is_known and not differs else 0,
            sharded=tuple(self._places[group.group_name] for group, placement in shared if _cuts(placement)),
            may_be_partial=any(not _cuts(placement) for _, placement in shared),
        )

    def check(self, named: Named, voting: Sequence[int]) -> None:
        """Raise ValueError where ranks that vote together hold other shards, or gradients that are averaged already.

        ``voting`` are the ranks of the vote, numbered in the world.
        """
        for name, param in named:
            if not is_sharded(param):
                continue
            whole: Any = param
            mesh = whole.device_mesh
            device = local_of(param).device.type
            if device != mesh.device_type:
                raise ValueError(
                    f"parameter {name}: expected a shard on the mesh's device {mesh.device_type}, got one on {device}; "
                    "CPUOffloadPolicy is not supported"
                )
            for placement, group in zip(whole.placements, mesh.get_all_groups(), strict=True):
                both = sorted(set(dist.get_process_group_ranks(group)) & set(voting))
                if len(both) < 2:
                    continue
                if _cuts(placement):
                    raise ValueError(
                        f"process_group: expected ranks that hold the same shard of parameter {name}, got ranks "
                        f"{both}, which hold others; vote between nodes and shard inside them:{RECIPE}"
                    )
                raise ValueError(
                    f"parameter {name}: expected a mesh that does not replicate over the ranks that vote, got one that "
                    f"does over ranks {both}, as fully_shard on a 2-d mesh does, which averages gradients between "
                    f"them; shard on the shard dimension alone:{RECIPE}"
                )

    def replicated(self, named: Named) -> list[tuple[dist.ProcessGroup, list[tuple[str, Tensor]]]]:
        """Return the groups of meshes over which some DTensors are replicated, with these."""
        found: dict[int, list[tuple[str, Tensor]]] = {}
        for name, param in filter(lambda pair: is_sharded(pair[1]), named):
            whole: Any = param
            for group, placement in zip(whole.device_mesh.get_all_groups(), whole.placements, strict=True):
                if group.size() > 1 and not _cuts(placement):
                    found.setdefault(self._places[group.group_name], []).append((name, param))
        return [(self.groups[place], found[place]) for place in sorted(found)]

    def align_gradients(self, named: Named, attempt: Attempt, device: torch.device) -> None:
        """Sum gradients that are partial sums, as sequence parallelism leaves them; a collective of all meshes.

        Mutates ``grad`` of the parameters, where all ranks of the meshes have the same to do. ``named`` are those whose
        gradients may be partial sums.
        """
        mine = [_FAILED if attempt.failure is not None else _kind_of(param) for _, param in named]
        kinds = torch.tensor(mine, dtype=torch.int64, device=device)
        least, most = kinds, kinds
        for group in self.groups:
            everyone = Transport(group, device).gather(torch.cat([least, most])).wait()
            least, most = everyone[:, : len(mine)].amin(0), everyone[:, len(mine) :].amax(0)
        ranges = list(zip(least.tolist(), most.tolist(), strict=True))
        if any(high == _FAILED for _, high in ranges):
            return
        for (name, param), (low, high) in zip(named, ranges, strict=True):
            if low != high:
                attempt.run(_refuse_gradient, name)
            elif high == _PARTIAL:
                align_gradient(param)

    def combined(self, values: Tensor, parts: Sequence[Part], reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Return values [n], one of each part, reduced over the groups that hold the other parts of its parameter.

        ``reduce`` takes [ranks, n] to [n]. A collective of all meshes.
        """
        for place, group in enumerate(self.groups):
            everyone = Transport(group, values.device).gather(values).wait()
            is_sharded_here = torch.tensor([place in part.sharded for part in parts], device=values.device)
            values = torch.where(is_sharded_here, reduce(everyone), values)
        return values


def _is_run(shape: tuple[int, ...], strides: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    """Whether a block of ``sizes`` of a tensor is a run of its storage: one slice of one dimension, of which the outer
    ones have one element and the inner ones all.
    """
    order = sorted(range(len(shape)), key=lambda d: -strides[d])
    outer = [d for d in order if sizes[d] != shape[d]]
    if not outer or 0 in sizes:
        return True
    return all(sizes[d] == 1 for d in order[: order.index(outer[-1])])


def _cuts(placement: Any) -> bool:
    """Whether a placement gives every rank another part."""
    return not (placement.is_replicate() or placement.is_partial())


def _kind_of(param: Tensor) -> int:
    grad: Any = param.grad
    if grad is None:
        return _NONE
    if not is_sharded(grad):
        return _READY
    return _READY if grad.placements == param.placements else _PARTIAL  # type: ignore[attr-defined]


def _refuse_gradient(name: str) -> None:
    raise RuntimeError(
        f"gradient of {name}: expected it on all ranks of its mesh or on none, and with the same placements, got others"
    )
