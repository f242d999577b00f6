"""Values, and Lion's updates, as few integer levels in p-bit fields, and back.

``starts`` as in `lioncub.kernels.lion`; scales are then one flat fp32 buffer, tensor i's from `scale_starts` [i] on.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import FLOAT_DTYPES, check_choice, check_flat, check_float, check_integer
from lioncub.kernels.dispatch import backend, mark_written, register
from lioncub.kernels.layout import code_bytes, packed_bytes
from lioncub.kernels.lists import (
    KEPT,
    TensorList,
    Tensors,
    check_lists_apart,
    firsts_of,
    flat_list,
    tensor_lists,
    update_lists,
)
from lioncub.kernels.rounding import MAX_ELEMENTS, NO_STREAM, Arguments, stream_arguments, streams_of
from lioncub.kernels.scalars import Mix, Scalar, float_scalar

FIELD_BITS = (2, 4, 8)
# gain*K*x/scale is rounded; with 1/2 and K = 1 every "linf" code would be zero
GAINS = {"l1": 0.5, "l2": 0.5, "linf": 1.0}


def quantize(
    x: Tensor,
    *,
    bits: int = 2,
    norm: str = "l1",
    scale: Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
    worker: int = 0,
    step: int | Tensor = 0,
    param_id: int = 0,
    block: int | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize ``x`` to levels -K..K, K = 2^(bits-1) - 1, stored as level + K (Lion Cub, arXiv 2411.16462, sec. 2).

    ``level = clip(round(gain*K*x/scale), -K, K)``, half to even; gain is 1/2 for "l1" and "l2", 1 for "linf". An
    element that is NaN, and every element of a block whose scale is 0, has level 0.

    Args:
        x: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        bits: width of a field: 2, 4 or 8.
        norm: the scale is the mean ("l1"), root mean square ("l2") or maximum ("linf") of |x|.
        scale: fp32[blocks] to use; computed unless given.
        stochastic: round up with probability equal to the fraction, with Philox words that are a pure function of
            (seed, worker, step, param_id, element).
        block: elements per scale, a power of two; one scale for the whole tensor unless given.
        out: uint8[packed_bytes(n, bits)] to write; allocated unless given.
        impl: "auto", "triton", "cpu" or "reference". Codes are bit-identical for the same scale, scales within 1e-6.

    Returns:
        (``out``, fp32[blocks]).
    """
    check_float("x", x)
    size = check_fields(bits, norm, block, x.numel(), stochastic)
    stream = stream_arguments("stochastic", seed, worker, step, [param_id], None, [x]) if stochastic else NO_STREAM
    if out is None:
        out = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=x.device)
    given = None if scale is None else [scale]
    tensor_lists({"out": [out]} if given is None else {"out": [out], "scale": given}, {}, None)
    (scale,) = _quantize_lists([x], [], (None, None), given, stream, [out], None, (bits, norm, size), None, impl)
    return out, scale


def lion_quantize(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    bits: int = 2,
    norm: str = "l1",
    scale: Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
    worker: int = 0,
    step: int | Tensor = 0,
    param_id: int = 0,
    block: int | None = None,
    out: Tensor | None = None,
    nonfinite: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`quantize` of Lion's update ``beta1*exp_avg + (1-beta1)*grad_scale*grad``, which is never stored.

    One pass over exp_avg and grad, two where the scale is not given. Mutates only ``out`` and ``nonfinite``, int32[1],
    set to 1 where any element of grad, exp_avg or the update is not finite.
    """
    check_float("grad", grad)
    check_format(bits, norm, block)
    if out is None:
        out = torch.empty(packed_bytes(grad.numel(), bits), dtype=torch.uint8, device=grad.device)
    scales = foreach_lion_quantize(
        [exp_avg],
        [grad],
        beta1=beta1,
        bits=bits,
        norm=norm,
        scale=None if scale is None else [scale],
        stochastic=stochastic,
        seed=seed,
        worker=worker,
        step=step,
        param_ids=[param_id],
        block=block,
        out=[out],
        nonfinite=nonfinite,
        grad_scale=grad_scale,
        impl=impl,
    )
    return out, scales[0]


def foreach_lion_quantize(
    exp_avg: Tensors,
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    bits: int = 2,
    norm: str = "l1",
    scale: Tensors | None = None,
    stochastic: bool = False,
    seed: int = 0,
    worker: int = 0,
    step: int | Tensor = 0,
    param_ids: Sequence[int] | None = None,
    stream_starts: Sequence[int] | None = None,
    block: int | None = None,
    out: Tensors,
    nonfinite: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> Sequence[Tensor]:
    """`lion_quantize` of lists; gives their scales. ``nonfinite`` is int32[n] for n tensors.

    ``param_ids`` select the random streams; they are the places in the list unless given. ``stream_starts``, multiples
    of 4, are the elements of whole tensors at which these begin: the codes of a shard are then the whole's. ``step``
    may be a 0-dim int64 tensor on the device. With ``starts`` momentum, codes and new scales are flat; given scales may
    be a list. The result is then a list of the one buffer.
    """
    (g, m, codes), size = tensor_lists({"grad": grad}, {"exp_avg": exp_avg, "out": out}, starts), block or 0
    check_fields(bits, norm, block, max([each.numel() for each in g], default=0), stochastic)
    check_flat("nonfinite", nonfinite, torch.int32, len(g), "grad", g[0] if g else None)
    given = [scale] if isinstance(scale, Tensor) and starts is not None else scale
    if given is not None:
        (given,) = tensor_lists({"scale": given}, {}, None)
    streams = NO_STREAM
    if stochastic:
        streams = stream_arguments("stochastic", seed, worker, step, param_ids, stream_starts, g)
    mix = float_scalar("beta1", beta1, 0.0, 1.0), float_scalar("grad_scale", grad_scale)
    return _quantize_lists(m, g, mix, given, streams, codes, nonfinite, (bits, norm, size), starts, impl)


def _quantize_lists(
    x: Sequence[Tensor],
    grad: Sequence[Tensor],
    mix: tuple[Tensor | None, Tensor | None],
    scale: Sequence[Tensor] | None,
    streams: Arguments,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    form: tuple[int, str, int],
    starts: Sequence[int] | None,
    impl: str,
) -> Sequence[Tensor]:
    """Run the ops, the scales' first unless they are given; return the scales."""
    bits, norm, block = form
    if scale is None:
        scale = _new_scales(grad or x, block, starts)
        _SCALE(x, grad, *mix, scale, norm, block, starts, impl)
    _QUANTIZE(x, grad, *mix, scale, *streams, out, nonfinite, bits, norm, block, starts, impl)
    return scale


def foreach_lion_scale(
    exp_avg: Tensors,
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    norm: str = "l1",
    block: int | None = None,
    grad_scale: Scalar = 1.0,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> Sequence[Tensor]:
    """Return the scales of Lion's updates, fp32[blocks] of each, as `foreach_lion_quantize` takes and gives them."""
    check_format(2, norm, block)
    g, m = tensor_lists({"grad": grad}, {"exp_avg": exp_avg}, starts)
    scales, mix = _new_scales(g, block or 0, starts), (float_scalar("beta1", beta1, 0.0, 1.0),)
    _SCALE(m, g, *mix, float_scalar("grad_scale", grad_scale), scales, norm, block or 0, starts, impl)
    return scales


def dequantize(
    packed: Tensor,
    scale: Tensor,
    n: int,
    *,
    bits: int = 2,
    norm: str = "l1",
    block: int | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``level * scale / (gain*K)`` of the first n codes of ``packed`` (uint8[packed_bytes(n, bits)]).

    ``out`` is a contiguous [n] of ``dtype`` to write, allocated unless given; it is returned.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    check_integer("n", n)
    size = check_fields(bits, norm, block, n, False)
    check_flat("packed", packed, torch.uint8, packed_bytes(n, bits))
    if out is None:
        out = torch.empty(n, dtype=dtype, device=packed.device)
    check_flat("out", out, dtype, n, "packed", packed)
    check_flat("scale", scale, torch.float32, scale_count(n, size), "packed", packed)
    _DEQUANTIZE(packed, scale, GAINS[norm], size, bits, out, impl)
    return out


def check_format(bits: int, norm: str, block: int | None) -> None:
    """Raise ValueError unless values can be quantized so."""
    check_choice("bits", bits, FIELD_BITS)
    if not isinstance(norm, str) or norm not in GAINS:
        raise ValueError(f"norm: expected one of {tuple(GAINS)}, got {norm!r}")
    is_integer = isinstance(block, int) and not isinstance(block, bool)
    if block is not None and (not is_integer or block < 1 or block & (block - 1)):
        raise ValueError(f"block: expected a power of two or None, got {block}")


def check_fields(bits: int, norm: str, block: int | None, n: int, stochastic: bool) -> int:
    """Check what the fields are made of; the block size, 0 for one scale per tensor."""
    check_format(bits, norm, block)
    if not isinstance(stochastic, bool):
        raise TypeError(f"stochastic: expected True or False, got {stochastic!r}")
    if stochastic and n > MAX_ELEMENTS:
        raise ValueError(f"stochastic: expected at most 2^34 elements in a stream, got {n}")
    return block or 0


def scale_count(n: int, block: int) -> int:
    """Number of scales of ``n`` elements in blocks of ``block``, 0 for one block."""
    return max(-(-n // block), 1) if block else 1


@functools.lru_cache(maxsize=KEPT)
def _scale_counts(sizes: tuple[int, ...], block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`scale_count` of each of a list of tensors, and their `scale_starts`."""
    counts = tuple([scale_count(size, block) for size in sizes])
    return counts, tuple(scale_starts(counts))


def scale_starts(counts: Sequence[int]) -> list[int]:
    """Return where each tensor's scales start in one buffer, at 16 bytes, and behind them the buffer's size."""
    return [0, *itertools.accumulate(-(-count // 4) * 4 for count in counts)]


def _new_scales(likes: Sequence[Tensor], block: int, starts: Sequence[int] | None) -> list[Tensor]:
    """Return scales of each tensor, fp32[blocks], in one allocation; with ``starts`` that alone."""
    if not likes:
        return []
    counts = [scale_count(like.numel(), block) for like in likes]
    firsts = scale_starts(counts)
    size = firsts[-1] if len(counts) > 1 else counts[0]
    # no kernel writes the scale of an empty tensor, which is 0
    make = torch.empty if all(map(Tensor.numel, likes)) else torch.zeros
    memory = make(size, dtype=torch.float32, device=likes[0].device)
    if starts is not None or len(likes) == 1:
        return [memory]
    return [memory[first : first + n] for first, n in zip(firsts, counts, strict=False)]


def _values(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor | None,
    grad_scale: Tensor | None,
    scale: Sequence[Tensor],
    block: int,
    places: tuple[int, ...] | None,
) -> tuple[TensorList, TensorList | None, Mix, TensorList]:
    """Return the lists of values, or of momentum and gradients where there is a beta1, and of their scales."""
    m, g, mix = update_lists(exp_avg, grad, beta1, grad_scale, places)
    peers = m if g is None else g
    counts, firsts = _scale_counts(peers.sizes, block)
    is_buffer = places is not None and len(scale) == 1
    return m, g, mix, flat_list("scale", scale, torch.float32, counts, peers, firsts[:-1] if is_buffer else None)


def _scale(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor | None,
    grad_scale: Tensor | None,
    scale: Sequence[Tensor],
    norm: str,
    block: int,
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    places = None if starts is None else tuple(starts)
    m, g, mix, scales = _values(exp_avg, grad, beta1, grad_scale, scale, block, places)
    check_lists_apart([scales], [m] if g is None else [m, g])
    if m.sizes:
        backend(impl, exp_avg[0].device).lion_block_scale(m, g, mix, norm, block, scales)
    mark_written(scale)


def _quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor | None,
    grad_scale: Tensor | None,
    scale: Sequence[Tensor],
    stream: Tensor | None,
    stream_step: Tensor | None,
    param_ids: Sequence[int],
    stream_starts: Sequence[int],
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    bits: int,
    norm: str,
    block: int,
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    places = None if starts is None else tuple(starts)
    m, g, mix, scales = _values(exp_avg, grad, beta1, grad_scale, scale, block, places)
    firsts = firsts_of(places, m.sizes, bits)
    codes = flat_list("out", out, torch.uint8, code_bytes(m.sizes, bits), m if g is None else g, firsts)
    check_lists_apart([codes], [m, scales] if g is None else [m, g, scales])
    if m.sizes:
        run = backend(impl, exp_avg[0].device)
        streams = streams_of(stream, stream_step, param_ids, stream_starts)
        run.lion_quantize(m, g, mix, scales, GAINS[norm], block, bits, streams, codes, nonfinite)
    mark_written(out, nonfinite)


_SCALE = register(
    "lion_block_scale(Tensor[] exp_avg, Tensor[] grad, Tensor? beta1, Tensor? grad_scale, Tensor(a!)[] scale, "
    "str norm, int block, int[]? starts, str impl) -> ()",
    _scale,
)
_QUANTIZE = register(
    "lion_quantize(Tensor[] exp_avg, Tensor[] grad, Tensor? beta1, Tensor? grad_scale, Tensor[] scale, Tensor? stream, "
    "Tensor? stream_step, int[] param_ids, int[] stream_starts, Tensor(a!)[] out, Tensor(b!)? nonfinite, int bits, "
    "str norm, int block, int[]? starts, str impl) -> ()",
    _quantize,
)
_DEQUANTIZE = register(
    "dequantize(Tensor packed, Tensor scale, float gain, int block, int bits, Tensor(a!) out, str impl) -> ()"
)
