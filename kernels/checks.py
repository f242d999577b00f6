"""Argument checks shared by the public kernels. Every message names argument, expected, got."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_META = torch.device("meta")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a dense fp32, bf16 or fp16 tensor with data."""
    check_dense(name, tensor, FLOAT_DTYPES)


def check_dense(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless ``tensor`` is a dense tensor of one of ``dtypes``, ValueError where it has no data."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected {_tensor_of(dtypes, 'a torch.Tensor')}, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        *others, last = map(_name_of, dtypes)
        several = f"dtype {', '.join(others)} or {last}"
        raise TypeError(f"{name}: expected {_tensor_of(dtypes, several)}, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")


def check_all_or_none(**arguments: object) -> None:
    """Raise ValueError where only some of the arguments are given."""
    given = [name for name, value in arguments.items() if value is not None]
    if 0 < len(given) < len(arguments):
        raise ValueError(f"{', '.join(arguments)}: expected all or none, got {', '.join(given)}")


def check_same_storage_order(name: str, tensor: Tensor, peer_name: str, peer: Tensor) -> None:
    """Raise ValueError unless both tensors have the same shape, device and storage order."""
    check_device(name, tensor, peer_name, peer)
    if tensor.shape != peer.shape:
        raise ValueError(f"{name}: expected shape {tuple(peer.shape)} ({peer_name}'s), got {tuple(tensor.shape)}")
    if tensor.stride() != peer.stride() and not (tensor.is_contiguous() and peer.is_contiguous()):
        raise ValueError(f"{name}: expected strides {peer.stride()} ({peer_name}'s), got {tensor.stride()}")


def check_device(name: str, tensor: Tensor, peer_name: str, peer: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != peer.device:
        raise ValueError(f"{name}: expected device {peer.device} ({peer_name}'s), got {tensor.device}")


def packed_out(out: Tensor | None, n_bytes: int, source: str, tensor: Tensor) -> Tensor:
    """Return ``out``, which holds ``n_bytes`` of codes of ``tensor``, named ``source``; a new tensor for None."""
    if out is None:
        return torch.empty(n_bytes, dtype=torch.uint8, device=tensor.device)
    check_flat("out", out, torch.uint8, n_bytes, source, tensor)
    return out


def check_flat(
    name: str, tensor: Tensor | None, dtype: torch.dtype, count: int, peer_name: str = "", peer: Tensor | None = None
) -> None:
    """Raise unless ``tensor`` is None or contiguous, of ``dtype`` and shape [count], and on the device of ``peer``."""
    if tensor is None:
        return
    is_right = type(tensor) is Tensor and tensor.dtype == dtype and tensor.shape == (count,) and tensor.is_contiguous()
    if is_right and peer is not None and tensor.device == peer.device != _META:
        return
    check_dense(name, tensor, (dtype,))
    if tensor.shape != (count,) or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous {_name_of(dtype)} tensor of shape ({count},), "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    if peer is not None:
        check_device(name, tensor, peer_name, peer)


def check_bytes(name: str, packed: Tensor, multiple: int = 1) -> int:
    """Return the bytes of ``packed``; raise unless it is contiguous uint8[n], n a multiple of ``multiple``."""
    check_dense(name, packed, (torch.uint8,))
    check_flat(name, packed, torch.uint8, packed.numel())
    if packed.numel() % multiple:
        raise ValueError(f"{name}: expected a multiple of {multiple} bytes, got {packed.numel()}")
    return packed.numel()


def check_rows(name: str, tensor: Tensor, axes: str) -> None:
    """Raise unless ``tensor`` is uint8 with these axes, of which only the last may be 0, and its bytes adjacent."""
    check_dense(name, tensor, (torch.uint8,))
    if tensor.dim() != len(axes.split(", ")) or 0 in tensor.shape[:-1]:
        leading = axes[: axes.rindex(",")]
        raise ValueError(f"{name}: expected shape [{axes}] with {leading} >= 1, got {tuple(tensor.shape)}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected rows of adjacent bytes, got strides {tensor.stride()}")


def check_integer(name: str, value: Any, least: int | None = 0, most: int | None = None) -> None:
    """Raise TypeError unless ``value`` is an integer, ValueError unless it is in ``least`` .. ``most``."""
    is_integer: bool = isinstance(value, int | numbers.Integral) and not isinstance(value, bool)
    if not is_integer:
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f">= {least}" if most is None else f"in {least} .. {most}"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")


def check_choice(name: str, value: object, choices: Sequence[int]) -> None:
    """Raise ValueError unless ``value`` is one of these integers."""
    if isinstance(value, bool) or not isinstance(value, int) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def storage_order_view(name: str, tensor: Tensor) -> Tensor:
    """Return a 1-d view of a dense tensor in storage order, sharing memory.

    Raises ValueError where elements overlap or leave gaps, since no such view exists.
    """
    if tensor.is_contiguous():
        return tensor if tensor.dim() == 1 else tensor.view(-1)
    if not is_dense(tensor.shape, tensor.stride()):
        raise ValueError(
            f"{name}: expected a dense tensor without gaps or overlaps (contiguous, channels_last, permuted), "
            f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill a contiguous piece of storage, each place once, in whatever order."""
    if 0 in shape:
        return True
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def _tensor_of(dtypes: Sequence[torch.dtype], several: str) -> str:
    return f"a {_name_of(dtypes[0])} tensor" if len(dtypes) == 1 else several


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
