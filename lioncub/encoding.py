"""The first half of a step: what a worker's gradients and momentum say, as packed codes, and what they leave unsaid."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.buckets import Bucket
from lioncub.compression import Compression, Quantized, TernaryVote
from lioncub.kernels import (
    dequantize,
    foreach_lion_encode,
    foreach_lion_quantize,
    lion_mix,
    pack_signs,
    packed_bytes,
    quantize,
    unpack_signs,
)

# with the least normal number as scale, every other one is past the largest level
_LEAST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class Terms:
    """What encoding depends on beside the data: hyperparameters of the bucket's group, step, this worker's rank.

    ``parity`` is that of elements which abstain.
    """

    beta1: float
    grad_scale: float
    step: int
    rank: int
    parity: int
    impl: str
    # of all parameters of the bucket, where workers have agreed on any
    scales: list[Tensor] | None = None


def encode(
    bucket: Bucket, grads: list[Tensor], packed: Tensor, status: Tensor, terms: Terms
) -> tuple[Tensor, ...] | None:
    """Pack the codes of a bucket's updates by its compression; gives the new residuals, with error feedback.

    Reads momentum, residuals and ``grads`` (1-d, in storage order); writes ``packed``, zero before, and
    status[i] = 1 where an element of update i is not finite.
    """
    parts = bucket.split(packed, bucket.compression.codes.bits)
    if bucket.residuals is not None:
        made = [
            _with_feedback(bucket, i, grad, part, status[i : i + 1], terms)
            for i, (grad, part) in enumerate(zip(grads, parts, strict=True))
        ]
        return tuple(made)
    if bucket.compression.codes.bits == 1:
        foreach_lion_encode(
            bucket.momenta,
            grads,
            beta1=terms.beta1,
            parity=terms.parity,
            out=parts,
            status=status,
            grad_scale=terms.grad_scale,
            impl=terms.impl,
        )
        return None
    compression, slots = bucket.compression, bucket.slots
    how = _quantization(compression, terms)
    foreach_lion_quantize(
        bucket.momenta,
        grads,
        beta1=terms.beta1,
        tensors=[slot.number for slot in slots],
        scale=_given_scales(bucket, terms),
        out=[part[: packed_bytes(slot.numel, how["bits"])] for slot, part in zip(slots, parts, strict=True)],
        status=status,
        grad_scale=terms.grad_scale,
        **how,
    )
    return None


def _with_feedback(bucket: Bucket, i: int, grad: Tensor, part: Tensor, status: Tensor, terms: Terms) -> Tensor:
    """Encode c + residual; gives what the codes do not say of it: the next residual."""
    assert bucket.residuals is not None
    slot, compression = bucket.slots[i], bucket.compression
    update = lion_mix(bucket.momenta[i], grad, beta=terms.beta1, grad_scale=terms.grad_scale) + bucket.residuals[i]
    status |= (~update.isfinite()).any().to(torch.int32)
    if compression.codes.bits == 1:
        codes = pack_signs(update, parity=terms.parity, impl=terms.impl)
        said = unpack_signs(codes, slot.numel, impl=terms.impl) * _mean_magnitude(update)
    else:
        options = _quantization(compression, terms)
        given = _given_scales(bucket, terms)
        codes, scale = quantize(update, scale=None if given is None else given[i], tensor=slot.number, **options)
        known = {name: options[name] for name in ("bits", "norm", "block", "impl")}
        if isinstance(compression, TernaryVote):
            said = dequantize(codes, torch.ones_like(scale), slot.numel, **known) * _mean_magnitude(update)
        else:
            said = dequantize(codes, scale, slot.numel, **known)
    part[: codes.numel()] = codes
    return update - said


def _mean_magnitude(update: Tensor) -> Tensor:
    # in float64, whose error does not reach a float32's last bit in whatever order it is summed
    return update.double().abs().mean().float() if update.numel() else update.new_zeros(())


def _quantization(compression: Compression, terms: Terms) -> dict[str, Any]:
    """How updates are quantized to levels."""
    if isinstance(compression, Quantized):
        return {
            "bits": compression.bits,
            "norm": compression.norm,
            "block": compression.block,
            "stochastic": compression.stochastic,
            "seed": compression.seed,
            "worker": terms.rank,
            "step": terms.step,
            "impl": terms.impl,
        }
    assert isinstance(compression, TernaryVote)
    return {"bits": 2, "norm": "linf", "block": None, "impl": terms.impl}


def _given_scales(bucket: Bucket, terms: Terms) -> list[Tensor] | None:
    """Scales that are not this worker's own: None where they are."""
    if isinstance(bucket.compression, TernaryVote):
        return _least_scales(len(bucket.slots), bucket.device)
    return terms.scales


@functools.cache
def _least_scales(count: int, device: torch.device) -> list[Tensor]:
    """fp32[1] of the least normal number for each of ``count`` tensors, to be read only."""
    return [torch.full((1,), _LEAST_NORMAL, dtype=torch.float32, device=device)] * count
