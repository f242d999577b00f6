"""Values that ranks average beside the codes: momentum, its measured drift, shared scales of quantization.

Each has a fixed layout, is sent whether or not the step commits, and is written only for parameters that move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lioncub.buckets import Bucket, BucketList, Slot
from lioncub.collectives.agreement import digest
from lioncub.collectives.algorithms import Done, Exchange, Phases
from lioncub.collectives.average import average_bytes, average_phases
from lioncub.collectives.transport import PAYLOADS, Transport
from lioncub.compression import Quantized
from lioncub.kernels import lion_ema
from lioncub.kernels.checks import storage_order_view
from lioncub.kernels.quantization import foreach_lion_scale, scale_count
from lioncub.momentum_sync import MomentumSync, Segment, chosen_ids, segments_of

if TYPE_CHECKING:
    from lioncub.step import EncodedBucket, StepContext

# elements of a parameter whose momentum is sampled to measure its drift: a share of them, but neither very few nor
# more than tell the ratio to a tenth
_SAMPLE_SHARE, _FEWEST_SAMPLES, _MOST_SAMPLES = 64, 16, 256
# when drift is measured for the first time
_FIRST_MEASUREMENT = 10
# entries of `state` before the first measurement or average
NOT_MEASURED, NOT_AGREED = -1.0, math.nan
_SCALES_TAG, _DRIFT_TAG, _MOMENTUM_TAG = PAYLOADS, PAYLOADS + 1, PAYLOADS + 4


class MomentumAverages:
    """Averages of the momentum to come, by a `MomentumSync` policy: one message per bucket that has segments due."""

    def __init__(self, policy: MomentumSync | None, buckets: BucketList, drift: Drift) -> None:
        self._policy, self._buckets, self._drift = policy, buckets, drift
        # ids of the parameters to synchronize; None: to be chosen anew
        self._chosen: frozenset[int] | None = None
        # (step, segments by bucket) of the last step that was asked for
        self._due: tuple[int, dict[Bucket, tuple[Segment, ...]]] | None = None
        self.bytes_sent = 0

    def use(self, policy: MomentumSync | None) -> None:
        """Go on with another policy."""
        self._policy, self.bytes_sent = policy, 0
        self.invalidate()

    def invalidate(self) -> None:
        """Choose anew: state has been loaded, drift measured, or buckets have changed."""
        self._chosen = self._due = None

    def agreed_layout(self) -> int:
        """Return the hash of the layout, and of what was chosen by drift: ranks that differ in it must not average."""
        if self._policy is None or not self._policy.is_auto:
            return self._buckets.layout
        return digest([self._buckets.layout, sorted(self._selection(self._policy))])

    def segments(self, bucket: Bucket, step: int) -> tuple[Segment, ...]:
        """Return the segments of a bucket that are due in a step."""
        if self._policy is None:
            return ()
        if self._due is None or self._due[0] != step:
            selection = self._selection(self._policy)
            self._due = step, segments_of(self._buckets, selection, self._policy.piece(step))
        return self._due[1].get(bucket, ())

    def exchange(self, bucket: Bucket, index: int, step: int, transport: Transport, eager: bool) -> Exchange[Tensor]:
        """Prepare the average of what is due of a bucket; receives are posted where they can be."""
        assert self._policy is not None
        n, dtype = sum(segment.padded for segment in self.segments(bucket, step)), self._policy.dtype
        self.bytes_sent += average_bytes(n, transport.size, dtype)
        tag = _MOMENTUM_TAG + index
        return Exchange(average_phases(transport, n, dtype=dtype, tag=tag, eager=eager), 2)

    def values(self, bucket: Bucket, step: int, encoded: EncodedBucket | None, context: StepContext | None) -> Tensor:
        """Return fp32: the segments of this rank's momentum to come, padded; zeros where it takes no step."""
        segments = self.segments(bucket, step)
        sizes = [segment.padded for segment in segments]
        values = torch.zeros(sum(sizes), dtype=torch.float32, device=bucket.device)
        if encoded is not None and context is not None:
            for one, room in zip(segments, torch.split(values, sizes), strict=True):
                room[: one.end - one.start] = _next_momentum(bucket, encoded, one.index, one.part, context)
        return values

    def write(self, bucket: Bucket, step: int, means: Tensor, active: Tensor | None) -> None:
        """Overwrite the segments' momentum by their means where the parameters are active."""
        segments = self.segments(bucket, step)
        for segment, mean in zip(segments, torch.split(means, [one.padded for one in segments]), strict=True):
            momentum = bucket.momenta[segment.index][segment.part]
            _write(momentum, mean[: segment.end - segment.start], None if active is None else active[segment.index])

    def _selection(self, policy: MomentumSync) -> frozenset[int]:
        """Return the ids of the parameters to synchronize."""
        if self._chosen is None:
            self._chosen = chosen_ids(policy, self._buckets, self._drift.by_id() if policy.is_auto else {})
        return self._chosen


class Drift:
    """Measured drift: the variance of momentum over ranks, before it is averaged, relative to its mean square.

    1. Samples of the momentum to come are averaged. 2. Each rank sums its squared distances from the mean, and its
    squares, per parameter. 3. These are averaged.
    """

    def __init__(self, every: int | None, buckets: BucketList, state: Mapping[Any, Any]) -> None:
        self.every, self._buckets, self._state = every, buckets, state
        self.bytes_sent = 0

    def add(self, params: Sequence[Tensor]) -> None:
        """Make the entries of new parameters, if drift is ever measured."""
        if self.every is not None:
            for param in params:
                self._state[param]["drift"] = torch.full((), NOT_MEASURED, dtype=torch.float32, device=param.device)

    def is_due(self, step: int) -> bool:
        """Whether drift is measured in a step."""
        if self.every is None:
            return False
        return step == min(_FIRST_MEASUREMENT, self.every) or (step > 0 and step % self.every == 0)

    def exchange(self, n_buckets: int, transport: Transport, eager: bool) -> Exchange[Tensor]:
        """Prepare the measurement; it is sent `samples` and gives the ratios of the parameters, fp32."""
        sizes = [_sample_of(slot)[1] for *_, slot in self._sampled(n_buckets)]
        n = sum(sizes), 2 * len(sizes)
        self.bytes_sent = sum(average_bytes(count, transport.size) for count in n)
        return Exchange(_drift_phases(transport, sizes, eager), 4)

    def samples(self, n_buckets: int, encoded: Sequence[EncodedBucket | None], context: StepContext | None) -> Tensor:
        """Return fp32: this rank's samples of all parameters' momentum to come; zeros where it takes no step."""
        places = self._sampled(n_buckets)
        if context is None or any(one is None for one in encoded):
            n = sum(_sample_of(slot)[1] for *_, slot in places)
            return torch.zeros(n, dtype=torch.float32, device=self._buckets.all[0].device)
        found = dict(zip(self._buckets.all, encoded, strict=False))
        return torch.cat(
            [_next_momentum(bucket, found[bucket], j, _sample_of(slot)[0], context) for bucket, j, slot in places]  # type: ignore[arg-type]
        )

    def write(self, n_buckets: int, ratios: Tensor, active: Tensor | None) -> None:
        """Set the drift of parameters that are active."""
        for (bucket, j, slot), ratio in zip(self._sampled(n_buckets), ratios, strict=True):
            _write(self._state[slot.param]["drift"], ratio, None if active is None else active[bucket.first + j])

    def by_id(self) -> dict[int, float]:
        """Return the measured drift by id of the parameter; waits for the device."""
        return {slot.param_id: float(self._state[slot.param]["drift"]) for *_, slot in self._buckets.slots}

    def by_name(self) -> dict[str, float] | None:
        """Return the measured drift by name of the parameter; None where none was measured."""
        if self.every is None:
            return None
        found = {slot.name: float(self._state[slot.param]["drift"]) for *_, slot in self._buckets.slots}
        return {name: value for name, value in found.items() if value != NOT_MEASURED} or None

    def _sampled(self, n_buckets: int) -> list[tuple[Bucket, int, Slot]]:
        agreed = set(self._buckets.all[:n_buckets])
        return [place for place in self._buckets.slots if place[0] in agreed and place[2].numel]


class SharedScales:
    """The scales of all buckets whose compression shares them, in ``state[p]["scale"]``: fp32[blocks].

    The mean over ranks is used from the next step on. A bucket with a scale that is unknown, as before the first
    average, is quantized by each rank's own. Where a block's shared scale is zero, all of its levels are.
    """

    def __init__(self, buckets: BucketList, state: Mapping[Any, Any], *, capturable: bool) -> None:
        self._buckets, self._state, self._capturable = buckets, state, capturable
        # by bucket, whether all its scales are known; asked of the device once
        self._is_known: dict[Bucket, bool] = {}
        self.bytes_sent = 0

    def add(self, params: Sequence[Tensor]) -> None:
        """Make the entries of new parameters."""
        self.invalidate()
        new = set(params)
        for bucket in self._shared(len(self._buckets.all)):
            for slot, count in zip(bucket.slots, _scale_counts(bucket), strict=True):
                if slot.param in new and "scale" not in self._state[slot.param]:
                    scale = torch.full((count,), NOT_AGREED, dtype=torch.float32, device=bucket.device)
                    self._state[slot.param]["scale"] = scale

    def remove(self) -> None:
        """Drop all entries: one rank alone shares none."""
        for *_, slot in self._buckets.slots:
            self._state[slot.param].pop("scale", None)
        self.invalidate()

    def invalidate(self) -> None:
        """State has been loaded or buckets have changed."""
        self._is_known.clear()

    def of(self, bucket: Bucket, own: Any) -> list[Tensor] | None:
        """Return the scales to quantize a bucket by; None: by this rank's own.

        ``own`` computes these, where only the device knows which are to be taken.
        """
        if not _is_shared(bucket) or "scale" not in self._state[bucket.slots[0].param]:
            return None
        shared = [self._state[slot.param]["scale"] for slot in bucket.slots]
        if self._capturable:
            unknown = torch.cat(shared).isnan().any()
            return [torch.where(unknown, mine, ours) for mine, ours in zip(own(), shared, strict=True)]
        if bucket not in self._is_known:
            self._is_known[bucket] = not bool(torch.cat(shared).isnan().any())
        return shared if self._is_known[bucket] else None

    def due(self, n_buckets: int, step: int) -> list[Bucket]:
        """Return the buckets whose scales are averaged in a step; where the host does not know the step, all."""
        return [bucket for bucket in self._shared(n_buckets) if self._capturable or step % _every(bucket) == 0]

    def exchange(self, due: Sequence[Bucket], transport: Transport, eager: bool) -> Exchange[Tensor]:
        """Prepare the average of these buckets' scales."""
        n = self._count(due)
        self.bytes_sent = average_bytes(n, transport.size)
        return Exchange(average_phases(transport, n, dtype="fp32", tag=_SCALES_TAG, eager=eager), 2)

    def values(
        self, due: Sequence[Bucket], encoded: Sequence[EncodedBucket | None], context: StepContext | None
    ) -> Tensor:
        """Return fp32: this rank's own scales of these buckets, one after the other; zeros where it takes no step."""
        found = dict(zip(self._buckets.all, encoded, strict=False))
        if context is None or any(found[bucket] is None for bucket in due):
            return torch.zeros(self._count(due), dtype=torch.float32, device=due[0].device)
        return torch.cat([scale for bucket in due for scale in own_scales(bucket, found[bucket].grads, context)])  # type: ignore[union-attr]

    def write(self, due: Sequence[Bucket], means: Tensor, step: int | Tensor, moves: Tensor | None) -> None:
        """Set the scales; ``moves`` is None where the host knows that the step is taken, else whether it is."""
        shared = [(bucket, self._state[slot.param]["scale"]) for bucket in due for slot in bucket.slots]
        for (bucket, scale), mean in zip(shared, torch.split(means, [len(s) for _, s in shared]), strict=True):
            writes = moves
            if self._capturable and moves is not None:
                # the device knows the step
                assert isinstance(step, Tensor)
                writes = (step % _every(bucket) == 0) & (moves != 0)
            _write(scale, mean, writes)
        if moves is None:
            # ranks step by finite values only, so no scale is NaN, and no device need be asked
            self._is_known.update(dict.fromkeys(due, True))

    def _shared(self, n_buckets: int) -> list[Bucket]:
        return [bucket for bucket in self._buckets.all[:n_buckets] if _is_shared(bucket)]

    def _count(self, due: Sequence[Bucket]) -> int:
        return sum(sum(_scale_counts(bucket)) for bucket in due)


def own_scales(bucket: Bucket, grads: list[Tensor], context: StepContext) -> Sequence[Tensor]:
    """Return this rank's scales of a quantized bucket's updates."""
    compression = bucket.compression
    assert isinstance(compression, Quantized)
    return foreach_lion_scale(
        bucket.momenta,
        [storage_order_view("grad", grad) for grad in grads],
        beta1=context.rates[bucket.group_index].beta1,
        norm=compression.norm,
        block=compression.block,
        grad_scale=context.factors[bucket.group_index],
        impl=context.impl,
    )


def _is_shared(bucket: Bucket) -> bool:
    return isinstance(bucket.compression, Quantized) and bucket.compression.share_scales_every is not None


def _every(bucket: Bucket) -> int:
    assert isinstance(bucket.compression, Quantized)
    assert bucket.compression.share_scales_every is not None
    return bucket.compression.share_scales_every


def _scale_counts(bucket: Bucket) -> list[int]:
    """Return the number of scales of each parameter of a quantized bucket."""
    assert isinstance(bucket.compression, Quantized)
    return [scale_count(slot.numel, bucket.compression.block or 0) for slot in bucket.slots]


def _next_momentum(bucket: Bucket, encoded: EncodedBucket, index: int, part: slice, context: StepContext) -> Tensor:
    """Return fp32: this rank's momentum of a slot after the step."""
    return lion_ema(
        bucket.momenta[index][part],
        storage_order_view("grad", encoded.grads[index])[part],
        beta=context.rates[bucket.group_index].beta2,
        grad_scale=context.factors[bucket.group_index],
    )


def _write(out: Tensor, value: Tensor, active: Tensor | None) -> None:
    """Overwrite ``out``, rounded to its dtype, unless ``active`` is zero."""
    out.copy_(value if active is None else torch.where(active != 0, value.to(out.dtype), out))


def _drift_phases(transport: Transport, sizes: Sequence[int], eager: bool) -> Phases[Tensor]:
    """Measure drift; see `Drift`."""
    mean_of = average_phases(transport, sum(sizes), dtype="fp32", tag=_DRIFT_TAG, eager=eager)
    moments_of = average_phases(transport, 2 * len(sizes), dtype="fp32", tag=_DRIFT_TAG + 1, eager=eager)
    next(mean_of)
    next(moments_of)
    mine = yield None
    mean = yield from _within(mean_of, mine)
    apart = [part.double().square().sum() for part in torch.split(mine - mean, list(sizes))]
    squares = [part.double().square().sum() for part in torch.split(mine, list(sizes))]
    moments = yield from _within(moments_of, torch.stack([*apart, *squares]).float())
    variance, power = moments.view(2, -1)
    # momentum that is zero on all ranks does not drift
    yield Done(torch.where(power > 0, variance / power, 0.0))


def _within(phases: Phases[Tensor], message: Tensor) -> Any:
    """Run an algorithm within another one."""
    state = phases.send(message)
    while not isinstance(state, Done):
        state = phases.send((yield state))
    return state.result


def _sample_of(slot: Slot) -> tuple[slice, int]:
    """Return which elements are sampled, and how many."""
    count = min(slot.numel, max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, slot.numel // _SAMPLE_SHARE)))
    stride = slot.numel // count
    return slice(0, count * stride, stride), count
