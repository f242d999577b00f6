"""One step's votes: encode each bucket, send it, and judge what came back before anything is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, gradient_of
from lioncub.buckets import Bucket
from lioncub.collectives.header import FOUND_INF, Header
from lioncub.kernels import foreach_apply_votes_, foreach_lion_encode, foreach_lion_step_
from lioncub.kernels.checks import storage_order_view


class NonFiniteError(ArithmeticError):
    """A gradient, momentum or update of some worker is not finite; no worker changed anything."""


@dataclass(frozen=True)
class Ballot:
    """One bucket on this worker: gradients in storage order, who has one, packed codes, and int32 status per tensor."""

    grads: list[Tensor]
    has_gradient: tuple[bool, ...]
    packed: Tensor
    status: Tensor


@dataclass(frozen=True)
class Verdict:
    """What all workers make of a step: skip it, or go on; per bucket, which parameters have a gradient somewhere."""

    found_inf: bool
    nonfinite: str | None
    taking_part: list[tuple[bool, ...]]


def encode_bucket(bucket: Bucket, now: Hyperparameters, step: int, grad_scale: float, impl: str) -> Ballot:
    """Pack the votes of a bucket. Reads momentum and gradients, changes neither; no gradient votes with zeros."""
    found = []
    for slot in bucket.slots:
        slot.check_unchanged(bucket.device)
        found.append(gradient_of(slot.name, slot.param))
    grads = [
        torch.zeros(slot.numel, dtype=slot.dtype, device=bucket.device) if grad is None else grad
        for slot, grad in zip(bucket.slots, found, strict=True)
    ]
    packed = torch.empty(bucket.n_bytes, dtype=torch.uint8, device=bucket.device)
    status = torch.zeros(len(bucket.slots), dtype=torch.int32, device=bucket.device)
    foreach_lion_encode(
        bucket.momenta,
        grads,
        beta1=now.beta1,
        parity=step,
        out=bucket.split(packed),
        status=status,
        grad_scale=-grad_scale if now.maximize else grad_scale,
        impl=impl,
    )
    return Ballot(grads, tuple(grad is not None for grad in found), packed, status)


def judge(buckets: Sequence[Bucket], headers: Sequence[Sequence[Header]]) -> Verdict:
    """The same verdict on every worker, from every worker's header of every bucket."""
    found_inf = any(header.flags & FOUND_INF for of_bucket in headers for header in of_bucket)
    nonfinite = None
    for bucket, of_bucket in zip(buckets, headers, strict=True):
        first = min((header.nonfinite for header in of_bucket if header.nonfinite), default=0)
        if first and nonfinite is None:
            ranks = [str(rank) for rank, header in enumerate(of_bucket) if header.nonfinite == first]
            nonfinite = f"parameter {bucket.slots[first - 1].name} on rank {', '.join(ranks)}"
    taking_part = [
        tuple(any(present) for present in zip(*(header.has_gradient for header in of_bucket), strict=True))
        for of_bucket in headers
    ]
    return Verdict(found_inf, nonfinite, taking_part)


def apply_bucket_(
    bucket: Bucket,
    ballot: Ballot,
    voted: Tensor | None,
    taking_part: Sequence[bool],
    now: Hyperparameters,
    grad_scale: float,
    impl: str,
) -> None:
    """Move the parameters that take part, and their momentum; by the votes, or without any by plain Lion."""
    chosen = [i for i, takes_part in enumerate(taking_part) if takes_part]
    params = [storage_order_view(bucket.slots[i].name, bucket.slots[i].param) for i in chosen]
    grads = [ballot.grads[i] for i in chosen]
    momenta = [bucket.momenta[i] for i in chosen]
    scale = -grad_scale if now.maximize else grad_scale
    if voted is None:
        foreach_lion_step_(
            params,
            grads,
            momenta,
            lr=now.lr,
            beta1=now.beta1,
            beta2=now.beta2,
            weight_decay=now.weight_decay,
            grad_scale=scale,
            impl=impl,
        )
        return
    votes = bucket.split(voted)
    foreach_apply_votes_(
        params,
        [votes[i] for i in chosen],
        lr=now.lr,
        weight_decay=now.weight_decay,
        grad=grads,
        exp_avg=momenta,
        beta2=now.beta2,
        grad_scale=scale,
        impl=impl,
    )
