"""Signs of values, and of Lion's updates, as one-bit codes, and back; which bits stand for zeros and ties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lioncub.kernels.checks import FLOAT_DTYPES, check_flat, check_float, check_integer
from lioncub.kernels.dispatch import backend, mark_written, register
from lioncub.kernels.layout import code_bytes, packed_bytes
from lioncub.kernels.lists import (
    Tensors,
    check_lists_apart,
    firsts_of,
    flat_list,
    float_list,
    tensor_lists,
    update_lists,
)
from lioncub.kernels.scalars import Scalar, count_scalar, float_scalar, mix_of, parity_of

Count = TypeVar("Count", int, Tensor)


def abstain_parity(step: Count, rank: int, workers: int) -> Count:
    """Return the ``parity`` of a rank's one-bit codes in a step (rule 2): ranks that abstain cancel one another.

    ``step`` is a step counter from 0, an integer or an integer tensor.
    """
    return step + (rank + step // 4) % workers


def tie_parity(step: Count) -> Count:
    """Return the ``parity`` of a vote's ties in a step (rule 3): at half the frequency of abstentions."""
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
    out = torch.empty(packed_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    _ENCODE([x], [], None, count_scalar("parity", parity), [out], None, None, None, impl)
    return out


def unpack_signs(packed: Tensor, n: int, *, dtype: torch.dtype = torch.float32, impl: str = "auto") -> Tensor:
    """Return the first n codes of ``packed`` (uint8[packed_bytes(n)]) as -1/+1 values of ``dtype``, shape [n]."""
    check_integer("n", n)
    check_flat("packed", packed, torch.uint8, packed_bytes(n))
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    out = torch.empty(n, dtype=dtype, device=packed.device)
    _UNPACK(packed, out, impl)
    return out


def lion_encode(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Pack the signs of Lion's update ``beta1*exp_avg + (1-beta1)*grad`` (Chen et al. 2023, arXiv 2302.06675).

    Reads exp_avg and grad once; changes nothing but ``out`` and ``nonfinite``.

    Args:
        exp_avg: fp32, bf16 or fp16 momentum of grad's shape and storage order.
        grad: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        beta1: number in [0, 1] or 0-dim tensor.
        parity: element j whose update is zero or NaN gets bit (j + parity) & 1; see `abstain_parity`.
        out: uint8[packed_bytes(n)] to write; allocated unless given.
        nonfinite: int32[1], set to 1 where any element of grad, exp_avg or the update is not finite; never cleared.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``.
    """
    out = _codes_of(grad, out)
    foreach_lion_encode([exp_avg], [grad], beta1=beta1, parity=parity, out=[out], nonfinite=nonfinite, impl=impl)
    return out


def lion_encode_(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    beta2: Scalar,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`lion_encode`, and in the same pass ``exp_avg = beta2*exp_avg + (1-beta2)*grad``.

    Mutates exp_avg, ``out`` and ``nonfinite``; an element whose update is not finite keeps its momentum.
    """
    out = _codes_of(grad, out)
    m, g, codes = tensor_lists({"exp_avg": [exp_avg], "grad": [grad], "out": [out]}, {}, None)
    check_flat("nonfinite", nonfinite, torch.int32, len(g), "grad", g[0] if g else None)
    betas = float_scalar("beta1", beta1, 0.0, 1.0), float_scalar("beta2", beta2, 0.0, 1.0)
    _ENCODE_(m, g, *betas, count_scalar("parity", parity), codes, nonfinite, impl)
    return out


def foreach_lion_encode(
    exp_avg: Tensors,
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    parity: int | Tensor,
    out: Tensors,
    nonfinite: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`lion_encode` of lists; ``nonfinite`` is int32[n] for n tensors. With ``starts`` momentum and codes are flat."""
    g, m, codes = tensor_lists({"grad": grad}, {"exp_avg": exp_avg, "out": out}, starts)
    check_flat("nonfinite", nonfinite, torch.int32, len(g), "grad", g[0] if g else None)
    b1, scale = float_scalar("beta1", beta1, 0.0, 1.0), float_scalar("grad_scale", grad_scale)
    _ENCODE(m, g, b1, count_scalar("parity", parity), codes, nonfinite, scale, starts, impl)


def _codes_of(grad: Tensor, out: Tensor | None) -> Tensor:
    """``out``, or memory for the one-bit codes of ``grad``."""
    check_float("grad", grad)
    return torch.empty(packed_bytes(grad.numel()), dtype=torch.uint8, device=grad.device) if out is None else out


def _encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor | None,
    parity: Tensor,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    grad_scale: Tensor | None,
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    """Encode the signs of ``exp_avg`` itself or, with ``beta1``, of updates."""
    places = None if starts is None else tuple(starts)
    m, g, mix = update_lists(exp_avg, grad, beta1, grad_scale, places)
    peers = m if g is None else g
    codes = flat_list("out", out, torch.uint8, code_bytes(peers.sizes), peers, firsts_of(places, peers.sizes, 1))
    check_lists_apart([codes], [peers, m])
    if peers.sizes:
        backend(impl, exp_avg[0].device).lion_encode(m, g, mix, parity_of(parity), codes, nonfinite)
    mark_written(out, nonfinite)


def _encode_(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    beta2: Tensor,
    parity: Tensor,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    impl: str,
) -> None:
    g = float_list("grad", grad)
    m, codes = float_list("exp_avg", exp_avg, g), flat_list("out", out, torch.uint8, code_bytes(g.sizes), g)
    check_lists_apart([codes, m], [g])
    if grad:
        run = backend(impl, grad[0].device)
        run.lion_encode(m, g, mix_of(beta1), parity_of(parity), codes, nonfinite, mix_of(beta2))
    mark_written(exp_avg, out, nonfinite)


_UNPACK = register("unpack_signs(Tensor packed, Tensor(a!) out, str impl) -> ()")
_ENCODE = register(
    "lion_encode(Tensor[] exp_avg, Tensor[] grad, Tensor? beta1, Tensor parity, Tensor(a!)[] out, "
    "Tensor(b!)? nonfinite, Tensor? grad_scale, int[]? starts, str impl) -> ()",
    _encode,
)
_ENCODE_ = register(
    "lion_encode_(Tensor(a!)[] exp_avg, Tensor[] grad, Tensor beta1, Tensor beta2, Tensor parity, "
    "Tensor(b!)[] out, Tensor(c!)? nonfinite, str impl) -> ()",
    _encode_,
)
