"""Triton kernels for NVIDIA and AMD GPUs; each function has a reference's name, arguments and meaning.

With TRITON_INTERPRET=1, set before this package is imported, they run on CPU tensors.
"""

from lioncub.kernels.triton_gpu.arithmetic import INTERPRETED
from lioncub.kernels.triton_gpu.codes import apply_codes_
from lioncub.kernels.triton_gpu.counts import count_votes, majority_of_counts
from lioncub.kernels.triton_gpu.fields import majority_of_fields, spread_codes
from lioncub.kernels.triton_gpu.lion import apply_votes_, lion_encode, lion_encode_, lion_step_
from lioncub.kernels.triton_gpu.packing import pack_signs, unpack_signs
from lioncub.kernels.triton_gpu.quantization import dequantize, lion_quantize, quantize
from lioncub.kernels.triton_gpu.scales import block_scale, lion_block_scale
from lioncub.kernels.triton_gpu.sums import add_codes, ternary_of_fields
from lioncub.kernels.triton_gpu.vote import majority_vote

__all__ = [
    "INTERPRETED",
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
