"""Tiles of rows: 8 consecutive elements per row, one row per thread.

A row's codes of b bits are exactly b whole bytes, so a thread packs and unpacks its own bytes in registers, without
shuffles or shared memory, while it loads and stores 128 bits at a time.
"""

import triton
import triton.language as tl

from lioncub.kernels.triton_gpu.arithmetic import INTERPRETED, narrow, narrow_stochastic, widen

ROW = tl.constexpr(8)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def value_of(scalar):
    """Return a run-time number that the host gave, or that is on the device."""
    if _INTERPRETED:
        # numbers in tuples come as Python's; only compiled code makes tensors of them
        value = tl.load(scalar) if hasattr(scalar, "dtype") and scalar.dtype.is_ptr() else scalar
    else:
        value = tl.load(scalar) if scalar.dtype.is_ptr() else scalar
    return value


@triton.jit
def tile_rows(BLOCK_SIZE: tl.constexpr):
    """int64 numbers of this program's rows."""
    return rows_from(tl.program_id(0).to(tl.int64) * BLOCK_SIZE, BLOCK_SIZE)


@triton.jit
def rows_from(start, BLOCK_SIZE: tl.constexpr):
    """int64 numbers of the rows of the tile that begins at element ``start``, a multiple of BLOCK_SIZE."""
    return start // ROW + tl.arange(0, BLOCK_SIZE // ROW)


@triton.jit
def element_offsets(rows):
    """int64[rows, 8] element offsets."""
    return rows[:, None] * ROW + tl.arange(0, ROW)[None, :]


@triton.jit
def parity_bits(parity):
    """bool[1, 8]: (j + t) & 1 of a row's elements; the same in every row, since rows start at even j (rule 3)."""
    return ((tl.arange(0, ROW) + parity_of(parity)) & 1)[None, :] != 0


@triton.jit
def parity_of(count):
    """Return the lowest bit, int32, of a count that the host gave or that is stored on the device."""
    return (value_of(count) & 1).to(tl.int32)


@triton.jit
def load(pointers, offsets, n_elements):
    """Load what is at offsets below ``n_elements``, else 0; with None for ``n_elements`` all of it."""
    return tl.load(pointers) if n_elements is None else tl.load(pointers, mask=offsets < n_elements, other=0)


@triton.jit
def store(pointers, value, offsets, n_elements):
    """Store where `load` loads."""
    if n_elements is None:
        tl.store(pointers, value)
    else:
        tl.store(pointers, value, mask=offsets < n_elements)


@triton.jit
def load_elements(x_ptr, offsets, n_elements):
    """fp32 elements, spread over the threads as the addresses suit best; 0 past the end."""
    return widen(load(x_ptr + offsets, offsets, n_elements))


@triton.jit
def load_current(x_ptr, master_ptr, offsets, n_elements, HAS_MASTERS: tl.constexpr):
    """fp32 values of parameters: with masters those that round to the elements, else the elements."""
    x = load_elements(x_ptr, offsets, n_elements)
    if HAS_MASTERS and (x_ptr.dtype.element_ty != tl.float32):
        master = load(master_ptr + offsets, offsets, n_elements)
        x = tl.where(widen(narrow(master, x_ptr.dtype.element_ty)) == x, master, x)
    return x


@triton.jit
def store_master(x_ptr, master_ptr, offsets, n_elements, value, HAS_MASTERS: tl.constexpr):
    """Store the fp32 values of parameters in their masters, where they have any."""
    if HAS_MASTERS and (x_ptr.dtype.element_ty != tl.float32):
        store(master_ptr + offsets, value, offsets, n_elements)


@triton.jit
def store_elements(x_ptr, offsets, n_elements, value):
    """Store fp32 elements, rounded to the pointer's dtype."""
    store(x_ptr + offsets, narrow(value, x_ptr.dtype.element_ty), offsets, n_elements)


@triton.jit
def load_rows(x_ptr, rows, n_elements):
    """fp32[rows, 8], each row in one thread; 0 past the end."""
    if x_ptr.dtype.element_ty == tl.float32:
        # halves of 128 bits, joined in registers; one load of the row would be spread over two threads
        offsets = rows[:, None] * ROW + tl.arange(0, ROW // 2)[None, :]
        low = load(x_ptr + offsets, offsets, n_elements)
        high = load(x_ptr + offsets + ROW // 2, offsets + ROW // 2, n_elements)
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
        store(x_ptr + offsets, low, offsets, n_elements)
        store(x_ptr + offsets + ROW // 2, high, offsets + ROW // 2, n_elements)
    else:
        store_elements(x_ptr, element_offsets(rows), n_elements, value)


@triton.jit
def load_codes(packed_ptr, rows, n_elements, BITS: tl.constexpr):
    """int32[rows, 8] codes of BITS bits, 0 past the end; all bytes up to the last element's exist, pads included."""
    # a row's bytes all exist if its first code does
    packed = load(packed_ptr + _byte_offsets(rows, BITS), rows[:, None] * ROW, n_elements).to(tl.int32)
    if BITS == 16:
        # bytes do not overlap, so their sum is their union
        codes = tl.sum(tl.reshape(packed, (rows.shape[0], ROW, 2)) << (tl.arange(0, 2) * 8)[None, None, :], 2)
    else:
        codes = tl.reshape((packed[:, :, None] >> _shifts(BITS)) & (2**BITS - 1), (rows.shape[0], ROW))
    return codes


@triton.jit
def store_codes(packed_ptr, rows, n_elements, codes, BITS: tl.constexpr):
    """Store int32[rows, 8] codes of BITS bits, those past the end as zero, with padding to whole 64-bit words."""
    if n_elements is not None:
        codes = tl.where(element_offsets(rows) < n_elements, codes, 0)
    fields = tl.reshape(codes, (rows.shape[0], BITS, 8 // BITS)) << _shifts(BITS)
    # fields do not overlap, so their sum is their union
    packed = tl.sum(fields, 2).to(tl.uint8)
    offsets = _byte_offsets(rows, BITS)
    # a 64-bit word is written whole if its first code exists
    store(packed_ptr + offsets, packed, offsets // 8 * (64 // BITS), n_elements)


@triton.jit
def store_signs(packed_ptr, rows, n_elements, value, parity):
    """Store the one-bit codes of fp32[rows, 8] as `is_up` defines them, those past the end as zero, with padding.

    A value is negated where ties go up: then it is past zero where its code is not the parity bit, and one operation
    on a row's byte is left to do.
    """
    goes_up = parity_bits(parity)
    differs = value * tl.where(goes_up, -1.0, 1.0) > 0
    shifts = tl.arange(0, ROW)[None, :]
    if n_elements is None:
        ties = (0xAA ^ -parity_of(parity)) & 0xFF
    else:
        ties = tl.sum((goes_up & (element_offsets(rows) < n_elements)).to(tl.int32) << shifts, 1)
    packed = tl.sum(differs.to(tl.int32) << shifts, 1) ^ ties
    # a 64-bit word is written whole if its first code exists
    store(packed_ptr + rows, packed.to(tl.uint8), rows // 8 * 64, n_elements)


@triton.jit
def flag_rows(nonfinite_ptr, value):
    """Set the flag to 1 where any of fp32[rows, 8] is Inf or NaN; rows store by themselves: nothing is exchanged."""
    # 0 for what is finite, else NaN, which no sum loses
    total = tl.sum(value * 0.0, 1)
    tl.store(nonfinite_ptr + tl.zeros_like(total).to(tl.int32), 1, mask=total != 0)


@triton.jit
def random_rows(rows, stream, worker):
    """uint32[rows, 8] words of a stream (rule 8): a row takes two Philox blocks of four words.

    ``stream`` is (seed_low, seed_high, step, key), the key one of `Streams.keys`.
    """
    seed_low, seed_high, step, key = stream
    blocks = (rows[:, None] * 2 + tl.arange(0, 2)[None, :] + (key >> 32)).to(tl.uint32)
    zero = tl.zeros_like(blocks)
    w0, w1, w2, w3 = tl.random.philox_impl(
        blocks,
        zero + value_of(step).to(tl.uint32),
        zero + key.to(tl.uint32),
        zero + tl.cast(worker, tl.uint32),
        zero + seed_low.to(tl.uint32),
        zero + seed_high.to(tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (rows.shape[0], ROW))


@triton.jit
def store_rounded(x_ptr, offsets, n_elements, value, rows, stream, worker, STOCHASTIC: tl.constexpr):
    """`store_elements` of ``rows``; with STOCHASTIC bf16 and fp16 take either neighbour."""
    if STOCHASTIC and (x_ptr.dtype.element_ty != tl.float32):
        words = random_rows(rows, stream, worker)
        rounded = narrow_stochastic(value, x_ptr.dtype.element_ty, tl.reshape(words, value.shape))
        store(x_ptr + offsets, rounded, offsets, n_elements)
    else:
        store_elements(x_ptr, offsets, n_elements, value)


@triton.jit
def _byte_offsets(rows, BITS: tl.constexpr):
    return rows[:, None] * BITS + tl.arange(0, BITS)[None, :]


@triton.jit
def _shifts(BITS: tl.constexpr):
    return (tl.arange(0, 8 // BITS) * BITS)[None, None, :]
