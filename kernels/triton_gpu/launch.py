"""How the kernels are launched: tile sizes, grids, the device, and arithmetic without fusion."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
from torch import Tensor

from lioncub.kernels.triton_gpu.arithmetic import INTERPRETED

# a thread holds one row of 8 elements
ROW_THREADS = 128
# a thread holds 4 elements
WIDE_THREADS = 256
# arguments with one flag per tensor: slices of any alignment, which must not compile a kernel anew
FLAGS = ["status_ptr", "gate_ptr"]
# the interpreter takes as long for a tile of any size
BLOCK_SIZE = 16384 if INTERPRETED else 8 * ROW_THREADS


def tiles(n: int, block_size: int = BLOCK_SIZE) -> tuple[int]:
    """The grid of one program per ``block_size`` elements."""
    return (triton.cdiv(n, block_size),)


def elementwise_threads(*tensors: Tensor) -> int:
    """Threads per tile where each has one 128-bit load per tensor: 4 elements where any tensor is fp32, else 8.

    With more elements triton would exchange them through shared memory to keep stores contiguous.
    """
    return WIDE_THREADS if any(t.dtype == torch.float32 for t in tensors) else ROW_THREADS


def options(device: torch.device, threads: int = ROW_THREADS) -> dict[str, Any]:
    """Launch options: the warps that make up ``threads``, and no fused multiply-add (rule 1)."""
    return {"num_warps": threads // _warp_size(device), "enable_fp_fusion": False}


def launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device current, since triton launches on the current one; on CPU, be as silent as a GPU."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    # only the interpreter, which computes in numpy, gets here; numpy warns of every Inf and NaN
    import numpy as np

    return np.errstate(all="ignore")


@functools.cache
def _warp_size(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32
