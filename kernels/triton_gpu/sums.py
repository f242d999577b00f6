"""add_codes and ternary_of_fields.

Words of spread codes are added as whole numbers, since no field ever carries into the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.codes import load_wide_codes
from lioncub.kernels.triton_gpu.fields import four_offsets, load_fours, load_words, spread_word
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, ROW_THREADS, launching_on, options, tiles
from lioncub.kernels.triton_gpu.planes import WORDS_PER_TILE, in_words
from lioncub.kernels.triton_gpu.rows import element_offsets, store_codes, tile_rows

# rows of four words, one row per thread
_ROWS_PER_TILE = ROW_THREADS


@triton.jit(do_not_specialize=["n_rows"])
def _add_codes_kernel(
    packed_ptr,
    out_ptr,
    row_stride,
    n_rows,
    n_packed,
    n_words,
    BITS: tl.constexpr,
    FIELD_BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    offsets = four_offsets(rows)
    total = tl.zeros((BLOCK_SIZE, 4), tl.int32)
    for _ in range(n_rows):
        if BITS == FIELD_BITS:
            total += load_words(packed_ptr, offsets, n_packed)
        else:
            total += spread_word(load_fours(packed_ptr, rows, n_packed, 32 * BITS // FIELD_BITS), BITS, FIELD_BITS)
        packed_ptr += row_stride
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + offsets, total, mask=offsets < n_words)
    else:
        places = tl.arange(0, 4)[None, None, :]
        offsets = offsets[:, :, None] * 4 + places
        tl.store(out_ptr + offsets, (total[:, :, None] >> (places * 8)).to(tl.uint8), mask=offsets < n_words)


@triton.jit(do_not_specialize=["step", "offset", "largest"])
def _sign_fields_kernel(
    fields_ptr,
    out_ptr,
    counts_ptr,
    step,
    offset,
    largest,
    n_elements,
    FIELD_BITS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tile_rows(BLOCK_SIZE)
    fields = load_wide_codes(fields_ptr, rows, n_elements, FIELD_BITS)
    total = fields * step - offset
    store_codes(out_ptr, rows, n_elements, 1 + (total > 0).to(tl.int32) - (total < 0).to(tl.int32), 2)
    if HAS_COUNTS:
        # fields past the end are zero, but not counted
        valid = element_offsets(rows) < n_elements
        tied = (total == 0) & valid
        unanimous = ((fields == 0) | (fields == largest)) & valid
        tl.atomic_add(counts_ptr, tl.sum(tl.sum(tied.to(tl.int32), 1)).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.sum(tl.sum(unanimous.to(tl.int32), 1)).to(tl.int64))


def add_codes(packed: Tensor, bits: int, field_bits: int, out: Tensor) -> None:
    """See `lioncub.kernels.reference.add_codes`; whole words where addresses allow, else bytes."""
    grid = tiles(out.numel(), 4 * WORDS_PER_TILE)
    (out,) = in_words(out)
    if bits == field_bits:
        (packed,) = in_words(packed)
    with launching_on(out):
        _add_codes_kernel[grid](
            packed,
            out,
            packed.stride(0),
            packed.shape[0],
            packed.shape[1],
            out.numel(),
            bits,
            field_bits,
            _ROWS_PER_TILE,
            **options(out.device),
        )


def ternary_of_fields(
    fields: Tensor, field_bits: int, step: int, offset: int, largest: int, out: Tensor, counts: Tensor | None
) -> None:
    """See `lioncub.kernels.reference.ternary_of_fields`."""
    n = 4 * out.numel()
    with launching_on(out):
        _sign_fields_kernel[tiles(n)](
            fields,
            out,
            out if counts is None else counts,
            step,
            offset,
            largest,
            n,
            field_bits,
            counts is not None,
            BLOCK_SIZE,
            **options(out.device),
        )
