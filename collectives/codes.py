"""The format of codes on the wire, and how everyone's codes are combined: one meaning for every algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lioncub.kernels import add_codes, majority_of_fields, majority_vote, ternary_of_fields
from lioncub.kernels.layout import CODE_BITS, field_bits, largest_level

RESULTS = ("majority", "ternary", "sum")


@dataclass(frozen=True)
class CodeFormat:
    """The format of an exchange.

    Args:
        bits: width of a rank's code: 1 for signs, which count +1 and -1; 2, 4 or 8 for levels -K..K as `quantize`
            packs them.
        result: the code of the result: "majority" (the sign of the sum in one bit, ties by the parity bit), "ternary"
            (1 + the sign of the sum, in 2 bits) or "sum" (the sum of the stored codes, in fields that hold any of it).
    """

    bits: int = 1
    result: str = "majority"

    def __post_init__(self) -> None:
        if self.bits not in CODE_BITS:
            raise ValueError(f"bits: expected one of {CODE_BITS}, got {self.bits}")
        if self.result not in RESULTS:
            raise ValueError(f"result: expected one of {RESULTS}, got {self.result!r}")

    @property
    def are_votes(self) -> bool:
        """Whether these are one-bit codes and their majority, which bit planes count: no field is needed."""
        return self.bits == 1 and self.result == "majority"

    @property
    def largest(self) -> int:
        """The largest stored code: 1 for a sign, ``2*K`` for levels."""
        return 1 if self.bits == 1 else 2 * largest_level(self.bits)

    def field_bits(self, workers: int) -> int:
        """Return the bits of the narrowest field for the sum of ``workers`` codes. Raises ValueError where none is."""
        return field_bits(self.largest, workers)

    def value(self, workers: int) -> tuple[int, int]:
        """Return (step, offset): a sum of codes means the sum of signs, or levels, ``step*field - offset``."""
        return (2, workers) if self.bits == 1 else (1, workers * largest_level(self.bits))

    def result_bits(self, workers: int) -> int:
        """Return the bits of a code of the result."""
        if self.result == "sum":
            return self.field_bits(workers)
        return 1 if self.result == "majority" else 2

    def result_value(self, workers: int) -> tuple[int, int, int]:
        """Return (step, offset, divisor): a result code means the direction ``(step*code - offset) / divisor``."""
        if self.result == "majority":
            return 2, 1, 1
        return (1, 1, 1) if self.result == "ternary" else (*self.value(workers), workers)


VOTES = CodeFormat()


def combine_codes(
    messages: Tensor, form: CodeFormat, workers: int, parity: int | Tensor, counts: Tensor, impl: str
) -> Tensor:
    """Return the result of everyone's packed codes uint8[workers, bits*B], uint8[result_bits*B].

    ``parity`` decides ties of majorities. Adds (ties, unanimous) to int64[2] ``counts``: sums of zero, and largest or
    least sums.
    """
    if form.are_votes:
        return majority_vote(messages, parity=parity, counts=counts, impl=impl)
    fields = add_codes(messages, bits=form.bits, field_bits=form.field_bits(workers), impl=impl)
    return combine_fields(fields, form, workers, parity, counts, impl)


def combine_fields(
    fields: Tensor, form: CodeFormat, workers: int, parity: int | Tensor, counts: Tensor, impl: str
) -> Tensor:
    """`combine_codes` from the sums of all codes, in the narrowest fields that hold them."""
    width, largest = form.field_bits(workers), form.largest * workers
    if form.result == "majority":
        # a sum of zero is half of the largest one, whatever the width of the codes
        return majority_of_fields(fields, field_bits=width, voters=largest, parity=parity, counts=counts, impl=impl)
    step, offset = form.value(workers)
    signs = ternary_of_fields(
        fields, field_bits=width, step=step, offset=offset, largest=largest, counts=counts, impl=impl
    )
    return fields if form.result == "sum" else signs
