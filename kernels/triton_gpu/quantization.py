"""quantize, lion_quantize and dequantize: levels -K..K in p-bit fields; one launch for all tensors of a list."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.lists import TensorList
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix, round_to_float32
from lioncub.kernels.triton_gpu.arithmetic import mix, round_half_even, round_stochastic
from lioncub.kernels.triton_gpu.launch import (
    BLOCK_SIZE,
    FLAGS,
    ROW_THREADS,
    STREAM_ARGUMENTS,
    elementwise_threads,
    form_of,
    kind_at,
    pointer_at,
    run,
    stream_of,
    stream_words,
    table_of,
    tile_of,
)
from lioncub.kernels.triton_gpu.rows import (
    ROW,
    element_offsets,
    flag_rows,
    load,
    load_codes,
    load_rows,
    random_rows,
    rows_from,
    store_codes,
    store_elements,
    tile_rows,
    value_of,
)


@triton.jit(do_not_specialize=STREAM_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _quantize_values_kernel(
    rows_ptr,
    owners_ptr,
    nonfinite_ptr,
    beta1,
    beta1_new,
    gain_level,
    seed_low,
    seed_high,
    stream_step,
    worker,
    KINDS: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    tensor, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 4, BLOCK_SIZE)
    kind, is_wide = form_of(row_ptr, start, n_elements, 4, BLOCK_SIZE)
    pointers = (row_ptr, nonfinite_ptr + tensor)
    numbers = (beta1, beta1_new, gain_level)
    stream = (stream_of(row_ptr, seed_low, seed_high, stream_step, 4), worker)
    rows = rows_from(start, BLOCK_SIZE)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _quantize_tile(
                    pointers,
                    numbers,
                    stream,
                    rows,
                    None,
                    kind_at(KINDS, k),
                    HAS_FLAGS,
                    IS_UPDATE,
                    STOCHASTIC,
                    BITS,
                    SCALE_BLOCK,
                )
            else:
                _quantize_tile(
                    pointers,
                    numbers,
                    stream,
                    rows,
                    n_elements,
                    kind_at(KINDS, k),
                    HAS_FLAGS,
                    IS_UPDATE,
                    STOCHASTIC,
                    BITS,
                    SCALE_BLOCK,
                )


@triton.jit
def _quantize_tile(
    pointers,
    numbers,
    stream,
    rows,
    n_elements,
    KIND: tl.constexpr,
    HAS_FLAGS: tl.constexpr,
    IS_UPDATE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """Store the codes of ``rows``, all of which exist where ``n_elements`` is None.

    ``stream`` is ((seed_low, seed_high, step, key), worker).
    """
    row_ptr, nonfinite_ptr = pointers
    beta1, beta1_new, gain_level = numbers
    x = load_rows(pointer_at(row_ptr, 0, KIND, n_elements), rows, n_elements)
    if IS_UPDATE:
        g = load_rows(pointer_at(row_ptr, 1, KIND, n_elements), rows, n_elements)
        x = mix(value_of(beta1), value_of(beta1_new), x, g)
    if HAS_FLAGS:
        flag_rows(nonfinite_ptr, x)
    scale = load_scales(pointer_at(row_ptr, 2, KIND, n_elements), rows, n_elements, SCALE_BLOCK)
    factor = tl.where(scale == 0, 0.0, tl.math.div_rn(gain_level + tl.zeros_like(scale), scale))
    ratio = clip_ratio(x * factor, BITS)
    if STOCHASTIC:
        words, worker = stream
        level = round_stochastic(ratio, random_rows(rows, words, worker))
    else:
        level = round_half_even(ratio)
    largest: tl.constexpr = 2 ** (BITS - 1) - 1
    store_codes(pointer_at(row_ptr, 3, KIND, n_elements), rows, n_elements, level + largest, BITS)


@triton.jit
def _dequantize_codes_kernel(
    packed_ptr,
    scale_ptr,
    out_ptr,
    gain_level,
    n_elements,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    rows = tile_rows(BLOCK_SIZE)
    largest: tl.constexpr = 2 ** (BITS - 1) - 1
    level = load_codes(packed_ptr, rows, n_elements, BITS) - largest
    scale = load_scales(scale_ptr, rows, n_elements, SCALE_BLOCK)
    unit = tl.math.div_rn(scale, gain_level + tl.zeros_like(scale))
    store_elements(out_ptr, element_offsets(rows), n_elements, level.to(tl.float32) * unit)


@triton.jit
def load_scales(scale_ptr, rows, n_elements, SCALE_BLOCK: tl.constexpr):
    """fp32 scales that broadcast over [rows, 8]: one per tile, per row or per element, as few as the block allows."""
    if SCALE_BLOCK == 0:
        scale = tl.load(scale_ptr) + tl.zeros((1, 1), tl.float32)
    else:
        offsets = rows[:, None] * ROW if SCALE_BLOCK >= ROW else element_offsets(rows)
        scale = load(scale_ptr + offsets // SCALE_BLOCK, offsets, n_elements)
    return scale


@triton.jit
def clip_ratio(ratio, BITS: tl.constexpr):
    """``ratio`` clipped to -K..K, 0 for NaN."""
    largest: tl.constexpr = 2 ** (BITS - 1) - 1
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    return tl.minimum(tl.maximum(ratio, -largest), largest)


def lion_quantize(
    exp_avg: TensorList,
    grad: TensorList | None,
    beta1: Mix,
    scale: TensorList,
    gain: float,
    block: int,
    bits: int,
    streams: Streams | None,
    out: TensorList,
    nonfinite: Tensor | None,
) -> None:
    """See `lioncub.kernels.reference.lion_quantize`."""
    if table := table_of(exp_avg, grad, scale, out, streams=streams):
        numbers = (*beta1, round_to_float32(gain * largest_level(bits)), *stream_words(streams))
        flags = (grad is not None, streams is not None, bits, block)
        table.launch(_quantize_values_kernel, nonfinite, numbers, *flags, threads=ROW_THREADS)


def dequantize(packed: Tensor, scale: Tensor, gain: float, block: int, bits: int, out: Tensor) -> None:
    """See `lioncub.kernels.reference.dequantize`."""
    n, gain_level = out.numel(), round_to_float32(gain * largest_level(bits))
    args, threads = (packed, scale, out, gain_level, n, bits, block), elementwise_threads(out.dtype)
    run(_dequantize_codes_kernel, n, BLOCK_SIZE, out.device, *args, threads=threads)
