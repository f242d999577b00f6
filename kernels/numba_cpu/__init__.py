"""The kernels in Numba for CPU tensors: the functions of lioncub.kernels.reference, compiled and threaded."""

from lioncub.kernels.numba_cpu.fields import add_codes, majority_of_fields, ternary_of_fields
from lioncub.kernels.numba_cpu.lion import lion_apply_, lion_step_
from lioncub.kernels.numba_cpu.quantization import dequantize, lion_quantize
from lioncub.kernels.numba_cpu.scales import lion_block_scale
from lioncub.kernels.numba_cpu.signs import lion_encode, unpack_signs
from lioncub.kernels.numba_cpu.vote import count_votes, majority_of_counts, majority_vote

__all__ = [
    "add_codes",
    "count_votes",
    "dequantize",
    "lion_apply_",
    "lion_block_scale",
    "lion_encode",
    "lion_quantize",
    "lion_step_",
    "majority_of_counts",
    "majority_of_fields",
    "majority_vote",
    "ternary_of_fields",
    "unpack_signs",
]
