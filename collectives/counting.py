"""What is made of everyone's codes: one meaning for every algorithm, whether it has ballots, or sums in fields."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lioncub.collectives.codes import Codes
from lioncub.kernels import add_codes, majority_of_fields, majority_vote, ternary_of_fields


@dataclass(frozen=True)
class Count:
    """How codes of ``workers`` are counted; ``parity`` decides ties of majorities."""

    codes: Codes
    workers: int
    parity: int
    impl: str

    def of_ballots(self, ballots: Tensor, counts: Tensor, out: Tensor | None = None) -> Tensor:
        """The result of everyone's packed codes uint8[workers, bits*B], uint8[result_bits*B].

        Adds (ties, unanimous) to int64[2] ``counts``. A tie is a sum of zero, unanimous the largest or least sum.
        """
        if self.codes.are_votes:
            return majority_vote(ballots, parity=self.parity, out=out, counts=counts, impl=self.impl)
        width = self.codes.field_bits(self.workers)
        summed = out if self.codes.result == "sum" else None
        fields = add_codes(ballots, bits=self.codes.bits, field_bits=width, out=summed, impl=self.impl)
        return self.of_fields(fields, counts, None if self.codes.result == "sum" else out)

    def of_fields(self, fields: Tensor, counts: Tensor, out: Tensor | None = None) -> Tensor:
        """`of_ballots` from the sums of all codes, in the narrowest fields that hold them; ``out`` not for sums."""
        width = self.codes.field_bits(self.workers)
        if self.codes.result == "majority":
            return majority_of_fields(
                fields,
                field_bits=width,
                # a sum of zero is half of the largest one, whatever the width of the codes
                voters=self.codes.largest * self.workers,
                parity=self.parity,
                out=out,
                counts=counts,
                impl=self.impl,
            )
        step, offset = self.codes.value(self.workers)
        signs = ternary_of_fields(
            fields,
            field_bits=width,
            step=step,
            offset=offset,
            largest=self.codes.largest * self.workers,
            out=out,
            counts=counts,
            impl=self.impl,
        )
        return fields if self.codes.result == "sum" else signs
