"""Votes on packed codes, which are never unpacked: majorities of rows, of counts in bit planes, and of sums in fields.

A count travels as bit planes: bit k of the count of code i is bit i of plane k. A sum travels in fields that a native
sum of bytes adds up: each as wide as the largest sum needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.checks import (
    check_bytes,
    check_choice,
    check_device,
    check_flat,
    check_integer,
    check_rows,
    packed_out,
)
from lioncub.kernels.dispatch import register
from lioncub.kernels.layout import CODE_BITS, FIELD_BITS, WORD_BYTES, counter_planes
from lioncub.kernels.scalars import count_scalar

MAX_VOTERS = 2**20
# 2-bit codes of 32 fields fill a word
_WORD_TERNARIES = 32


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
    out = packed_out(out, n_bytes, "packed", packed)
    check_flat("counts", counts, torch.int64, 2, "packed", packed)
    _MAJORITY(packed, count_scalar("parity", parity), out, counts, impl)
    return out


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
    out = packed_out(out, planes.shape[2], "planes", planes)
    check_flat("counts", counts, torch.int64, 2, "planes", planes)
    _MAJORITY_OF_COUNTS(planes, voters, count_scalar("parity", parity), out, counts, impl)
    return out


def spread_codes(
    packed: Tensor, *, bits: int, field_bits: int, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Put every ``bits``-bit code into a field of ``field_bits`` bits, whose other bits are zero.

    Sums of such bytes (as uint8, or as int16 or int32 words where fields have 16 bits) add field by field while no sum
    exceeds a field: `lioncub.kernels.field_bits` tells how wide it must be.

    Args:
        packed: contiguous uint8[B], B a multiple of 8.
        bits: width of a code: 1, 2, 4 or 8.
        field_bits: width of a field: 1, 2, 4, 8 or 16, at least ``bits``.
        out: ``uint8[B*field_bits//bits]`` to write, memory of no other argument; allocated unless given.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: field i is code i, little-endian as the codes are.
    """
    check_choice("bits", bits, CODE_BITS)
    check_bytes("packed", packed, WORD_BYTES)
    return add_codes(packed.unsqueeze(0), bits=bits, field_bits=field_bits, out=out, impl=impl)


def majority_of_fields(
    fields: Tensor,
    *,
    field_bits: int,
    voters: int,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Packed majority of fields that hold the number of ones among ``voters`` one-bit codes.

    ``majority_of_fields(sum of spread_codes(row) over N rows, voters=N)`` is `majority_vote` of the rows.

    Args:
        fields: contiguous uint8[F], F a multiple of ``field_bits``.
        field_bits: width of a field: 1, 2, 4, 8 or 16.
        voters: 1 <= voters < 2^field_bits.
        parity: a tie at element j gives bit (j + parity) & 1; `tie_parity` gives that of a step.
        out: uint8[F/field_bits] to write, memory of no other argument; allocated unless given.
        counts: int64[2]; the numbers of tied and of unanimous fields are added to it.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: one bit per field, 1 where it is more than half of the voters.
    """
    check_choice("field_bits", field_bits, FIELD_BITS)
    check_integer("voters", voters, least=None)
    if not 1 <= voters < 2**field_bits:
        raise ValueError(f"voters: expected 1 to {2**field_bits - 1} for fields of {field_bits} bits, got {voters}")
    n_bytes = check_bytes("fields", fields, field_bits) // field_bits
    out = packed_out(out, n_bytes, "fields", fields)
    check_flat("counts", counts, torch.int64, 2, "fields", fields)
    _MAJORITY_OF_FIELDS(fields, field_bits, voters, count_scalar("parity", parity), out, counts, impl)
    return out


def add_codes(packed: Tensor, *, bits: int, field_bits: int, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """Add up every ``bits``-bit code over rows, into a field of ``field_bits`` bits.

    No sum may exceed a field: `lioncub.kernels.field_bits` tells how wide it must be.

    Args:
        packed: uint8[G, B], rows of adjacent bytes with any distance between them, G >= 1, B a multiple of 8.
        bits: width of a code: 1, 2, 4, 8 or 16.
        field_bits: width of a field: 1, 2, 4, 8 or 16, at least ``bits``.
        out: ``uint8[B*field_bits//bits]`` to write, memory of no other argument; allocated unless given.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``: field i is the sum of code i of all rows.
    """
    for name, width in (("bits", bits), ("field_bits", field_bits)):
        check_choice(name, width, FIELD_BITS)
    if field_bits < bits:
        raise ValueError(f"field_bits: expected at least bits, {bits}, got {field_bits}")
    check_rows("packed", packed, "G, B")
    n_bytes = packed.shape[1]
    if n_bytes % WORD_BYTES:
        raise ValueError(f"packed: expected rows of a multiple of {WORD_BYTES} bytes, got {n_bytes}")
    out = packed_out(out, n_bytes * field_bits // bits, "packed", packed)
    _ADD(packed, bits, field_bits, out, impl)
    return out


def ternary_of_fields(
    fields: Tensor,
    *,
    field_bits: int,
    step: int = 1,
    offset: int = 0,
    largest: int,
    out: Tensor | None = None,
    counts: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the sign of every ``step*field - offset`` as a 2-bit code 1 + sign: 0, 1 or 2.

    Args:
        fields: contiguous uint8[F] of n fields, n a multiple of 32.
        field_bits: width of a field: 1, 2, 4, 8 or 16.
        step: an integer >= 1.
        offset: an integer >= 0; no difference may leave int32.
        largest: the largest sum that there can be, for ``counts``.
        out: uint8[n//4] to write, memory of no other argument; allocated unless given.
        counts: int64[2]; the number of fields whose sign is 0, and of those that are 0 or ``largest``, are added to it.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``.
    """
    check_choice("field_bits", field_bits, FIELD_BITS)
    for name, value in (("step", step), ("offset", offset), ("largest", largest)):
        check_integer(name, value, -(2**63), 2**63 - 1)
    if step < 1 or offset < 0 or step * (2**field_bits - 1) + offset >= 2**31:
        raise ValueError(f"step, offset: expected step >= 1, offset >= 0 within int32, got {step} and {offset}")
    n, rest = divmod(8 * check_bytes("fields", fields), field_bits)
    if rest or n % _WORD_TERNARIES:
        raise ValueError(
            f"fields: expected a multiple of {_WORD_TERNARIES} fields of {field_bits} bits, got {fields.numel()} bytes"
        )
    out = packed_out(out, n // 4, "fields", fields)
    check_flat("counts", counts, torch.int64, 2, "fields", fields)
    _TERNARY(fields, field_bits, step, offset, largest, out, counts, impl)
    return out


_MAJORITY = register("majority_vote(Tensor packed, Tensor parity, Tensor(a!) out, Tensor(b!)? counts, str impl) -> ()")
_COUNT = register("count_votes(Tensor packed, Tensor(a!) out, str impl) -> ()")
_MAJORITY_OF_COUNTS = register(
    "majority_of_counts(Tensor planes, int voters, Tensor parity, Tensor(a!) out, Tensor(b!)? counts, str impl) -> ()"
)
_MAJORITY_OF_FIELDS = register(
    "majority_of_fields(Tensor fields, int field_bits, int voters, Tensor parity, Tensor(a!) out, "
    "Tensor(b!)? counts, str impl) -> ()"
)
_ADD = register("add_codes(Tensor packed, int bits, int field_bits, Tensor(a!) out, str impl) -> ()")
_TERNARY = register(
    "ternary_of_fields(Tensor fields, int field_bits, int step, int offset, int largest, Tensor(a!) out, "
    "Tensor(b!)? counts, str impl) -> ()"
)
