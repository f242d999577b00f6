"""The Lion kernels over lists of tensors, of whatever sizes, dtypes and alignments: one launch for all."""

import triton
import triton.language as tl

from lioncub.kernels.triton_gpu.launch import FLAGS
from lioncub.kernels.triton_gpu.lion_tiles import apply_votes_tile, encode_tile, step_tile
from lioncub.kernels.triton_gpu.random_rows import ROUNDING_ARGUMENTS
from lioncub.kernels.triton_gpu.rows import rows_from
from lioncub.kernels.triton_gpu.tables import form_of, is_shut, kind_at, pointer_at, stream_of, tile_of


@triton.jit(do_not_specialize=["parity"], do_not_specialize_on_alignment=FLAGS)
def _encode_updates_kernel(
    rows_ptr,
    owners_ptr,
    status_ptr,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    parity,
    KINDS: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 3, BLOCK_SIZE)
    kind, is_wide = form_of(row_ptr, start, n_elements, 3, BLOCK_SIZE)
    numbers = (beta1, beta1_new, beta2, beta2_new, parity)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _encode(
                    row_ptr,
                    status_ptr + tensor,
                    numbers,
                    start,
                    None,
                    kind_at(KINDS, k),
                    ADVANCE,
                    HAS_STATUS,
                    BLOCK_SIZE,
                )
            else:
                _encode(
                    row_ptr,
                    status_ptr + tensor,
                    numbers,
                    start,
                    n_elements,
                    kind_at(KINDS, k),
                    ADVANCE,
                    HAS_STATUS,
                    BLOCK_SIZE,
                )


@triton.jit
def _encode(
    row_ptr,
    status_ptr,
    numbers,
    start,
    n_elements,
    KIND: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    encode_tile(
        pointer_at(row_ptr, 0, KIND, n_elements),
        pointer_at(row_ptr, 1, KIND, n_elements),
        pointer_at(row_ptr, 2, KIND, n_elements),
        status_ptr,
        numbers,
        rows_from(start, BLOCK_SIZE),
        n_elements,
        ADVANCE,
        HAS_STATUS,
    )


@triton.jit(do_not_specialize=ROUNDING_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _apply_all_votes_kernel(
    rows_ptr,
    owners_ptr,
    gate_ptr,
    lr,
    decay,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    KINDS: tl.constexpr,
    ADVANCE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 4, BLOCK_SIZE)
    if is_shut(gate_ptr + tensor, HAS_GATE):
        return
    kind, is_wide = form_of(row_ptr, start, n_elements, 4, BLOCK_SIZE)
    numbers = (lr, decay, beta2, beta2_new)
    streams = (stream_of(row_ptr, seed_low, seed_high, rounding_step, 4), momentum_worker)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _apply_votes(row_ptr, numbers, streams, start, None, kind_at(KINDS, k), ADVANCE, ROUNDING, BLOCK_SIZE)
            else:
                _apply_votes(
                    row_ptr, numbers, streams, start, n_elements, kind_at(KINDS, k), ADVANCE, ROUNDING, BLOCK_SIZE
                )


@triton.jit
def _apply_votes(
    row_ptr,
    numbers,
    streams,
    start,
    n_elements,
    KIND: tl.constexpr,
    ADVANCE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    apply_votes_tile(
        pointer_at(row_ptr, 0, KIND, n_elements),
        pointer_at(row_ptr, 1, KIND, n_elements),
        pointer_at(row_ptr, 2, KIND, n_elements),
        pointer_at(row_ptr, 3, KIND, n_elements),
        numbers,
        streams,
        rows_from(start, BLOCK_SIZE),
        n_elements,
        ADVANCE,
        ROUNDING,
    )


@triton.jit(do_not_specialize=ROUNDING_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _step_all_kernel(
    rows_ptr,
    owners_ptr,
    gate_ptr,
    lr,
    decay,
    beta1,
    beta1_new,
    beta2,
    beta2_new,
    seed_low,
    seed_high,
    rounding_step,
    momentum_worker,
    KINDS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 3, BLOCK_SIZE)
    if is_shut(gate_ptr + tensor, HAS_GATE):
        return
    kind, is_wide = form_of(row_ptr, start, n_elements, 3, BLOCK_SIZE)
    numbers = (lr, decay, beta1, beta1_new, beta2, beta2_new)
    streams = (stream_of(row_ptr, seed_low, seed_high, rounding_step, 3), momentum_worker)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _step(row_ptr, numbers, streams, start, None, kind_at(KINDS, k), ROUNDING, BLOCK_SIZE)
            else:
                _step(row_ptr, numbers, streams, start, n_elements, kind_at(KINDS, k), ROUNDING, BLOCK_SIZE)


@triton.jit
def _step(
    row_ptr,
    numbers,
    streams,
    start,
    n_elements,
    KIND: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    step_tile(
        pointer_at(row_ptr, 0, KIND, n_elements),
        pointer_at(row_ptr, 1, KIND, n_elements),
        pointer_at(row_ptr, 2, KIND, n_elements),
        numbers,
        streams,
        start,
        n_elements,
        ROUNDING,
        BLOCK_SIZE,
    )
