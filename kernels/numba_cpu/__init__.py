"""The kernels in Numba for CPU tensors: the functions of lioncub.kernels.reference, compiled and threaded."""

from lioncub.kernels.numba_cpu.fields import add_codes, majority_of_fields, spread_codes, ternary_of_fields
from lioncub.kernels.numba_cpu.lion import lion_apply_, lion_step_
from lioncub.kernels.numba_cpu.quantization import dequantize, lion_quantize, quantize
from lioncub.kernels.numba_cpu.scales import block_scale, lion_block_scale
from lioncub.kernels.numba_cpu.signs import lion_encode, lion_encode_, pack_signs, unpack_signs
from lioncub.kernels.numba_cpu.vote import count_votes, majority_of_counts, majority_vote

__all__ = [
    "add_codes",
    "block_scale",
    "count_votes",
    "dequantize",
    "lion_apply_",
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
