"""majority_vote: N packed messages to one, on packed words."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import check_counts, check_device, check_packed, check_rows
from lioncub.kernels.overlaps import check_apart
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.scalars import count_scalar, parity_of


def majority_vote(
    packed: Tensor,
    *,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Majority of N voters' one-bit codes, without unpacking them (rule 4 of docs/numerics.md).

    Args:
        packed: uint8[N, B], one row per voter, N >= 1; rows may lie apart (any row stride), bytes may not.
        parity: a tie at element j gives bit (j + parity) & 1; `tie_parity` gives that of a step.
        out: uint8[B] to write, memory of no other argument; allocated unless given.
        counts: int64[2]; the numbers of tied and of unanimous codes among all 8*B are added to it.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: bit 1 where more voters have 1 than 0. Pad codes, 0 everywhere, stay 0 and count as unanimous.
    """
    check_rows("packed", packed, "N, B")
    n_bytes = packed.shape[1]
    if out is None:
        out = torch.empty(n_bytes, dtype=torch.uint8, device=packed.device)
    check_packed("out", out, n_bytes)
    check_device("out", out, "packed", packed)
    check_counts(counts, "packed", packed)
    _VOTE(packed, count_scalar("parity", parity), out, counts, impl)
    return out


def _vote(packed: Tensor, parity: Tensor, out: Tensor, counts: Tensor | None, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out, "counts": counts}, {"packed": packed})
    if out.numel():
        run.majority_vote(packed, parity_of(parity), out, counts)
    mark_written(out, counts)


_VOTE = register(
    "majority_vote(Tensor packed, Tensor parity, Tensor(a!) out, Tensor(b!)? counts, str impl) -> ()", _vote
)
