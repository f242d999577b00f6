"""Kernels of Lion with one-bit updates: what is done to numbers on one device. See docs/composing.md."""

from lioncub.kernels.dispatch import resolve_impl
from lioncub.kernels.layout import counter_planes, field_bits, packed_bytes
from lioncub.kernels.lion import foreach_lion_apply_, foreach_lion_step_, lion_apply_, lion_ema, lion_step_
from lioncub.kernels.quantization import dequantize, foreach_lion_quantize, lion_quantize, quantize
from lioncub.kernels.rounding import Rounding
from lioncub.kernels.signs import (
    abstain_parity,
    foreach_lion_encode,
    lion_encode,
    lion_encode_,
    pack_signs,
    tie_parity,
    unpack_signs,
)
from lioncub.kernels.vote import (
    add_codes,
    count_votes,
    majority_of_counts,
    majority_of_fields,
    majority_vote,
    spread_codes,
    ternary_of_fields,
)

__all__ = [
    "Rounding",
    "abstain_parity",
    "add_codes",
    "count_votes",
    "counter_planes",
    "dequantize",
    "field_bits",
    "foreach_lion_apply_",
    "foreach_lion_encode",
    "foreach_lion_quantize",
    "foreach_lion_step_",
    "lion_apply_",
    "lion_ema",
    "lion_encode",
    "lion_encode_",
    "lion_quantize",
    "lion_step_",
    "majority_of_counts",
    "majority_of_fields",
    "majority_vote",
    "pack_signs",
    "packed_bytes",
    "quantize",
    "resolve_impl",
    "spread_codes",
    "ternary_of_fields",
    "tie_parity",
    "unpack_signs",
]
