"""Kernels of Lion with one-bit updates: what is done to numbers on one device. See docs/composing.md."""

from lioncub.kernels.backends import resolve_impl
from lioncub.kernels.codes import apply_codes_, foreach_apply_codes_
from lioncub.kernels.counts import count_votes, majority_of_counts
from lioncub.kernels.fields import majority_of_fields, spread_codes
from lioncub.kernels.layout import counter_planes, field_bits, packed_bytes
from lioncub.kernels.lion import (
    apply_votes_,
    foreach_apply_votes_,
    foreach_lion_encode,
    foreach_lion_step_,
    lion_encode,
    lion_encode_,
    lion_step_,
)
from lioncub.kernels.lion_levels import foreach_lion_quantize, lion_quantize
from lioncub.kernels.mixing import lion_mix
from lioncub.kernels.quantization import dequantize, quantize
from lioncub.kernels.rounding import Rounding
from lioncub.kernels.signs import abstain_parity, pack_signs, tie_parity, unpack_signs
from lioncub.kernels.sums import add_codes, ternary_of_fields
from lioncub.kernels.vote import majority_vote

__all__ = [
    "Rounding",
    "abstain_parity",
    "add_codes",
    "apply_codes_",
    "apply_votes_",
    "count_votes",
    "counter_planes",
    "dequantize",
    "field_bits",
    "foreach_apply_codes_",
    "foreach_apply_votes_",
    "foreach_lion_encode",
    "foreach_lion_quantize",
    "foreach_lion_step_",
    "lion_encode",
    "lion_encode_",
    "lion_mix",
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
