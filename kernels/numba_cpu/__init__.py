"""The kernels in Numba for CPU tensors: the functions of lioncub.kernels.reference, compiled and threaded."""

from lioncub.kernels.numba_cpu.codes import apply_codes_
from lioncub.kernels.numba_cpu.counts import count_votes, majority_of_counts
from lioncub.kernels.numba_cpu.field_sums import majority_of_fields, spread_codes
from lioncub.kernels.numba_cpu.lion import apply_votes_, lion_encode, lion_encode_, lion_step_
from lioncub.kernels.numba_cpu.quantization import dequantize, lion_quantize, quantize
from lioncub.kernels.numba_cpu.scales import block_scale, lion_block_scale
from lioncub.kernels.numba_cpu.signs import pack_signs, unpack_signs
from lioncub.kernels.numba_cpu.sums import add_codes, ternary_of_fields
from lioncub.kernels.numba_cpu.vote import majority_vote

__all__ = [
    "add_codes",
    "apply_codes_",
    "apply_votes_",
    "block_scale",
    "count_votes",
    "dequantize",
    "lion_block_scale",
    "lion_encode",
    "lion_encode_",
    "lion_quantize",
    "lion_step_",
    "majority_of_counts",
    "majority_of_fields",
    "majority_vote",
    "pack_signs",
    "quantize",
    "spread_codes",
    "ternary_of_fields",
    "unpack_signs",
]
