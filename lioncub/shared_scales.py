"""Scales that workers share: averaged now and then, so that a quantized level means as much on every worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lioncub.arrangement import Arrangement
from lioncub.buckets import Bucket
from lioncub.collectives.average import average_agreed_, average_bytes
from lioncub.collectives.transport import Group
from lioncub.compression import Compression, Quantized
from lioncub.kernels.lion_levels import foreach_lion_scale
from lioncub.kernels.quantization import scale_count
from lioncub.voting import BucketVote, Draft

# what state holds until the first average
NOT_AGREED = math.nan


class SharedScales:
    """The scales of all buckets whose compression shares them, in ``state[p]["scale"]``: fp32[blocks].

    The mean over workers serves from the next step on, so that it is taken when all know that they take the step. A
    bucket with a scale that is unknown, as before the first average, is quantized by each worker's own. Where a block's
    shared scale is zero, all of its levels are.
    """

    def __init__(self, arrangement: Arrangement, state: Mapping[Any, Any], group: Group, workers: int) -> None:
        self._arrangement, self._state, self._group, self._workers = arrangement, state, group, workers
        # by bucket, whether all its scales are known; asked of the device once
        self._is_known: dict[Bucket, bool] = {}
        self.bytes_sent = 0

    def add(self, groups: range) -> None:
        """Make room for the scales of new param groups; one worker alone has none."""
        self.forget()
        if self._workers == 1:
            return
        for bucket in self._arrangement.buckets:
            if bucket.group_index not in groups or not _is_shared(bucket.compression):
                continue
            assert isinstance(bucket.compression, Quantized)
            for slot in bucket.slots:
                blocks = scale_count(slot.numel, bucket.compression.block or 0)
                self._state[slot.param]["scale"] = torch.full(
                    (blocks,), NOT_AGREED, dtype=torch.float32, device=bucket.device
                )

    def forget(self) -> None:
        """State has been loaded or buckets have changed."""
        self._is_known.clear()

    def of(self, bucket: Bucket) -> list[Tensor] | None:
        """What to quantize a bucket by; None: by this worker's own scales."""
        if self._workers == 1 or not _is_shared(bucket.compression):
            return None
        scales = self._of(bucket)
        if bucket not in self._is_known:
            self._is_known[bucket] = not bool(torch.cat(scales).isnan().any())
        return scales if self._is_known[bucket] else None

    def run(self, votes: Sequence[BucketVote], draft: Draft) -> None:
        """Average what is due: in steps that are a multiple of it, as all workers know. Mutates scales alone.

        A collective call.
        """
        self.bytes_sent = 0
        if self._workers == 1:
            return
        mine: list[Tensor] = []
        shared: list[Tensor] = []
        for bucket, vote in zip(self._arrangement.buckets, votes, strict=True):
            compression = bucket.compression
            if not isinstance(compression, Quantized) or not _is_due(compression, draft.step):
                continue
            mine += foreach_lion_scale(
                bucket.momenta,
                vote.ballot.grads,
                beta1=draft.now[bucket.group_index].beta1,
                norm=compression.norm,
                block=compression.block,
                grad_scale=draft.grad_scale_of(bucket),
                impl=draft.impl,
            )
            shared += self._of(bucket)
            # what workers step by is finite, so no scale is NaN, and no device need be asked
            self._is_known[bucket] = True
        if not mine:
            return
        mean = torch.cat(mine)
        average_agreed_(mean, group=self._group)
        self.bytes_sent = average_bytes(len(mean), self._workers)
        for scale, part in zip(shared, torch.split(mean, [len(scale) for scale in shared]), strict=True):
            scale.copy_(part)

    def _of(self, bucket: Bucket) -> list[Tensor]:
        return [self._state[slot.param]["scale"] for slot in bucket.slots]


def _is_shared(compression: Compression) -> bool:
    return isinstance(compression, Quantized) and compression.share_scales_every is not None


def _is_due(compression: Quantized, step: int) -> bool:
    return compression.share_scales_every is not None and step % compression.share_scales_every == 0
