"""Sums of packed codes: everyone's codes added up in fields, and the signs of such sums as ternary codes."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import check_choice, check_counts, check_device, check_integer, check_packed, check_rows
from lioncub.kernels.layout import FIELD_BITS, WORD_BYTES
from lioncub.kernels.overlaps import check_apart
from lioncub.kernels.registry import mark_written, register

# 2-bit codes of 32 fields fill a word
_WORD_TERNARIES = 32


def add_codes(packed: Tensor, *, bits: int, field_bits: int, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The sum over rows of every ``bits``-bit code, in a field of ``field_bits`` bits.

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
    if out is None:
        out = torch.empty(n_bytes * field_bits // bits, dtype=torch.uint8, device=packed.device)
    check_packed("out", out, n_bytes * field_bits // bits)
    check_device("out", out, "packed", packed)
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
    """The sign of every ``step*field - offset`` as a 2-bit code 1 + sign: 0, 1 or 2.

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
    check_packed("fields", fields, None)
    n, rest = divmod(8 * fields.numel(), field_bits)
    if rest or n % _WORD_TERNARIES:
        raise ValueError(
            f"fields: expected a multiple of {_WORD_TERNARIES} fields of {field_bits} bits, got {fields.numel()} bytes"
        )
    if out is None:
        out = torch.empty(n // 4, dtype=torch.uint8, device=fields.device)
    check_packed("out", out, n // 4)
    check_device("out", out, "fields", fields)
    check_counts(counts, "fields", fields)
    _TERNARY(fields, field_bits, step, offset, largest, out, counts, impl)
    return out


def _add(packed: Tensor, bits: int, field_bits: int, out: Tensor, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out}, {"packed": packed})
    if out.numel():
        run.add_codes(packed, bits, field_bits, out)
    mark_written(out)


def _ternary(
    fields: Tensor,
    field_bits: int,
    step: int,
    offset: int,
    largest: int,
    out: Tensor,
    counts: Tensor | None,
    impl: str,
) -> None:
    run = backend(impl, fields.device)
    check_apart({"out": out, "counts": counts}, {"fields": fields})
    if out.numel():
        run.ternary_of_fields(fields, field_bits, step, offset, largest, out, counts)
    mark_written(out, counts)


_ADD = register("add_codes(Tensor packed, int bits, int field_bits, Tensor(a!) out, str impl) -> ()", _add)
_TERNARY = register(
    "ternary_of_fields(Tensor fields, int field_bits, int step, int offset, int largest, Tensor(a!) out, "
    "Tensor(b!)? counts, str impl) -> ()",
    _ternary,
)
