"""pack_signs, unpack_signs, and Lion's update as signs: one launch for all tensors of a list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.lists import TensorList
from lioncub.kernels.scalars import NO_MIX, Mix
from lioncub.kernels.triton_gpu.arithmetic import is_finite, mix
from lioncub.kernels.triton_gpu.launch import (
    BLOCK_SIZE,
    FLAGS,
    ROW_THREADS,
    elementwise_threads,
    form_of,
    kind_at,
    pointer_at,
    run,
    table_of,
    tile_of,
)
from lioncub.kernels.triton_gpu.rows import (
    element_offsets,
    flag_rows,
    load_codes,
    load_rows,
    rows_from,
    store_elements,
    store_rows,
    store_signs,
    tile_rows,
    value_of,
)


@triton.jit(do_not_specialize=["parity"], do_not_specialize_on_alignment=FLAGS)
def _encode_signs_kernel(
    rows_ptr,
    owners_ptr,
    nonfinite_ptr,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    parity,
    KINDS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 3, BLOCK_SIZE)
    kind, is_wide = form_of(row_ptr, start, n_elements, 3, BLOCK_SIZE)
    numbers = (beta1, beta1_new, beta2, beta2_new, parity)
    flag_ptr, rows = nonfinite_ptr + tensor, rows_from(start, BLOCK_SIZE)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _encode_tile(row_ptr, flag_ptr, numbers, rows, None, kind_at(KINDS, k), HAS_FLAGS, IS_UPDATE, ADVANCE)
            else:
                _encode_tile(
                    row_ptr, flag_ptr, numbers, rows, n_elements, kind_at(KINDS, k), HAS_FLAGS, IS_UPDATE, ADVANCE
                )


@triton.jit
def _encode_tile(
    row_ptr,
    nonfinite_ptr,
    numbers,
    rows,
    n_elements,
    KIND: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    ADVANCE: tl.constexpr,
):
    """Pack the signs of the values, or of the updates; with ADVANCE the momentum of finite ones moves on."""
    beta1, beta1_new, beta2, beta2_new, parity = numbers
    x_ptr = pointer_at(row_ptr, 0, KIND, n_elements)
    x = load_rows(x_ptr, rows, n_elements)
    value = x
    if IS_UPDATE:
        g = load_rows(pointer_at(row_ptr, 1, KIND, n_elements), rows, n_elements)
        value = mix(value_of(beta1), value_of(beta1_new), x, g)
        if ADVANCE:
            moved = tl.where(is_finite(value), mix(value_of(beta2), value_of(beta2_new), x, g), x)
            store_rows(x_ptr, rows, n_elements, moved)
    store_signs(pointer_at(row_ptr, 2, KIND, n_elements), rows, n_elements, value, parity)
    if HAS_FLAGS:
        flag_rows(nonfinite_ptr, value)


@triton.jit
def _unpack_signs_kernel(packed_ptr, out_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    rows = tile_rows(BLOCK_SIZE)
    codes = load_codes(packed_ptr, rows, n_elements, 1)
    store_elements(out_ptr, element_offsets(rows), n_elements, tl.where(codes != 0, 1.0, -1.0))


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """See `lioncub.kernels.reference.unpack_signs`."""
    threads = elementwise_threads(out.dtype)
    run(_unpack_signs_kernel, out.numel(), BLOCK_SIZE, out.device, packed, out, out.numel(), threads=threads)


def lion_encode(
    exp_avg: TensorList,
    grad: TensorList | None,
    beta1: Mix,
    parity: int | Tensor,
    out: TensorList,
    nonfinite: Tensor | None,
    beta2: Mix | None = None,
) -> None:
    """See `lioncub.kernels.reference.lion_encode`."""
    if table := table_of(exp_avg, grad, out):
        numbers, flags = (*beta1, *(beta2 or NO_MIX), parity), (grad is not None, beta2 is not None)
        table.launch(_encode_signs_kernel, nonfinite, numbers, *flags, threads=ROW_THREADS)
