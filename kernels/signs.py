"""pack_signs and unpack_signs: floats to one-bit codes and back; which bits stand for zeros and ties."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import FLOAT_DTYPES, check_float, check_integer, check_packed, storage_order_view
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.scalars import count_scalar, parity_of

Count = TypeVar("Count", int, Tensor)


def abstain_parity(step: Count, rank: int, workers: int) -> Count:
    """The ``parity`` of a rank's one-bit codes in a step (rule 2): ranks that abstain cancel one another in a vote.

    ``step`` is a step counter from 0, an integer or an integer tensor.
    """
    return step + (rank + step // 4) % workers


def tie_parity(step: Count) -> Count:
    """The ``parity`` of a vote's ties in a step (rule 3): at half the frequency of abstentions."""
    return step // 2


def pack_signs(x: Tensor, *, parity: int | Tensor = 0, impl: str = "auto") -> Tensor:
    """Pack the signs of ``x`` into bits (rules 2 and 3 of docs/numerics.md).

    Args:
        x: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        parity: element j that is zero or NaN gets bit (j + parity) & 1; `abstain_parity` gives that of a rank's vote.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        uint8[packed_bytes(n)]; bit j % 8 of byte j // 8 is element j's, pad bits are 0. Without zeros or NaN in x
        this is ``numpy.packbits(x > 0, bitorder="little")`` and padding.
    """
    check_float("x", x)
    flat = storage_order_view("x", x)
    out = torch.empty(packed_bytes(flat.numel()), dtype=torch.uint8, device=x.device)
    _PACK(flat, count_scalar("parity", parity), out, impl)
    return out


def unpack_signs(packed: Tensor, n: int, *, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
    """The first n one-bit codes of ``packed`` (uint8[packed_bytes(n)]) as -1/+1 values of ``dtype``, shape [n]."""
    check_integer("n", n)
    check_packed("packed", packed, packed_bytes(n))
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    out = torch.empty(n, dtype=dtype, device=packed.device)
    _UNPACK(packed, out, impl)
    return out


def _pack(x: Tensor, parity: Tensor, out: Tensor, impl: str) -> None:
    run = backend(impl, x.device)
    if x.numel():
        run.pack_signs(x, parity_of(parity), out)
    mark_written(out)


def _unpack(packed: Tensor, out: Tensor, impl: str) -> None:
    run = backend(impl, packed.device)
    if out.numel():
        run.unpack_signs(packed, out)
    mark_written(out)


_PACK = register("pack_signs(Tensor x, Tensor parity, Tensor(a!) out, str impl) -> ()", _pack)
_UNPACK = register("unpack_signs(Tensor packed, Tensor(a!) out, str impl) -> ()", _unpack)
