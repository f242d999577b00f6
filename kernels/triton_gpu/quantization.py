"""quantize, lion_quantize and dequantize: levels -K..K in p-bit fields."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.random_bits import Stream
from lioncub.kernels.scalars import Mix, round_to_float32
from lioncub.kernels.triton_gpu.arithmetic import mix, round_half_even, round_stochastic
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE, FLAGS, elementwise_threads, launching_on, options, tiles
from lioncub.kernels.triton_gpu.random_rows import random_rows, signed_words
from lioncub.kernels.triton_gpu.rows import (
    ROW,
    element_offsets,
    flag_rows,
    load,
    load_codes,
    load_rows,
    rows_from,
    store_codes,
    store_elements,
    tile_rows,
    value_of,
)
from lioncub.kernels.triton_gpu.tables import (
    form_of,
    kind_at,
    only_one,
    pointer_at,
    pointer_or,
    stream_of,
    table_of,
    tile_of,
)

_UNUSED = Mix(0.0, 0.0)
_NO_STREAM = Stream(0, 0, 0, 0)
# in what `_words_of` gives
_TENSOR = 3
_STREAM_ARGUMENTS = ["seed_low", "seed_high", "step", "tensor", "worker"]


@triton.jit(do_not_specialize=_STREAM_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _quantize_values_kernel(
    x_ptr,
    grad_ptr,
    scale_ptr,
    out_ptr,
    status_ptr,
    beta1,
    beta1_new,
    gain_level,
    seed_low,
    seed_high,
    step,
    tensor,
    worker,
    n_elements,
    IS_UPDATE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    quantize_tile(
        x_ptr,
        grad_ptr,
        scale_ptr,
        out_ptr,
        status_ptr,
        (beta1, beta1_new, gain_level),
        ((seed_low, seed_high, step, tensor), worker),
        tile_rows(BLOCK_SIZE),
        n_elements,
        IS_UPDATE,
        HAS_STATUS,
        STOCHASTIC,
        BITS,
        SCALE_BLOCK,
    )


@triton.jit
def quantize_tile(
    x_ptr,
    grad_ptr,
    scale_ptr,
    out_ptr,
    status_ptr,
    numbers,
    stream,
    rows,
    n_elements,
    IS_UPDATE: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """Store the codes of ``rows``, all of which exist where ``n_elements`` is None.

    ``stream`` is ((seed_low, seed_high, step, tensor), worker).
    """
    beta1, beta1_new, gain_level = numbers
    x = load_rows(x_ptr, rows, n_elements)
    if IS_UPDATE:
        x = mix(value_of(beta1), value_of(beta1_new), x, load_rows(grad_ptr, rows, n_elements))
    if HAS_STATUS:
        flag_rows(status_ptr, x)
    scale = load_scales(scale_ptr, rows, n_elements, SCALE_BLOCK)
    factor = tl.where(scale == 0, 0.0, tl.math.div_rn(gain_level + tl.zeros_like(scale), scale))
    ratio = clip_ratio(x * factor, BITS)
    if STOCHASTIC:
        words, worker = stream
        seed_low, seed_high, step, tensor = words
        level = round_stochastic(ratio, random_rows(rows, seed_low, seed_high, step, tensor, worker))
    else:
        level = round_half_even(ratio)
    largest: tl.constexpr = 2 ** (BITS - 1) - 1
    store_codes(out_ptr, rows, n_elements, level + largest, BITS)


@triton.jit(do_not_specialize=_STREAM_ARGUMENTS, do_not_specialize_on_alignment=FLAGS)
def _quantize_updates_kernel(
    rows_ptr,
    owners_ptr,
    status_ptr,
    beta1,
    beta1_new,
    gain_level,
    seed_low,
    seed_high,
    step,
    tensor,
    worker,
    KINDS: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    # ``tensor`` is that of one stream; a row has the number of its own
    place, row_ptr, start, n_elements = tile_of(rows_ptr, owners_ptr, 4, BLOCK_SIZE)
    kind, is_wide = form_of(row_ptr, start, n_elements, 4, BLOCK_SIZE)
    numbers = (beta1, beta1_new, gain_level)
    stream = (stream_of(row_ptr, seed_low, seed_high, step, 4), worker)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            if is_wide:
                _quantize_row(
                    row_ptr,
                    status_ptr + place,
                    numbers,
                    stream,
                    start,
                    None,
                    kind_at(KINDS, k),
                    HAS_STATUS,
                    STOCHASTIC,
                    BITS,
                    SCALE_BLOCK,
                    BLOCK_SIZE,
                )
            else:
                _quantize_row(
                    row_ptr,
                    status_ptr + place,
                    numbers,
                    stream,
                    start,
                    n_elements,
                    kind_at(KINDS, k),
                    HAS_STATUS,
                    STOCHASTIC,
                    BITS,
                    SCALE_BLOCK,
                    BLOCK_SIZE,
                )


@triton.jit
def _quantize_row(
    row_ptr,
    status_ptr,
    numbers,
    stream,
    start,
    n_elements,
    KIND: tl.constexpr,
    HAS_STATUS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    quantize_tile(
        pointer_at(row_ptr, 0, KIND, n_elements),
        pointer_at(row_ptr, 1, KIND, n_elements),
        pointer_at(row_ptr, 2, KIND, n_elements),
        pointer_at(row_ptr, 3, KIND, n_elements),
        status_ptr,
        numbers,
        stream,
        rows_from(start, BLOCK_SIZE),
        n_elements,
        True,
        HAS_STATUS,
        STOCHASTIC,
        BITS,
        SCALE_BLOCK,
    )


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


def quantize(x: Tensor, scale: Tensor, gain: float, block: int, bits: int, stream: Stream | None, out: Tensor) -> None:
    """See `lioncub.kernels.reference.quantize`."""
    _quantize(x, None, _UNUSED, scale, gain, block, bits, stream, out, None)


def lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Mix,
    scale: Sequence[Tensor],
    gain: float,
    block: int,
    bits: int,
    streams: Sequence[Stream] | None,
    out: Sequence[Tensor],
    status: Tensor | None,
) -> None:
    """See `lioncub.kernels.reference.lion_quantize`."""
    i = only_one(grad)
    if i is not None:
        status = None if status is None else status[i : i + 1]
        stream = None if streams is None else streams[i]
        _quantize(exp_avg[i], grad[i], beta1, scale[i], gain, block, bits, stream, out[i], status)
        return
    words = [signed_words(*_words_of(stream)) for stream in streams or ()]
    numbers = [word[_TENSOR] for word in words] or None
    with launching_on(grad[0]):
        if table := table_of(exp_avg, grad, scale, out, numbers=numbers):
            rows, owners, kinds = table
            _quantize_updates_kernel[table.grid](
                rows,
                owners,
                pointer_or(status, owners),
                *beta1,
                round_to_float32(gain * largest_level(bits)),
                *(words[0] if words else _words_of(_NO_STREAM)),
                kinds,
                status is not None,
                bool(words),
                bits,
                block,
                BLOCK_SIZE,
                **options(grad[0].device),
            )


def dequantize(packed: Tensor, scale: Tensor, gain: float, block: int, bits: int, out: Tensor) -> None:
    """See `lioncub.kernels.reference.dequantize`."""
    n = out.numel()
    gain_level = round_to_float32(gain * largest_level(bits))
    with launching_on(out):
        _dequantize_codes_kernel[tiles(n)](
            packed, scale, out, gain_level, n, bits, block, BLOCK_SIZE, **options(out.device, elementwise_threads(out))
        )


def _quantize(
    x: Tensor,
    grad: Tensor | None,
    beta1: Mix,
    scale: Tensor,
    gain: float,
    block: int,
    bits: int,
    stream: Stream | None,
    out: Tensor,
    status: Tensor | None,
) -> None:
    n = x.numel()
    with launching_on(x):
        _quantize_values_kernel[tiles(n)](
            x,
            x if grad is None else grad,
            scale,
            out,
            out if status is None else status,
            *beta1,
            round_to_float32(gain * largest_level(bits)),
            *signed_words(*_words_of(stream or _NO_STREAM)),
            n,
            grad is not None,
            status is not None,
            stream is not None,
            bits,
            block,
            BLOCK_SIZE,
            **options(x.device),
        )


def _words_of(stream: Stream) -> tuple[int, ...]:
    return (*stream.key, stream.step, stream.tensor, stream.worker)
