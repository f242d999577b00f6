"""Fields of sums: 32 bits of fields at a time, four words per thread.

Codes are moved into wider fields in halvings: the upper half of a word's codes to where it belongs, then the upper
half of each half, and so on; bits of wide fields are moved together the other way round. For arithmetic, every other
field is masked out, so that its bits take the carry of its neighbour. Words of fields are added as whole numbers, since
no field ever carries into the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, ROW_THREADS, run
from lioncub.kernels.triton_gpu.rows import element_offsets, load_codes, parity_of, store_codes, tile_rows
from lioncub.kernels.triton_gpu.vote import count_bits, in_words


@triton.jit
def _spread_codes_kernel(
    packed_ptr, out_ptr, n_bytes, n_words, BITS: tl.constexpr, FIELD_BITS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    words = load_fours(packed_ptr, rows, n_bytes, 32 * BITS // FIELD_BITS)
    offsets = four_offsets(rows)
    words = spread_word(words, BITS, FIELD_BITS)
    store_words(out_ptr, offsets, words, n_words)


@triton.jit(do_not_specialize=["parity", "n_workers"])
def _vote_fields_kernel(
    fields_ptr,
    out_ptr,
    counts_ptr,
    parity,
    n_workers,
    n_words,
    n_bytes,
    FIELD_BITS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    words = load_words(fields_ptr, four_offsets(rows), n_words)
    votes = join_votes(fold_word(winners(words, n_workers, parity, FIELD_BITS), FIELD_BITS), FIELD_BITS)
    offsets = rows[:, None] * votes.shape[1] + tl.arange(0, votes.shape[1])[None, :]
    tl.store(out_ptr + offsets, votes.to(tl.uint8), mask=offsets < n_bytes)
    if HAS_COUNTS:
        tied = fields_alike(words, n_workers // 2, FIELD_BITS) & ((n_workers & 1) - 1)
        unanimous = fields_alike(words, 0, FIELD_BITS) | fields_alike(words, n_workers, FIELD_BITS)
        # fields past the end are zero: unanimous, but not counted
        in_tile: tl.constexpr = BLOCK_SIZE * 128 // FIELD_BITS
        pads = tl.maximum((tl.program_id(0).to(tl.int64) + 1) * in_tile - 8 * n_bytes, 0)
        tl.atomic_add(counts_ptr, tl.sum(tl.sum(count_bits(tied), 1)).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.sum(tl.sum(count_bits(unanimous), 1)).to(tl.int64) - pads)


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
    store_words(out_ptr, offsets, total, n_words)


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
    fields = load_codes(fields_ptr, rows, n_elements, FIELD_BITS)
    total = fields * step - offset
    store_codes(out_ptr, rows, n_elements, 1 + (total > 0).to(tl.int32) - (total < 0).to(tl.int32), 2)
    if HAS_COUNTS:
        # fields past the end are zero, but not counted
        valid = element_offsets(rows) < n_elements
        tied = (total == 0) & valid
        unanimous = ((fields == 0) | (fields == largest)) & valid
        tl.atomic_add(counts_ptr, tl.sum(tl.sum(tied.to(tl.int32), 1)).to(tl.int64))
        tl.atomic_add(counts_ptr + 1, tl.sum(tl.sum(unanimous.to(tl.int32), 1)).to(tl.int64))


@triton.jit
def four_offsets(rows):
    """int64[rows, 4] numbers of the rows' words."""
    return rows[:, None] * 4 + tl.arange(0, 4)[None, :]


@triton.jit
def load_fours(packed_ptr, rows, n_bytes, BITS: tl.constexpr):
    """int32[rows, 4] fields of BITS bits, each row's in one thread; 0 past the end."""
    per_row: tl.constexpr = BITS // 2 if BITS > 1 else 1
    offsets = (rows[:, None] * BITS >> 1) + tl.arange(0, per_row)[None, :]
    packed = tl.load(packed_ptr + offsets, mask=offsets < n_bytes, other=0).to(tl.int32)
    if BITS == 16:
        # bytes do not overlap, so their sum is their union
        fields = tl.sum(tl.reshape(packed, (rows.shape[0], 4, 2)) << (tl.arange(0, 2) * 8)[None, None, :], 2)
    elif BITS == 1:
        fields = (packed >> ((rows & 1) * 4).to(tl.int32)[:, None]) >> tl.arange(0, 4)[None, :] & 1
    else:
        parts = packed[:, :, None] >> (tl.arange(0, 8 // BITS) * BITS)[None, None, :]
        fields = tl.reshape(parts & (2**BITS - 1), (rows.shape[0], 4))
    return fields


@triton.jit
def store_words(out_ptr, offsets, words, n_words):
    """Store int32 words in an int32 or a uint8 tensor of ``n_words`` elements."""
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + offsets, words, mask=offsets < n_words)
    else:
        places = tl.arange(0, 4)[None, None, :]
        offsets = offsets[:, :, None] * 4 + places
        tl.store(out_ptr + offsets, (words[:, :, None] >> (places * 8)).to(tl.uint8), mask=offsets < n_words)


@triton.jit
def load_words(words_ptr, offsets, n_words):
    """int32 words, of an int32 or a uint8 tensor of ``n_words`` elements; 0 past the end."""
    if words_ptr.dtype.element_ty == tl.int32:
        words = tl.load(words_ptr + offsets, mask=offsets < n_words, other=0)
    else:
        places = tl.arange(0, 4)[None, None, :]
        offsets = offsets[:, :, None] * 4 + places
        words = tl.load(words_ptr + offsets, mask=offsets < n_words, other=0).to(tl.int32) << (places * 8)
        words = tl.sum(words, 2)
    return words


@triton.constexpr_function
def repeated(width, period):
    """``width`` ones in every ``period`` bits of a word, from the lowest up; the highest is zero, so an int32 does."""
    return (2**width - 1) * ((2**32 - 1) // (2**period - 1))


@triton.jit
def spread_word(word, BITS: tl.constexpr, FIELD_BITS: tl.constexpr):
    """Return the 32/FIELD_BITS codes at the bottom of each word, in fields."""
    for k in tl.static_range(4, -1, -1):
        # 2^k codes are the upper half
        if FIELD_BITS << k < 32:
            word = (word | (word << (FIELD_BITS - BITS << k))) & repeated(BITS << k, FIELD_BITS << k)
    return word


@triton.jit
def fold_word(word, FIELD_BITS: tl.constexpr):
    """Return the lowest bits of the fields, moved together at the bottom of each word; their other bits are zero."""
    for k in tl.static_range(5):
        # 2^k bits each stand together already; fields of one bit all do
        if FIELD_BITS > 1 and FIELD_BITS << k < 32:
            word = (word | (word >> (FIELD_BITS - 1 << k))) & repeated(2 << k, 2 * FIELD_BITS << k)
    return word


@triton.jit
def winners(word, n_workers, parity, FIELD_BITS: tl.constexpr):
    """Return a 1 in the lowest bit of each field that wins the vote."""
    every_other: tl.constexpr = repeated(FIELD_BITS, 2 * FIELD_BITS)
    lowest: tl.constexpr = repeated(1, 2 * FIELD_BITS)
    # a tied field wins where its parity bit is 1, which is where it wins with half the votes
    parity_bit = parity_of(parity)
    even_least = n_workers // 2 + 1 - ((n_workers + 1) & parity_bit)
    odd_least = n_workers // 2 + 1 - ((n_workers + 1) & (1 - parity_bit))
    # a field and its number carry into the next field, which is masked out
    even = (word & every_other) + (2**FIELD_BITS - even_least) * lowest
    odd = ((word >> FIELD_BITS) & every_other) + (2**FIELD_BITS - odd_least) * lowest
    return ((even >> FIELD_BITS) & lowest) | (((odd >> FIELD_BITS) & lowest) << FIELD_BITS)


@triton.jit
def fields_alike(word, number, FIELD_BITS: tl.constexpr):
    """Return a 1 in the lowest bit of each field that is ``number``."""
    every_other: tl.constexpr = repeated(FIELD_BITS, 2 * FIELD_BITS)
    lowest: tl.constexpr = repeated(1, 2 * FIELD_BITS)
    # what differs from the number in any bit carries
    even = ((word & every_other) ^ (number * lowest)) + every_other
    odd = (((word >> FIELD_BITS) & every_other) ^ (number * lowest)) + every_other
    return (~(even >> FIELD_BITS) & lowest) | ((~(odd >> FIELD_BITS) & lowest) << FIELD_BITS)


@triton.jit
def join_votes(bits, FIELD_BITS: tl.constexpr):
    """int32[rows, 16/FIELD_BITS] bytes, from the 32/FIELD_BITS votes at the bottom of each of four words."""
    rows: tl.constexpr = bits.shape[0]
    if FIELD_BITS < 4:
        places = (tl.arange(0, 4 // FIELD_BITS) * 8)[None, None, :]
        votes = tl.reshape((bits[:, :, None] >> places) & 0xFF, (rows, 16 // FIELD_BITS))
    else:
        # bits do not overlap, so their sum is their union
        per_byte: tl.constexpr = FIELD_BITS // 4
        places = (tl.arange(0, per_byte) * (32 // FIELD_BITS))[None, None, :]
        votes = tl.sum(tl.reshape(bits, (rows, 4 // per_byte, per_byte)) << places, 2)
    return votes


def majority_of_fields(
    fields: Tensor, field_bits: int, voters: int, parity: int, out: Tensor, counts: Tensor | None
) -> None:
    """See `lioncub.kernels.reference.majority_of_fields`."""
    n_rows = triton.cdiv(fields.numel(), 16)
    (fields,) = in_words(fields)
    args = (fields, out, out if counts is None else counts, parity, voters, fields.numel(), out.numel(), field_bits)
    run(_vote_fields_kernel, n_rows, ROW_THREADS, out.device, *args, counts is not None)


def add_codes(packed: Tensor, bits: int, field_bits: int, out: Tensor) -> None:
    """See `lioncub.kernels.reference.add_codes`; whole words where addresses allow, else bytes."""
    n_rows = triton.cdiv(out.numel(), 16)
    (out,) = in_words(out)
    if bits == field_bits:
        (packed,) = in_words(packed)
    n_packed_rows, n_packed = packed.shape
    sizes = (n_packed, out.numel(), bits, field_bits)
    if n_packed_rows == 1 and bits < field_bits:
        # without a sum the threads need not exchange anything
        run(_spread_codes_kernel, n_rows, ROW_THREADS, out.device, packed, out, *sizes)
    else:
        run(_add_codes_kernel, n_rows, ROW_THREADS, out.device, packed, out, packed.stride(0), n_packed_rows, *sizes)


def ternary_of_fields(
    fields: Tensor, field_bits: int, step: int, offset: int, largest: int, out: Tensor, counts: Tensor | None
) -> None:
    """See `lioncub.kernels.reference.ternary_of_fields`."""
    n = 4 * out.numel()
    args = (fields, out, out if counts is None else counts, step, offset, largest, n, field_bits, counts is not None)
    run(_sign_fields_kernel, n, BLOCK_SIZE, out.device, *args)
