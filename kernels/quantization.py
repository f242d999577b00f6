"""Values, and Lion's updates, as few integer levels in p-bit fields, and back.

``starts`` as in `lioncub.kernels.lion`; scales are then one flat fp32 buffer, tensor i's from `scale_starts` [i] on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_flat,
    check_float,
    check_integer,
    check_packed,
    check_per_tensor,
    packed_out,
    storage_order_view,
)
from lioncub.kernels.dispatch import backend, mark_written, register
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.lists import (
    TensorList,
    Tensors,
    check_apart,
    check_flat_list,
    check_float_lists,
    check_list_types,
    check_lists_apart,
    check_starts,
    code_parts,
    float_parts,
    one_or_list,
    scale_parts,
)
from lioncub.kernels.rounding import MAX_ELEMENTS, Arguments, stream_arguments, streams_of
from lioncub.kernels.scalars import Scalar, beta_scalar, factor_scalar, mix_of

FIELD_BITS = (2, 4, 8)
# gain*K*x/scale is rounded; with 1/2 and K = 1 every "linf" code would be zero
GAINS = {"l1": 0.5, "l2": 0.5, "linf": 1.0}
_NO_STREAM: Arguments = (None, None, ())


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
    flat = storage_order_view("x", x)
    size = check_fields(bits, norm, block, flat.numel(), stochastic)
    stream = stream_arguments("stochastic", seed, worker, step, [param_id], [flat]) if stochastic else _NO_STREAM
    if scale is None:
        scale = _empty_scale([flat], size)
        _SCALE(flat, scale, norm, size, impl)
    check_flat("scale", scale, torch.float32, scale_count(flat.numel(), size))
    check_device("scale", scale, "data", flat)
    out = packed_out(out, packed_bytes(flat.numel(), bits), "x", x)
    _QUANTIZE(flat, scale, *stream, out, bits, norm, size, impl)
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
    block: int | None = None,
    out: Tensors,
    nonfinite: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> Sequence[Tensor]:
    """`lion_quantize` of lists; gives their scales. ``nonfinite`` is int32[n] for n tensors.

    ``param_ids`` select the random streams; they are the places in the list unless given. ``step`` may be a 0-dim int64
    tensor on the device. With ``starts`` momentum, codes and new scales are flat; given scales may be a list. The
    result is then a list of the one buffer.
    """
    check_list_types(grad=grad)
    check_starts(starts, grad)
    size = check_fields(bits, norm, block, max([g.numel() for g in grad], default=0), stochastic)
    exp_avg, out = one_or_list("exp_avg", exp_avg, starts), one_or_list("out", out, starts)
    check_per_tensor("nonfinite", nonfinite, len(grad), "grad", None)
    streams = stream_arguments("stochastic", seed, worker, step, param_ids, grad) if stochastic else _NO_STREAM
    b1, multiplier = beta_scalar("beta1", beta1), factor_scalar("grad_scale", grad_scale)
    scales: Sequence[Tensor]
    if scale is None:
        scales = _new_scales(grad, size, starts)
        _LION_SCALE(exp_avg, grad, b1, multiplier, scales, norm, size, starts, impl)
    else:
        scales = [scale] if isinstance(scale, Tensor) and starts is not None else one_or_list("scale", scale, None)
    _LION_QUANTIZE(exp_avg, grad, b1, multiplier, scales, *streams, out, nonfinite, bits, norm, size, starts, impl)
    return scales


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
    """The scales of Lion's updates, fp32[blocks] of each, as `foreach_lion_quantize` takes and gives them."""
    check_list_types(grad=grad)
    check_starts(starts, grad)
    check_format(2, norm, block)
    exp_avg, scales = one_or_list("exp_avg", exp_avg, starts), _new_scales(grad, block or 0, starts)
    b1, multiplier = beta_scalar("beta1", beta1), factor_scalar("grad_scale", grad_scale)
    _LION_SCALE(exp_avg, grad, b1, multiplier, scales, norm, block or 0, starts, impl)
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
    check_packed("packed", packed, packed_bytes(n, bits))
    if out is None:
        out = torch.empty(n, dtype=dtype, device=packed.device)
    check_flat("out", out, dtype, n)
    check_device("out", out, "packed", packed)
    check_flat("scale", scale, torch.float32, scale_count(n, size))
    check_device("scale", scale, "data", out)
    _DEQUANTIZE(packed, scale, out, bits, norm, size, impl)
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


def scale_starts(counts: Sequence[int]) -> list[int]:
    """Where each tensor's scales start in one buffer, a multiple of 16 bytes, and behind them the buffer's size."""
    return [0, *itertools.accumulate(-(-count // 4) * 4 for count in counts)]


def _empty_scale(likes: Sequence[Tensor], block: int) -> Tensor:
    """Memory for the scales of each tensor, one behind the other."""
    counts = [scale_count(like.numel(), block) for like in likes]
    size = scale_starts(counts)[-1] if len(counts) > 1 else sum(counts)
    return torch.empty(size, dtype=torch.float32, device=likes[0].device)


def _new_scales(likes: Sequence[Tensor], block: int, starts: Sequence[int] | None) -> list[Tensor]:
    """Scales of each tensor, fp32[blocks], in one allocation; with ``starts`` that alone."""
    if not likes:
        return []
    memory = _empty_scale(likes, block)
    if starts is not None or len(likes) == 1:
        return [memory]
    counts = [scale_count(like.numel(), block) for like in likes]
    return [memory[first : first + n] for first, n in zip(scale_starts(counts), counts, strict=False)]


def _scale(x: Tensor, scale: Tensor, norm: str, block: int, impl: str) -> None:
    run = backend(impl, x.device)
    if x.numel():
        run.block_scale(x, norm, block, scale)
    else:
        scale.zero_()
    mark_written(scale)


def _quantize(
    x: Tensor,
    scale: Tensor,
    stream: Tensor | None,
    stream_step: Tensor | None,
    param_ids: Sequence[int],
    out: Tensor,
    bits: int,
    norm: str,
    block: int,
    impl: str,
) -> None:
    run = backend(impl, x.device)
    check_apart({"out": out}, {"x": x, "scale": scale})
    if x.numel():
        run.quantize(x, scale, GAINS[norm], block, bits, streams_of(stream, stream_step, param_ids), out)
    mark_written(out)


def _dequantize(packed: Tensor, scale: Tensor, out: Tensor, bits: int, norm: str, block: int, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out}, {"packed": packed, "scale": scale})
    if out.numel():
        run.dequantize(packed, scale, GAINS[norm], block, bits, out)
    mark_written(out)


def _check_updates(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    scale: Sequence[Tensor],
    block: int,
    starts: Sequence[int] | None,
) -> tuple[TensorList, TensorList, TensorList]:
    g = TensorList(grad)
    m, counts = float_parts("exp_avg", exp_avg, starts, g), [scale_count(size, block) for size in g.sizes]
    scales = scale_parts(scale, starts, counts, scale_starts(counts)[:-1])
    check_float_lists(grad=g, exp_avg=m)
    check_flat_list("scale", scales, torch.float32, counts, "grad", g)
    return m, g, scales


def _lion_scale(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    grad_scale: Tensor,
    scale: Sequence[Tensor],
    norm: str,
    block: int,
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    m, g, scales = _check_updates(exp_avg, grad, scale, block, starts)
    check_lists_apart({"scale": scales}, {"grad": g, "exp_avg": m})
    if grad:
        backend(impl, g.device).lion_block_scale(m, g, mix_of(beta1, grad_scale), norm, block, scales)
    for i, size in enumerate(g.sizes):
        if not size:
            scales[i].zero_()
    mark_written(scale)


def _lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    grad_scale: Tensor,
    scale: Sequence[Tensor],
    stream: Tensor | None,
    stream_step: Tensor | None,
    param_ids: Sequence[int],
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    bits: int,
    norm: str,
    block: int,
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    m, g, scales = _check_updates(exp_avg, grad, scale, block, starts)
    sizes = [(size * bits + 63) // 64 * 8 for size in g.sizes]
    codes = code_parts("out", out, starts, bits, sizes)
    check_flat_list("out", codes, torch.uint8, sizes, "grad", g)
    check_per_tensor("nonfinite", nonfinite, len(g), "grad", grad[0] if grad else None)
    check_lists_apart({"out": codes}, {"grad": g, "exp_avg": m, "scale": scales})
    if grad:
        streams, mix = streams_of(stream, stream_step, param_ids), mix_of(beta1, grad_scale)
        backend(impl, g.device).lion_quantize(m, g, mix, scales, GAINS[norm], block, bits, streams, codes, nonfinite)
    mark_written(out, nonfinite)


_SCALE = register("block_scale(Tensor x, Tensor(a!) scale, str norm, int block, str impl) -> ()", _scale)
_QUANTIZE = register(
    "quantize(Tensor x, Tensor scale, Tensor? stream, Tensor? stream_step, int[] param_ids, Tensor(a!) out, int bits, "
    "str norm, int block, str impl) -> ()",
    _quantize,
)
_DEQUANTIZE = register(
    "dequantize(Tensor packed, Tensor scale, Tensor(a!) out, int bits, str norm, int block, str impl) -> ()",
    _dequantize,
)
_LION_SCALE = register(
    "lion_block_scale(Tensor[] exp_avg, Tensor[] grad, Tensor beta1, Tensor grad_scale, Tensor(a!)[] scale, str norm, "
    "int block, int[]? starts, str impl) -> ()",
    _lion_scale,
)
_LION_QUANTIZE = register(
    "lion_quantize(Tensor[] exp_avg, Tensor[] grad, Tensor beta1, Tensor grad_scale, Tensor[] scale, Tensor? stream, "
    "Tensor? stream_step, int[] param_ids, Tensor(a!)[] out, Tensor(b!)? nonfinite, int bits, str norm, int block, "
    "int[]? starts, str impl) -> ()",
    _lion_quantize,
)
