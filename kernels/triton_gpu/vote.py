"""majority_vote on packed words: bit-sliced counters, 32 votes per instruction."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.launch import launching_on, options, tiles
from lioncub.kernels.triton_gpu.planes import WORDS_PER_TILE, count_rows, in_units, store_majority


@triton.jit(do_not_specialize=["row_units", "parity", "n_workers", "n_units"])
def _vote_majority_kernel(
    packed_ptr,
    out_ptr,
    counts_ptr,
    row_units,
    parity,
    n_workers,
    n_units,
    PLANES: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_units.to(tl.int64) * UNIT
    planes = count_rows(packed_ptr, offsets, row_units.to(tl.int64) * UNIT, n_workers, mask, PLANES)
    store_majority(out_ptr, counts_ptr, offsets, mask, planes, n_workers, parity, PLANES, HAS_COUNTS)


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """See `lioncub.kernels.reference.majority_vote`; whole words where addresses allow, else bytes."""
    (packed, out), unit = in_units(packed, out)
    n_workers, n_words = packed.shape
    with launching_on(out):
        _vote_majority_kernel[tiles(n_words, WORDS_PER_TILE)](
            packed,
            out,
            out if counts is None else counts,
            packed.stride(0) // unit,
            parity,
            n_workers,
            n_words // unit,
            n_workers.bit_length(),
            counts is not None,
            unit,
            WORDS_PER_TILE,
            **options(out.device),
        )
