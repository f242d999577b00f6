"""pack_signs and unpack_signs."""

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.rows import (
    element_offsets,
    load_codes,
    load_rows,
    store_elements,
    store_signs,
    tile_rows,
)


@triton.jit(do_not_specialize=["parity"])
def _pack_signs_kernel(x_ptr, out_ptr, parity, n_elements, BLOCK_SIZE: tl.constexpr):
    rows = tile_rows(BLOCK_SIZE)
    store_signs(out_ptr, rows, n_elements, load_rows(x_ptr, rows, n_elements), parity)


@triton.jit
def _unpack_signs_kernel(packed_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    rows = tile_rows(BLOCK_SIZE)
    codes = load_codes(packed_ptr, rows, n_elements, 1)
    store_elements(out_ptr, element_offsets(rows), n_elements, tl.where(codes != 0, 1.0, -1.0))


def pack_signs(x: Tensor, parity: int, out: Tensor) -> None:
    """See `lioncub.kernels.reference.pack_signs`."""
    n = x.numel()
    with launching_on(x):
        _pack_signs_kernel[tiles(n)](x, out, parity, n, BLOCK_SIZE, **options(x.device))


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """See `lioncub.kernels.reference.unpack_signs`."""
    n = out.numel()
    with launching_on(out):
        _unpack_signs_kernel[tiles(n)](packed, out, n, BLOCK_SIZE, **options(out.device, elementwise_threads(out)))
