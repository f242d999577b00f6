"""Inputs that the kernel tests share: values with everything that floats can be, and bit-exact comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lioncub.kernels.lists import TensorList

# the last needs several tiles even of triton's interpreter
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1009, 16411)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SPECIAL = (0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 6e-8, -6e-8, float("nan"), float("inf"), float("-inf"))
_FINITE = _SPECIAL[:8]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def sample(n: int, dtype: torch.dtype, seed: int, *, finite: bool = False) -> Tensor:
    """n normal values of many magnitudes, about a third replaced by zeros, denormals, NaN and infinities."""
    # the same whatever torch.set_default_dtype and torch.set_default_device say
    floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "generator": torch.Generator().manual_seed(seed)}
    integers = floats | {"dtype": torch.int64}
    tens = torch.full((n,), 10.0, dtype=torch.float32, device="cpu")
    values = torch.randn(n, **floats) * tens ** torch.randint(-4, 3, (n,), **integers)
    special = torch.tensor(_FINITE if finite else _SPECIAL, dtype=torch.float32, device="cpu")
    chosen = special[torch.randint(len(special), (n,), **integers)]
    return torch.where(torch.rand(n, **floats) < 0.33, chosen, values).to(dtype)


def poisoned(n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """n elements of memory that no kernel would write by chance."""
    if dtype.is_floating_point:
        return torch.full((n,), float("nan"), dtype=dtype)
    return torch.full((n,), 0x5B, dtype=dtype)


def fields_of(packed: Tensor, bits: int) -> Tensor:
    """int32: every field of ``bits`` bits of uint8[B], taken apart bit by bit."""
    places = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    numbers = places.reshape(-1, bits).to(torch.int32) << torch.arange(bits, dtype=torch.int32)
    return numbers.sum(dim=1, dtype=torch.int32)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Fail, naming the first element that differs and both values, unless all bits are equal (any NaN equals any)."""
    assert got.dtype == expected.dtype, f"{what}: expected {expected.dtype}, got {got.dtype}"
    assert got.shape == expected.shape, f"{what}: expected shape {expected.shape}, got {got.shape}"
    raw = _INTEGERS[got.element_size()]
    same = got.contiguous().view(raw) == expected.contiguous().view(raw)
    if got.dtype.is_floating_point:
        same |= got.isnan() & expected.isnan()
    wrong = (~same).flatten().nonzero().flatten()
    if len(wrong):
        i = int(wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} elements differ, first {i}: expected {expected.flatten()[i]}, got {got.flatten()[i]}"
        )


def listed(tensors: Sequence[Tensor]) -> TensorList:
    """Flat tensors as the ops hand them to a backend."""
    found = TensorList("tensors", tensors)
    found.addresses = tuple(tensor.data_ptr() for tensor in tensors)
    return found
