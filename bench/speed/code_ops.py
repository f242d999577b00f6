"""Calls of the ops whose operands are packed codes alone, one function per op, in the order of docs/composing.md."""

from __future__ import annotations

from lioncub import kernels
from lioncub.kernels import packed_bytes
from speed.data import Call, Data, new


def majority_vote(data: Data, impl: str, *, voters: int, counted: bool = False) -> Call:
    packed, out, counts = data.voters(voters), data.codes(), data.counts if counted else None
    return Call(lambda: kernels.majority_vote(packed, out=out, counts=counts, impl=impl), (packed,), (out,))


def count_votes(data: Data, impl: str) -> Call:
    packed, out = data.voters(8), data.planes[0]
    return Call(lambda: kernels.count_votes(packed, out=out, impl=impl), (packed,), (out,))


def majority_of_counts(data: Data, impl: str) -> Call:
    planes, out = data.planes, data.codes()
    return Call(lambda: kernels.majority_of_counts(planes, voters=16, out=out, impl=impl), (planes,), (out,))


def spread_codes(data: Data, impl: str) -> Call:
    packed, out = data.codes(), data.codes(4)
    return Call(lambda: kernels.spread_codes(packed, bits=1, field_bits=4, out=out, impl=impl), (packed,), (out,))


def majority_of_fields(data: Data, impl: str) -> Call:
    fields, out = data.sums, data.codes()
    return Call(
        lambda: kernels.majority_of_fields(fields, field_bits=4, voters=8, out=out, impl=impl), (fields,), (out,)
    )


def add_codes(data: Data, impl: str, *, bits: int) -> Call:
    # as many bytes as the one-bit codes of 8 voters
    packed, field_bits = data.voters(8).view(8 // bits, -1), 4 * bits
    return Call(
        lambda: kernels.add_codes(packed, bits=bits, field_bits=field_bits, impl=impl),
        (packed,),
        (new(packed_bytes(data.n) * field_bits),),
    )


def ternary_of_fields(data: Data, impl: str) -> Call:
    fields, out = data.sums, data.codes(2)
    return Call(
        lambda: kernels.ternary_of_fields(fields, field_bits=4, step=2, offset=8, largest=8, out=out, impl=impl),
        (fields,),
        (out,),
    )
