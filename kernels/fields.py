"""Fields that a native sum of bytes adds up: codes spread into them, majorities of sums."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import check_choice, check_counts, check_device, check_integer, check_packed
from lioncub.kernels.layout import CODE_BITS, FIELD_BITS, WORD_BYTES
from lioncub.kernels.overlaps import check_apart
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.scalars import count_scalar, parity_of


def spread_codes(
    packed: Tensor, *, bits: int, field_bits: int, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Every ``bits``-bit code in a field of ``field_bits`` bits, whose other bits are zero.

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
    check_choice("field_bits", field_bits, FIELD_BITS)
    if field_bits < bits:
        raise ValueError(f"field_bits: expected at least bits, {bits}, got {field_bits}")
    n_bytes = _check_multiple("packed", packed, WORD_BYTES)
    if out is None:
        out = torch.empty(n_bytes * field_bits // bits, dtype=torch.uint8, device=packed.device)
    check_packed("out", out, n_bytes * field_bits // bits)
    check_device("out", out, "packed", packed)
    _SPREAD(packed, bits, field_bits, out, impl)
    return out


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
    n_bytes = _check_multiple("fields", fields, field_bits) // field_bits
    if out is None:
        out = torch.empty(n_bytes, dtype=torch.uint8, device=fields.device)
    check_packed("out", out, n_bytes)
    check_device("out", out, "fields", fields)
    check_counts(counts, "fields", fields)
    _VOTE(fields, field_bits, voters, count_scalar("parity", parity), out, counts, impl)
    return out


def _check_multiple(name: str, packed: Tensor, multiple: int) -> int:
    """Bytes of ``packed``, a contiguous uint8 tensor of a multiple of ``multiple`` bytes."""
    check_packed(name, packed, None)
    if packed.numel() % multiple:
        raise ValueError(f"{name}: expected a multiple of {multiple} bytes, got {packed.numel()}")
    return packed.numel()


def _spread(packed: Tensor, bits: int, field_bits: int, out: Tensor, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out}, {"packed": packed})
    if bits == field_bits:
        out.copy_(packed)
    elif out.numel():
        run.spread_codes(packed, bits, field_bits, out)
    mark_written(out)


def _vote(
    fields: Tensor, field_bits: int, voters: int, parity: Tensor, out: Tensor, counts: Tensor | None, impl: str
) -> None:
    run = backend(impl, fields.device)
    check_apart({"out": out, "counts": counts}, {"fields": fields})
    if out.numel():
        run.majority_of_fields(fields, field_bits, voters, parity_of(parity), out, counts)
    mark_written(out, counts)


_SPREAD = register("spread_codes(Tensor packed, int bits, int field_bits, Tensor(a!) out, str impl) -> ()", _spread)
_VOTE = register(
    "majority_of_fields(Tensor fields, int field_bits, int voters, Tensor parity, Tensor(a!) out, "
    "Tensor(b!)? counts, str impl) -> ()",
    _vote,
)
