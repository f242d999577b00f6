"""Checks of the lists that ops over many tensors take, before anything is written.

An optimizer makes them in every step, so while all is well they are a few methods of C mapped over each list; what is
wrong, and where, is looked for only then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import FLOAT_DTYPES, check_dense
from lioncub.kernels.tensor_lists import TensorList

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_IS_CPU: Callable[[Tensor], bool] = Tensor.is_cpu.__get__  # type: ignore[attr-defined]


def check_list_types(**lists: object) -> None:
    """Raise TypeError unless each argument is a sequence of tensors."""
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        if _PLAIN.issuperset(map(type, tensors)):
            continue
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}]: expected a torch.Tensor, got {type(tensor).__name__}")


def check_float_lists(**lists: TensorList) -> None:
    """Raise TypeError or ValueError unless all lists are as long as the first, and tensors of one place alike.

    They are 1-d, contiguous, fp32, bf16 or fp16, and of one size; all are on one device.
    """
    peer_name, peers = next(iter(lists.items()))
    for name, tensors in lists.items():
        _check_list(name, tensors, FLOAT_DTYPES, peers.sizes, (peer_name, peers))


def check_code_list(name: str, packed: TensorList, n_bytes: Sequence[int], peer_name: str, peers: TensorList) -> None:
    """Raise unless ``packed`` are contiguous uint8 on the device of ``peers``, of so many bytes."""
    _check_list(name, packed, (torch.uint8,), n_bytes, (peer_name, peers))


def code_bytes(sizes: Sequence[int], bits: int = 1) -> list[int]:
    """``bits * packed_bytes(size)`` for each size, without a call for each."""
    return [(size + 63) // 64 * 8 * bits for size in sizes]


def check_scale_list(scale: TensorList, counts: Sequence[int], peer_name: str, peers: TensorList) -> None:
    """Raise unless ``scale`` are contiguous fp32 on the device of ``peers``, of so many elements."""
    _check_list("scale", scale, (torch.float32,), counts, (peer_name, peers))


def _check_list(
    name: str,
    tensors: TensorList,
    dtypes: Sequence[torch.dtype],
    sizes: Sequence[int],
    peers: tuple[str, TensorList],
) -> None:
    if len(tensors) != len(sizes):
        raise ValueError(f"{name}: expected {len(sizes)} tensors, one for each of {peers[0]}, got {len(tensors)}")
    if not sizes or _are_fine(tensors, dtypes, sizes, peers[1][0]):
        return
    device = peers[1][0].device
    for i, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        check_dense(f"{name}[{i}]", tensor, dtypes)
        if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != size:
            raise ValueError(
                f"{name}[{i}]: expected a contiguous tensor of shape ({size},), "
                f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
            )
        if tensor.device != device:
            raise ValueError(f"{name}[{i}]: expected device {device} ({peers[0]}'s), got {tensor.device}")


def _are_fine(tensors: TensorList, dtypes: Sequence[torch.dtype], sizes: Sequence[int], first: Tensor) -> bool:
    """Whether a list is as `_check_list` wants it; False also where it takes a closer look to know."""
    count = len(tensors)
    return (
        tensors.sizes == sizes
        and set(tensors.dtypes).issubset(dtypes)
        and list(map(Tensor.dim, tensors)).count(1) == count
        and all(map(Tensor.is_contiguous, tensors))
        # an index of -1 is that of several devices
        and (all(map(_IS_CPU, tensors)) if first.is_cpu else _index_of(tensors) == first.get_device() >= 0)
    )


def _index_of(tensors: Sequence[Tensor]) -> int:
    """The device index of all ``tensors``, -1 where they differ."""
    indices = set(map(Tensor.get_device, tensors))
    return indices.pop() if len(indices) == 1 else -1
