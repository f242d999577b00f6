"""count_votes and majority_of_counts: a vote in two steps, whose counts travel between them as bit planes."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import check_counts, check_device, check_integer, check_packed, check_rows
from lioncub.kernels.layout import counter_planes
from lioncub.kernels.overlaps import check_apart
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.scalars import count_scalar, parity_of

MAX_VOTERS = 2**20


def count_votes(packed: Tensor, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Number of ones in each one-bit code of N voters, as bit planes; nothing is unpacked.

    Args:
        packed: uint8[N, B], one row per voter, N >= 1; rows may lie apart (any row stride), bytes may not.
        out: uint8[P, B] to write, P = counter_planes(N); rows may lie apart, bytes may not. Its memory is that of no
            argument. Allocated unless given.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: row k holds bit k of the counts, at the places of the codes.
    """
    check_rows("packed", packed, "N, B")
    planes, n_bytes = counter_planes(packed.shape[0]), packed.shape[1]
    if out is None:
        out = torch.empty(planes, n_bytes, dtype=torch.uint8, device=packed.device)
    check_rows("out", out, "P, B")
    if out.shape != (planes, n_bytes):
        raise ValueError(f"out: expected shape {(planes, n_bytes)}, got {tuple(out.shape)}")
    if planes > 1 and out.stride(0) < n_bytes:
        raise ValueError(f"out: expected rows that do not overlap, got strides {out.stride()}")
    check_device("out", out, "packed", packed)
    _COUNT(packed, out, impl)
    return out


def majority_of_counts(
    planes: Tensor,
    *,
    voters: int,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Majority of all voters from the counts of G groups of them: summed and compared in one pass, never unpacked.

    ``majority_of_counts(torch.stack([count_votes(g) for g in groups]), voters=N)`` is `majority_vote` of all N rows.

    Args:
        planes: uint8[G, P, B], bit planes of each group's number of ones; groups and planes may lie apart (any
            strides), bytes may not. A group that needs fewer planes has zeros in the others.
        voters: number of voters of all groups, 1 <= voters <= G * (2^P - 1), at most 2^20.
        parity: a tie at element j gives bit (j + parity) & 1; `tie_parity` gives that of a step.
        out: uint8[B] to write, memory of no other argument; allocated unless given.
        counts: int64[2]; the numbers of tied and of unanimous codes among all 8*B are added to it.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: bit 1 where the sum of the counts is more than half of the voters.
    """
    check_rows("planes", planes, "G, P, B")
    largest = planes.shape[0] * (2 ** planes.shape[1] - 1)
    # the sum is held in 32 bits, whatever the planes contain
    if largest >= 2**31:
        raise ValueError(f"planes: expected counts whose sum is below 2^31, got shape {tuple(planes.shape)}")
    most = min(largest, MAX_VOTERS)
    check_integer("voters", voters, least=None)
    if not 1 <= voters <= most:
        raise ValueError(f"voters: expected 1 to {most} for planes of shape {tuple(planes.shape)}, got {voters}")
    if out is None:
        out = torch.empty(planes.shape[2], dtype=torch.uint8, device=planes.device)
    check_packed("out", out, planes.shape[2])
    check_device("out", out, "planes", planes)
    check_counts(counts, "planes", planes)
    _SUM(planes, voters, count_scalar("parity", parity), out, counts, impl)
    return out


def _count(packed: Tensor, out: Tensor, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out}, {"packed": packed})
    if out.numel():
        run.count_votes(packed, out)
    mark_written(out)


def _sum(planes: Tensor, voters: int, parity: Tensor, out: Tensor, counts: Tensor | None, impl: str) -> None:
    run = backend(impl, planes.device)
    check_apart({"out": out, "counts": counts}, {"planes": planes})
    if out.numel():
        run.majority_of_counts(planes, voters, parity_of(parity), out, counts)
    mark_written(out, counts)


_COUNT = register("count_votes(Tensor packed, Tensor(a!) out, str impl) -> ()", _count)
_SUM = register(
    "majority_of_counts(Tensor planes, int voters, Tensor parity, Tensor(a!) out, Tensor(b!)? counts, str impl) -> ()",
    _sum,
)
