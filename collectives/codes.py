"""What an exchange carries: codes of a few bits up, and what is made of their sum down."""

from __future__ import annotations

from dataclasses import dataclass

from lioncub.kernels.layout import CODE_BITS, field_bits, largest_level

RESULTS = ("majority", "ternary", "sum")


@dataclass(frozen=True)
class Codes:
    """The format of an exchange.

    Args:
        bits: width of a worker's code: 1 for signs, which count +1 and -1; 2, 4 or 8 for levels -K..K as `quantize`
            packs them.
        result: what every worker gets: "majority" (the sign of the sum in one bit, ties by the parity bit), "ternary"
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
        """Bits of the narrowest field that the sum of ``workers`` codes fits into. Raises ValueError where none is."""
        return field_bits(self.largest, workers)

    def value(self, workers: int) -> tuple[int, int]:
        """(step, offset): ``step*field - offset`` is the sum of ``workers`` signs, or levels, of that sum of codes."""
        return (2, workers) if self.bits == 1 else (1, workers * largest_level(self.bits))

    def result_bits(self, workers: int) -> int:
        """Bits of a code of the result."""
        if self.result == "sum":
            return self.field_bits(workers)
        return 1 if self.result == "majority" else 2


VOTES = Codes()
