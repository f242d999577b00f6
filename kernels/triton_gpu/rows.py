"""Tiles of rows: 8 consecutive elements per row, one row per thread.

A row's codes of b bits are exactly b whole bytes, so a thread packs and unpacks its own bytes in registers, without
shuffles or shared memory, while it loads and stores 128 bits at a time.
"""

import triton
import triton.language as tl

from lioncub.kernels.triton_gpu.arithmetic import narrow, widen

ROW = tl.constexpr(8)


@triton.jit
def tile_rows(BLOCK_SIZE: tl.constexpr):
    """int64 numbers of this program's rows."""
    return tl.program_id(0).to(tl.int64) * (BLOCK_SIZE // ROW) + tl.arange(0, BLOCK_SIZE // ROW)


@triton.jit
def element_offsets(rows):
    """int64[rows, 8] element offsets."""
    return rows[:, None] * ROW + tl.arange(0, ROW)[None, :]


@triton.jit
def parity_bits(parity):
    """bool[1, 8]: (j + t) & 1 of a row's elements; the same in every row, since rows start at even j (rule 3)."""
    return ((tl.arange(0, ROW) + parity) & 1)[None, :] != 0


@triton.jit
def load_elements(x_ptr, offsets, n_elements):
    """fp32 elements, spread over the threads as the addresses suit best; 0 past the end."""
    return widen(tl.load(x_ptr + offsets, mask=offsets < n_elements, other=0))


@triton.jit
def store_elements(x_ptr, offsets, n_elements, value):
    """Store fp32 elements, rounded to the pointer's dtype."""
    tl.store(x_ptr + offsets, narrow(value, x_ptr.dtype.element_ty), mask=offsets < n_elements)


@triton.jit
def load_rows(x_ptr, rows, n_elements):
    """fp32[rows, 8], each row in one thread; 0 past the end."""
    if x_ptr.dtype.element_ty == tl.float32:
        # halves of 128 bits, joined in registers; one load of the row would be spread over two threads
        offsets = rows[:, None] * ROW + tl.arange(0, ROW // 2)[None, :]
        low = tl.load(x_ptr + offsets, mask=offsets < n_elements, other=0)
        high = tl.load(x_ptr + offsets + ROW // 2, mask=offsets + ROW // 2 < n_elements, other=0)
        x = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (rows.shape[0], ROW))
    else:
        x = load_elements(x_ptr, element_offsets(rows), n_elements)
    return x


@triton.jit
def store_rows(x_ptr, rows, n_elements, value):
    """Store fp32[rows, 8], rounded to the pointer's dtype."""
    if x_ptr.dtype.element_ty == tl.float32:
        low, high = tl.split(tl.permute(tl.reshape(value, (rows.shape[0], 2, ROW // 2)), (0, 2, 1)))
        offsets = rows[:, None] * ROW + tl.arange(0, ROW // 2)[None, :]
        tl.store(x_ptr + offsets, low, mask=offsets < n_elements)
        tl.store(x_ptr + offsets + ROW // 2, high, mask=offsets + ROW // 2 < n_elements)
    else:
        store_elements(x_ptr, element_offsets(rows), n_elements, value)


@triton.jit
def load_codes(packed_ptr, rows, n_elements, BITS: tl.constexpr):
    """int32[rows, 8] codes of BITS bits; all bytes up to the last element's exist, pads included."""
    offsets = _byte_offsets(rows, BITS)
    mask = offsets * (8 // BITS) < n_elements
    fields = tl.load(packed_ptr + offsets, mask=mask, other=0).to(tl.int32)[:, :, None] >> _shifts(BITS)
    return tl.reshape(fields & (2**BITS - 1), (rows.shape[0], ROW))


@triton.jit
def store_codes(packed_ptr, rows, n_elements, codes, BITS: tl.constexpr):
    """Store int32[rows, 8] codes of BITS bits, those past the end as zero, with padding to whole 64-bit words."""
    codes = tl.where(element_offsets(rows) < n_elements, codes, 0)
    fields = tl.reshape(codes, (rows.shape[0], BITS, 8 // BITS)) << _shifts(BITS)
    # fields do not overlap, so their sum is their union
    packed = tl.sum(fields, 2).to(tl.uint8)
    offsets = _byte_offsets(rows, BITS)
    # a 64-bit word is written whole if its first code exists
    tl.store(packed_ptr + offsets, packed, mask=offsets // 8 * (64 // BITS) < n_elements)


@triton.jit
def flag_rows(status_ptr, bad):
    """Set the status to 1 where any of bool[rows, 8] is true; rows store by themselves, so nothing is exchanged."""
    bad_row = tl.sum(bad.to(tl.int32), 1)
    tl.store(status_ptr + tl.zeros_like(bad_row), 1, mask=bad_row != 0)


@triton.jit
def _byte_offsets(rows, BITS: tl.constexpr):
    return rows[:, None] * BITS + tl.arange(0, BITS)[None, :]


@triton.jit
def _shifts(BITS: tl.constexpr):
    return (tl.arange(0, 8 // BITS) * BITS)[None, None, :]
