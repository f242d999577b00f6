"""The first half of a step: what a worker's gradients and momentum say, as packed codes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.buckets import Bucket
from lioncub.compression import Compression, Quantized, TernaryVote
from lioncub.kernels import foreach_lion_encode, foreach_lion_quantize, packed_bytes

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


def encode(bucket: Bucket, grads: list[Tensor], packed: Tensor, status: Tensor, terms: Terms) -> None:
    """Pack the codes of a bucket's updates by its compression.

    Reads momentum and ``grads`` (1-d, in storage order); writes ``packed``, zero before, and
    status[i] = 1 where an element of update i is not finite.
    """
    parts = bucket.split(packed, bucket.compression.codes.bits)
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
        return
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
