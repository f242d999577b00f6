"""Every op of the kernels, in the ways it is called: what `make bench` times on each implementation, dtype and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from lioncub.kernels import Rounding
from speed import code_ops, float_ops
from speed.data import DTYPES, PACKED, SIZES, Call, Data

# names of lioncub.kernels that do nothing to tensors
NOT_OPS = {"Rounding", "abstain_parity", "counter_planes", "field_bits", "packed_bytes", "resolve_impl", "tie_parity"}
VOTERS = (2, 8, 64)
_NARROW = ("bf16", "fp16")
_STOCHASTIC = Rounding(seed=1, step=2, rank=0)
_TERNARY = float_ops.TERNARY


@dataclass(frozen=True)
class Case:
    """One op called in one way; ``way`` tells it from others of the op."""

    op: str
    make: Callable[[Data, str], Call]
    way: str = ""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    impls: tuple[str, ...] = ("cpu", "reference", "triton")

    @property
    def name(self) -> str:
        return f"{self.op}:{self.way}" if self.way else self.op


class Cell(NamedTuple):
    """A case on one implementation, dtype and size."""

    case: Case
    impl: str
    dtype: str
    size: str

    @property
    def name(self) -> str:
        return "/".join((self.case.name, self.impl, self.dtype, self.size))

    def data_key(self) -> tuple[int, torch.dtype, str]:
        """Arguments of the `Data` that it runs on."""
        return SIZES[self.size], DTYPES.get(self.dtype, torch.float32), "cuda" if self.impl == "triton" else "cpu"


def _packed(op: str, make: Callable[[Data, str], Call], way: str = "") -> Case:
    return Case(op, make, way, (PACKED,))


def _votes() -> Iterator[Case]:
    for voters in VOTERS:
        yield _packed("majority_vote", partial(code_ops.majority_vote, voters=voters), f"{voters}_voters")


CASES = (
    Case("pack_signs", float_ops.pack_signs),
    Case("unpack_signs", float_ops.unpack_signs),
    Case("lion_encode", float_ops.lion_encode),
    Case("lion_encode_", float_ops.lion_encode_),
    Case("foreach_lion_encode", float_ops.foreach_lion_encode),
    Case("lion_ema", float_ops.lion_ema, impls=("torch",)),
    *_votes(),
    _packed("majority_vote", partial(code_ops.majority_vote, voters=8, counted=True), "8_voters_counted"),
    _packed("count_votes", code_ops.count_votes),
    _packed("majority_of_counts", code_ops.majority_of_counts),
    _packed("spread_codes", code_ops.spread_codes),
    _packed("majority_of_fields", code_ops.majority_of_fields),
    _packed("add_codes", partial(code_ops.add_codes, bits=1), "1_bit"),
    _packed("add_codes", partial(code_ops.add_codes, bits=2), "2_bits"),
    _packed("ternary_of_fields", code_ops.ternary_of_fields),
    Case("lion_apply_", float_ops.lion_apply_),
    Case("lion_apply_", partial(float_ops.lion_apply_, momentum=True), "momentum"),
    Case("lion_apply_", partial(float_ops.lion_apply_, rounding=_STOCHASTIC), "stochastic", _NARROW),
    Case("lion_apply_", partial(float_ops.lion_apply_, form=_TERNARY), "2_bits"),
    Case("lion_apply_", partial(float_ops.lion_apply_, form=_TERNARY, momentum=True), "2_bits_momentum"),
    Case("foreach_lion_apply_", float_ops.foreach_lion_apply_),
    Case("foreach_lion_apply_", partial(float_ops.foreach_lion_apply_, form=_TERNARY), "2_bits"),
    Case("lion_step_", float_ops.lion_step_),
    Case("lion_step_", partial(float_ops.lion_step_, rounding=_STOCHASTIC), "stochastic", _NARROW),
    Case("foreach_lion_step_", float_ops.foreach_lion_step_),
    Case("quantize", float_ops.quantize, "2_bits"),
    Case("quantize", partial(float_ops.quantize, bits=8), "8_bits"),
    Case("quantize", partial(float_ops.quantize, scaled=False), "2_bits_own_scale"),
    Case("quantize", partial(float_ops.quantize, stochastic=True), "2_bits_stochastic"),
    Case("lion_quantize", float_ops.lion_quantize, "2_bits"),
    Case("lion_quantize", partial(float_ops.lion_quantize, scaled=False), "2_bits_own_scale"),
    Case("lion_quantize", partial(float_ops.lion_quantize, stochastic=True), "2_bits_stochastic"),
    Case("foreach_lion_quantize", float_ops.foreach_lion_quantize),
    Case("dequantize", float_ops.dequantize, "2_bits"),
    Case("dequantize", partial(float_ops.dequantize, bits=8), "8_bits"),
)


def cells(impl: str) -> list[Cell]:
    """All that an implementation can be timed on, each size and dtype together since they share their tensors."""
    return [
        Cell(case, impl, dtype, size)
        for size in SIZES
        for dtype in (*DTYPES, PACKED)
        for case in CASES
        if impl in case.impls and dtype in case.dtypes
    ]
