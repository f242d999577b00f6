"""quantize and dequantize: values to a few integer levels in p-bit fields, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import (
    FLOAT_DTYPES,
    check_choice,
    check_device,
    check_flat,
    check_float,
    check_integer,
    check_packed,
    packed_out,
    storage_order_view,
)
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.overlaps import check_apart
from lioncub.kernels.random_bits import MAX_ELEMENTS, Stream
from lioncub.kernels.registry import mark_written, register

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
    step: int = 0,
    tensor: int = 0,
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
            (seed, worker, step, tensor, element).
        block: elements per scale, a power of two; one scale for the whole tensor unless given.
        out: uint8[packed_bytes(n, bits)] to write; allocated unless given.
        impl: "auto", "triton", "cpu" or "reference". Codes are bit-identical for the same scale, scales within 1e-6.

    Returns:
        (``out``, fp32[blocks]).
    """
    check_float("x", x)
    flat = storage_order_view("x", x)
    size = check_fields(bits, norm, block, flat.numel(), stochastic)
    if scale is None:
        (scale,) = empty_scales([flat], size)
        _SCALE(flat, scale, norm, size, impl)
    check_scale(scale, flat, size)
    out = packed_out(out, packed_bytes(flat.numel(), bits), "x", x)
    _QUANTIZE(flat, scale, stream_tensor(seed, worker, step, tensor), out, bits, norm, size, stochastic, impl)
    return out, scale


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
    check_scale(scale, out, size)
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


def empty_scales(likes: Sequence[Tensor], block: int) -> list[Tensor]:
    """Scales of each tensor, fp32[blocks], in one allocation; each begins at a multiple of 16 bytes."""
    if not likes:
        return []
    counts = [scale_count(like.numel(), block) for like in likes]
    starts = [0, *itertools.accumulate(-(-count // 4) * 4 for count in counts)]
    memory = torch.empty(starts[-1], dtype=torch.float32, device=likes[0].device)
    return [memory[start : start + count] for start, count in zip(starts, counts, strict=False)]


def scale_count(n: int, block: int) -> int:
    """Number of scales of ``n`` elements in blocks of ``block``, 0 for one block."""
    return max(-(-n // block), 1) if block else 1


def check_scale(scale: Tensor, like: Tensor, block: int) -> None:
    """Raise unless ``scale`` holds the scales of ``like``, a tensor of elements, in blocks of ``block``, 0 for one."""
    check_flat("scale", scale, torch.float32, scale_count(like.numel(), block))
    check_device("scale", scale, "data", like)


def stream_tensor(*parts: int) -> Tensor:
    """int64 of what a stream is a function of."""
    for name, part in zip(("seed", "worker", "step", "tensor"), parts, strict=False):
        check_integer(name, part, least=None)
    # any integer is taken modulo 2^64, so that a seed from os.urandom is as good as a small one
    signed = [(part + 2**63) % 2**64 - 2**63 for part in parts]
    return torch.tensor(signed, dtype=torch.int64, device="cpu")


def streams_of(words: Tensor, numbers: Sequence[int]) -> list[Stream]:
    """A stream for each number, from `stream_tensor` (seed, worker, step)."""
    seed, worker, step = words.tolist()
    return [Stream(seed, worker, step, number) for number in numbers]


def _scale(x: Tensor, scale: Tensor, norm: str, block: int, impl: str) -> None:
    run = backend(impl, x.device)
    if x.numel():
        run.block_scale(x, norm, block, scale)
    else:
        scale.zero_()
    mark_written(scale)


def _quantize(
    x: Tensor, scale: Tensor, stream: Tensor, out: Tensor, bits: int, norm: str, block: int, stochastic: bool, impl: str
) -> None:
    run = backend(impl, x.device)
    check_apart({"out": out}, {"x": x, "scale": scale})
    if x.numel():
        words = Stream(*stream.tolist()) if stochastic else None
        run.quantize(x, scale, GAINS[norm], block, bits, words, out)
    mark_written(out)


def _dequantize(packed: Tensor, scale: Tensor, out: Tensor, bits: int, norm: str, block: int, impl: str) -> None:
    run = backend(impl, packed.device)
    check_apart({"out": out}, {"packed": packed, "scale": scale})
    if out.numel():
        run.dequantize(packed, scale, GAINS[norm], block, bits, out)
    mark_written(out)


_SCALE = register("block_scale(Tensor x, Tensor(a!) scale, str norm, int block, str impl) -> ()", _scale)
_QUANTIZE = register(
    "quantize(Tensor x, Tensor scale, Tensor stream, Tensor(a!) out, int bits, str norm, int block, "
    "bool stochastic, str impl) -> ()",
    _quantize,
)
_DEQUANTIZE = register(
    "dequantize(Tensor packed, Tensor scale, Tensor(a!) out, int bits, str norm, int block, str impl) -> ()",
    _dequantize,
)
