"""Triton kernels for NVIDIA and AMD GPUs; each function has a reference's name, arguments and meaning.

With TRITON_INTERPRET=1, set before this package is imported, they run on CPU tensors.
"""

from lioncub.kernels.triton_gpu.arithmetic import INTERPRETED
from lioncub.kernels.triton_gpu.fields import add_codes, majority_of_fields, ternary_of_fields
from lioncub.kernels.triton_gpu.lion import lion_apply_, lion_step_
from lioncub.kernels.triton_gpu.quantization import dequantize, lion_quantize
from lioncub.kernels.triton_gpu.scales import lion_block_scale
from lioncub.kernels.triton_gpu.signs import lion_encode, unpack_signs
from lioncub.kernels.triton_gpu.vote import count_votes, majority_of_counts, majority_vote

__all__ = [
    "INTERPRETED",
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
