"""Every op of the kernels, in the ways it is called: `make bench` times each on each implementation, dtype and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lioncub.kernels import Rounding
from speed import ops
from speed.data import DTYPES, PACKED, SIZES, Call, Data

# names of lioncub.kernels that do nothing to tensors
NOT_OPS = {"Rounding", "abstain_parity", "counter_planes", "field_bits", "packed_bytes", "resolve_impl", "tie_parity"}
VOTERS = (2, 8, 64)
_STOCHASTIC = {"rounding": Rounding(seed=1, step=2, rank=0)}
_TERNARY = {"bits": 2, "step": 1, "offset": 1}


@dataclass(frozen=True)
class Case:
    """One op called in one way; ``way`` tells it from others of the op, ``options`` are its arguments."""

    prepare: Callable[..., Call]
    way: str = ""
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    dtypes: tuple[str, ...] = tuple(DTYPES)
    impls: tuple[str, ...] = ("cpu", "reference", "triton")

    @property
    def op(self) -> str:
        return self.prepare.__name__

    @property
    def name(self) -> str:
        return f"{self.op}:{self.way}" if self.way else self.op

    def make(self, data: Data, impl: str) -> Call:
        """Prepare the call on these tensors."""
        return self.prepare(data, impl=impl, **self.options)


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


def packed(prepare: Callable[..., Call], way: str = "", **options: Any) -> Case:
    """A case of an op on packed codes."""
    return Case(prepare, way, options, (PACKED,))


def _stochastic(prepare: Callable[..., Call]) -> Case:
    """fp32 is never rounded."""
    return Case(prepare, "stochastic", _STOCHASTIC, ("bf16", "fp16"))


def _masters(prepare: Callable[..., Call]) -> Case:
    """fp32 has none."""
    return Case(prepare, "masters", {"masters": True}, ("bf16", "fp16"))


CASES = (
    Case(ops.pack_signs),
    Case(ops.unpack_signs),
    Case(ops.lion_encode),
    Case(ops.lion_encode_),
    Case(ops.foreach_lion_encode),
    Case(ops.lion_ema, impls=("torch",)),
    *(packed(ops.majority_vote, f"{voters}_voters", voters=voters) for voters in VOTERS),
    packed(ops.majority_vote, "8_voters_counted", voters=8, counted=True),
    packed(ops.count_votes),
    packed(ops.majority_of_counts),
    packed(ops.spread_codes),
    packed(ops.majority_of_fields),
    packed(ops.add_codes, "1_bit", bits=1, field_bits=4),
    packed(ops.add_codes, "2_bits", bits=2, field_bits=8),
    packed(ops.ternary_of_fields),
    Case(ops.lion_apply_),
    Case(ops.lion_apply_, "momentum", {"momentum": True}),
    _stochastic(ops.lion_apply_),
    _masters(ops.lion_apply_),
    Case(ops.lion_apply_, "2_bits", _TERNARY),
    Case(ops.lion_apply_, "2_bits_momentum", {**_TERNARY, "momentum": True}),
    Case(ops.foreach_lion_apply_),
    Case(ops.foreach_lion_apply_, "2_bits", _TERNARY),
    Case(ops.lion_step_),
    _stochastic(ops.lion_step_),
    _masters(ops.lion_step_),
    Case(ops.foreach_lion_step_),
    Case(ops.quantize, "2_bits"),
    Case(ops.quantize, "8_bits", {"bits": 8}),
    Case(ops.quantize, "2_bits_own_scale", {"scaled": False}),
    Case(ops.quantize, "2_bits_stochastic", {"stochastic": True}),
    Case(ops.lion_quantize, "2_bits"),
    Case(ops.lion_quantize, "2_bits_own_scale", {"scaled": False}),
    Case(ops.lion_quantize, "2_bits_stochastic", {"stochastic": True}),
    Case(ops.foreach_lion_quantize),
    Case(ops.dequantize, "2_bits"),
    Case(ops.dequantize, "8_bits", {"bits": 8}),
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
