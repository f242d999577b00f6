"""Values that ranks average beside the codes: momentum, its measured drift, shared scales of quantization.

Each has a fixed layout per bucket, is sent whether or not the step commits, and is written under the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from lioncub.buckets import Bucket, BucketList, Slot
from lioncub.collectives.agreement import digest
from lioncub.collectives.algorithms import Done, Exchange, Phases
from lioncub.collectives.average import average_bytes, average_phases
from lioncub.collectives.transport import PAYLOADS, Transport
from lioncub.compression import AnyCompression, Compression, Quantized, compression_of
from lioncub.kernels import lion_ema
from lioncub.kernels.checks import storage_order_view
from lioncub.kernels.quantization import foreach_lion_scale, scale_count
from lioncub.momentum_sync import MomentumSync, Segment, chosen_ids, segments_of
from lioncub.params import Meshes, local_of

if TYPE_CHECKING:
    from lioncub.control import Attempt
    from lioncub.step import EncodedBucket, StepContext

# elements of a parameter whose momentum is sampled to measure its drift: a share of them, but neither very few nor
# more than tell the ratio to a tenth
_SAMPLE_SHARE, _FEWEST_SAMPLES, _MOST_SAMPLES = 64, 16, 256
# when drift is measured for the first time
_FIRST_MEASUREMENT = 10
# entries of `state` before the first measurement or average
NOT_MEASURED, NOT_AGREED = -1.0, math.nan
# tags of one bucket
_TAGS = 4
_SCALES, _MOMENTUM, _DRIFT, _DRIFT_MOMENTS = range(_TAGS)


class Payload:
    """fp32 values of a bucket that ranks average in some steps. ``bytes_sent`` are those of the last step."""

    kind: int
    n_phases = 2
    dtype = "fp32"

    def __init__(self) -> None:
        self.bytes_sent = 0

    def is_due(self, bucket: Bucket, step: int) -> bool:
        """Whether the bucket's values are averaged in a step."""
        raise NotImplementedError

    def size(self, bucket: Bucket, step: int) -> int:
        """Return how many values of the bucket are averaged in a step."""
        raise NotImplementedError

    def values(self, bucket: Bucket, step: int, encoded: EncodedBucket, context: StepContext) -> Tensor:
        """Return this rank's values, fp32[size]."""
        raise NotImplementedError

    def write(
        self, bucket: Bucket, step: int, result: Tensor, active: Tensor | None, takes_step: Tensor | None, now: Any
    ) -> None:
        """Write the result of the exchange.

        ``active`` is int32, 1 for each parameter of the bucket that moves; ``takes_step`` whether the step is taken;
        both are None where the host knows that all do, or that it is. ``now`` is the step, a tensor in a capturable
        one.
        """
        raise NotImplementedError

    def exchange(self, bucket: Bucket, index: int, step: int, transport: Transport, eager: bool) -> Exchange[Tensor]:
        """Prepare the average over ranks of the ``index``-th bucket; receives are posted where they can be."""
        n = self.size(bucket, step)
        self.bytes_sent += average_bytes(n, transport.size, self.dtype)
        tag = _tag_of(index, self.kind)
        return Exchange(average_phases(transport, n, dtype=self.dtype, tag=tag, eager=eager), self.n_phases)


class SharedScales(Payload):
    """The scales of the buckets whose compression shares them, in ``state[p]["scale"]``: fp32[blocks].

    The mean over ranks is used from the next step on. A bucket with a scale that is unknown, as before the first
    average, is quantized by each rank's own. Where a block's shared scale is zero, all of its levels are.
    """

    kind = _SCALES

    def __init__(
        self,
        buckets: BucketList,
        state: Mapping[Any, Any],
        configured: Sequence[AnyCompression],
        *,
        capturable: bool,
    ) -> None:
        super().__init__()
        self._buckets, self._state, self._capturable = buckets, state, capturable
        # by param group, and whatever the number of ranks, on which the entries of a checkpoint must not depend
        self._configured = configured
        # by bucket, whether all its scales are known; asked of the device once
        self._is_known: dict[Bucket, bool] = {}
        # of parameters in parts with several scales: those of this part, which no checkpoint can put together
        self._of_parts: dict[Tensor, dict[str, Tensor]] = {}
        # this rank's scales of parameters that are in parts: those of the whole, of the step in progress
        self.of_wholes: dict[Bucket, Sequence[Tensor]] = {}

    def add(self, params: Sequence[Tensor]) -> None:
        """Make the entries of new parameters."""
        self.invalidate()
        new = set(params)
        for bucket, _, slot in self._buckets.slots:
            compression = compression_of(self._configured[bucket.group_index], slot.part.numel)
            if slot.param not in new or not _shares(compression):
                continue
            state, count = self._state_of(compression, slot), scale_count(slot.numel, compression.block or 0)
            state.setdefault("scale", torch.full((count,), NOT_AGREED, dtype=torch.float32, device=bucket.device))

    @property
    def has_parts(self) -> bool:
        """Whether this rank has scales of parts, which no checkpoint holds."""
        return bool(self._of_parts)

    def reset(self) -> None:
        """Go on with scales that are unknown: one rank alone shares none."""
        for *_, slot in self._buckets.slots:
            if "scale" in self._state[slot.param]:
                self._state[slot.param]["scale"].fill_(NOT_AGREED)
        self.loaded()

    def loaded(self) -> None:
        """Go on with what was loaded, and unknown scales where a checkpoint has none."""
        for state in self._of_parts.values():
            state["scale"].fill_(NOT_AGREED)
        self.invalidate()

    def invalidate(self) -> None:
        """Ask the state anew: it was loaded, or buckets have changed."""
        self._is_known.clear()

    def of(self, bucket: Bucket, own: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor] | None:
        """Return the scales to quantize a bucket by; None: by this rank's own.

        ``own`` computes these, where only the device knows which are to be taken.
        """
        if not _shares_scales(bucket):
            return self.of_wholes.get(bucket)
        shared = self._scales_of(bucket)
        if self._capturable:
            unknown = torch.cat(shared).isnan().any()
            return [torch.where(unknown, mine, ours) for mine, ours in zip(own(), shared, strict=True)]
        if bucket not in self._is_known:
            self._is_known[bucket] = not bool(torch.cat(shared).isnan().any())
        return shared if self._is_known[bucket] else self.of_wholes.get(bucket)

    def is_due(self, bucket: Bucket, step: int) -> bool:
        """See `Payload.is_due`; where the host does not know the step, in all of them."""
        return _shares_scales(bucket) and (self._capturable or step % _every(bucket) == 0)

    def size(self, bucket: Bucket, step: int) -> int:
        """See `Payload.size`."""
        return sum(_scale_counts(bucket))

    def values(self, bucket: Bucket, step: int, encoded: EncodedBucket, context: StepContext) -> Tensor:
        """See `Payload.values`."""
        if context.abstains and self._is_known.get(bucket):
            return torch.cat(self._scales_of(bucket))
        own = self.of_wholes.get(bucket)
        return torch.cat(list(own_scales(bucket, encoded.grads, context) if own is None else own))

    def write(
        self, bucket: Bucket, step: int, result: Tensor, active: Tensor | None, takes_step: Tensor | None, now: Any
    ) -> None:
        """See `Payload.write`: all scales of the bucket, also of parameters that do not move."""
        writes = takes_step
        if self._capturable and takes_step is not None:
            # the device knows the step
            writes = (now % _every(bucket) == 0) & takes_step
        for scale, mean in zip(self._scales_of(bucket), torch.split(result, _scale_counts(bucket)), strict=True):
            _write(scale, mean, writes)
        if takes_step is None:
            # ranks step by finite values only, so no scale is NaN, and no device need be asked
            self._is_known[bucket] = True

    def _scales_of(self, bucket: Bucket) -> list[Tensor]:
        return [self._state_of(bucket.compression, slot)["scale"] for slot in bucket.slots]

    def _state_of(self, compression: Compression, slot: Slot) -> dict[str, Tensor]:
        """Return what has a parameter's scales."""
        if slot.part.sharded and not compression.has_one_scale:
            return self._of_parts.setdefault(slot.param, {})
        state: dict[str, Tensor] = self._state[slot.param]
        return state


class LateBuckets:
    """The buckets whose codes need what other ranks of a mesh have: before they are encoded, gradients are made whole
    sums, and scales those of whole parameters. Collectives of the meshes; nothing without shards.
    """

    def __init__(self, buckets: Sequence[Bucket], meshes: Meshes, scales: SharedScales) -> None:
        self._meshes, self._scales = meshes, scales
        late = [bucket for bucket in buckets if bucket.is_late] if meshes.groups else []
        self._partial = sorted(
            (slot for bucket in late for slot in bucket.slots if slot.part.may_be_partial),
            key=lambda slot: slot.param_id,
        )
        in_parts = [(bucket, slot) for bucket in late if _has_whole_scales(bucket) for slot in bucket.slots]
        self._in_parts = sorted(in_parts, key=lambda place: place[1].param_id)
        self._buckets = list(dict.fromkeys(bucket for bucket, _ in in_parts))

    def prepare(self, context: StepContext | None, attempt: Attempt) -> None:
        """Make gradients and scales those of whole parameters; a rank that fails takes part with zeros."""
        if self._partial:
            named = [(slot.name, slot.param) for slot in self._partial]
            self._meshes.align_gradients(named, attempt, local_of(self._partial[0].param).device)
        if self._in_parts:
            own = None if context is None else attempt.run(self._own, context)
            self._combine(own or {})

    def _own(self, context: StepContext) -> dict[int, Tensor]:
        """Return the scale of this rank's part of each parameter, by its id."""
        found: dict[int, Tensor] = {}
        for bucket in self._buckets:
            bucket.check_unchanged()
            scales = own_scales(bucket, context.gradients_of(bucket)[0], context)
            found |= {slot.param_id: scale for slot, scale in zip(bucket.slots, scales, strict=True)}
        return found

    def _combine(self, own: dict[int, Tensor]) -> None:
        """Reduce scales over the parts: maxima, or sums of absolute values or squares, in float64."""
        device = self._buckets[0].device
        zero = torch.zeros(1, dtype=torch.float32, device=device)
        slots, norms = [slot for _, slot in self._in_parts], [_norm_of(bucket) for bucket, _ in self._in_parts]
        mine = torch.cat([own.get(slot.param_id, zero) for slot in slots]).double()
        sizes, wholes = (
            torch.tensor(of, dtype=torch.float64, device=device)
            for of in ([slot.numel for slot in slots], [max(slot.part.numel, 1) for slot in slots])
        )
        is_max, is_rms = (torch.tensor([norm == name for norm in norms], device=device) for name in ("linf", "l2"))
        values = torch.where(is_max, mine, torch.where(is_rms, mine.square(), mine) * sizes)

        def reduce(everyone: Tensor) -> Tensor:
            return torch.where(is_max, everyone.amax(0), everyone.sum(0))

        whole = self._meshes.combined(values, [slot.part for slot in slots], reduce)
        mean = whole / wholes
        found = torch.where(is_max, whole, torch.where(is_rms, mean.sqrt(), mean)).float()
        by_id = dict(zip([slot.param_id for slot in slots], torch.split(found, 1), strict=True))
        self._scales.of_wholes = {bucket: [by_id[slot.param_id] for slot in bucket.slots] for bucket in self._buckets}


class MomentumAverages(Payload):
    """The momentum to come, averaged by a `MomentumSync` policy: one message per bucket that has segments due."""

    kind = _MOMENTUM

    def __init__(self, policy: MomentumSync | None, buckets: BucketList, drift: Drift) -> None:
        self._buckets, self._drift = buckets, drift
        self.use(policy)

    def use(self, policy: MomentumSync | None) -> None:
        """Go on with another policy."""
        self._policy, self.bytes_sent = policy, 0
        self.dtype = "fp32" if policy is None else policy.dtype
        self.invalidate()

    def invalidate(self) -> None:
        """Choose anew: state has been loaded, or buckets have changed."""
        # ids of the parameters to synchronize, by the number of measurements of drift
        self._chosen: tuple[int, frozenset[int]] | None = None
        # segments by bucket of the last step that was asked for: the same until it ends
        self._due: tuple[int, dict[Bucket, tuple[Segment, ...]]] | None = None

    @property
    def averages_all(self) -> bool:
        """Whether every step averages all momentum."""
        return self._policy is not None and self._policy.every == 1 and self._policy.select is None

    def agreed_layout(self) -> int:
        """Return the hash of the layout, and of what was chosen by drift: ranks that differ in it must not average."""
        if self._policy is None or not self._policy.is_auto:
            return self._buckets.layout
        return digest([self._buckets.layout, sorted(self._selection(self._policy))])

    def is_due(self, bucket: Bucket, step: int) -> bool:
        """See `Payload.is_due`."""
        return self._policy is not None and bool(self._segments(bucket, step))

    def size(self, bucket: Bucket, step: int) -> int:
        """See `Payload.size`."""
        return sum(segment.padded for segment in self._segments(bucket, step))

    def values(self, bucket: Bucket, step: int, encoded: EncodedBucket, context: StepContext) -> Tensor:
        """See `Payload.values`: the segments of momentum one after the other, padded."""
        segments = self._segments(bucket, step)
        sizes = [segment.padded for segment in segments]
        values = torch.zeros(sum(sizes), dtype=torch.float32, device=bucket.device)
        for one, room in zip(segments, torch.split(values, sizes), strict=True):
            room[: one.end - one.start] = _next_momentum(bucket, encoded, one.index, one.part, context)
        return values

    def write(
        self, bucket: Bucket, step: int, result: Tensor, active: Tensor | None, takes_step: Tensor | None, now: Any
    ) -> None:
        """See `Payload.write`: the segments' momentum."""
        segments = self._segments(bucket, step)
        for segment, mean in zip(segments, torch.split(result, [one.padded for one in segments]), strict=True):
            momentum = bucket.momenta[segment.index][segment.part]
            _write(momentum, mean[: segment.end - segment.start], None if active is None else active[segment.index])

    def _segments(self, bucket: Bucket, step: int) -> tuple[Segment, ...]:
        """Return the segments of a bucket that are due in a step."""
        assert self._policy is not None
        if self._due is None or self._due[0] != step:
            selection = self._selection(self._policy)
            self._due = step, segments_of(self._buckets, selection, self._policy.piece(step))
        return self._due[1].get(bucket, ())

    def _selection(self, policy: MomentumSync) -> frozenset[int]:
        """Return the ids of the parameters to synchronize."""
        if self._chosen is None or self._chosen[0] != self._drift.measurements:
            drift = self._drift.by_id() if policy.is_auto else {}
            self._chosen = self._drift.measurements, chosen_ids(policy, self._buckets, drift)
        return self._chosen[1]


class Drift(Payload):
    """Measured drift: the variance of momentum over ranks, before it is averaged, relative to its mean square.

    1. Samples of the momentum to come are averaged. 2. Each rank sums its squared distances from the mean, and its
    squares, per parameter. 3. These are averaged.
    """

    kind = _DRIFT
    n_phases = 4

    def __init__(self, every: int | None, buckets: BucketList, state: Mapping[Any, Any]) -> None:
        super().__init__()
        self.every, self._buckets, self._state = every, buckets, state
        # how often any bucket's drift was written
        self.measurements = 0

    def add(self, params: Sequence[Tensor]) -> None:
        """Make the entries of new parameters, if drift is ever measured."""
        if self.every is not None:
            for param in params:
                like = local_of(param)
                self._state[param]["drift"] = torch.full((), NOT_MEASURED, dtype=torch.float32, device=like.device)

    def is_due(self, bucket: Bucket, step: int) -> bool:
        """See `Payload.is_due`."""
        if self.every is None or not bucket.elements:
            return False
        return step == min(_FIRST_MEASUREMENT, self.every) or (step > 0 and step % self.every == 0)

    def size(self, bucket: Bucket, step: int) -> int:
        """See `Payload.size`."""
        return sum(_sample_of(slot)[1] for _, slot in _sampled(bucket))

    def values(self, bucket: Bucket, step: int, encoded: EncodedBucket, context: StepContext) -> Tensor:
        """See `Payload.values`: samples of all parameters."""
        places = _sampled(bucket)
        return torch.cat([_next_momentum(bucket, encoded, j, _sample_of(slot)[0], context) for j, slot in places])

    def exchange(self, bucket: Bucket, index: int, step: int, transport: Transport, eager: bool) -> Exchange[Tensor]:
        """Prepare the measurement, whose result are the ratios of the parameters, fp32."""
        sizes = [_sample_of(slot)[1] for _, slot in _sampled(bucket)]
        self.bytes_sent += sum(average_bytes(count, transport.size) for count in (sum(sizes), 2 * len(sizes)))
        return Exchange(_drift_phases(transport, sizes, index, eager), self.n_phases)

    def write(
        self, bucket: Bucket, step: int, result: Tensor, active: Tensor | None, takes_step: Tensor | None, now: Any
    ) -> None:
        """See `Payload.write`."""
        self.measurements += 1
        for (j, slot), ratio in zip(_sampled(bucket), result, strict=True):
            _write(self._state[slot.param]["drift"], ratio, None if active is None else active[j])

    def by_id(self) -> dict[int, float]:
        """Return the measured drift by id of the parameter; waits for the device."""
        return {slot.param_id: float(self._state[slot.param]["drift"]) for *_, slot in self._buckets.slots}

    def by_name(self) -> dict[str, float] | None:
        """Return the measured drift by name of the parameter; None where none was measured."""
        if self.every is None:
            return None
        found = {slot.name: float(self._state[slot.param]["drift"]) for *_, slot in self._buckets.slots}
        return {name: value for name, value in found.items() if value != NOT_MEASURED} or None


def own_scales(bucket: Bucket, grads: list[Tensor], context: StepContext) -> Sequence[Tensor]:
    """Return this rank's scales of a quantized bucket's updates."""
    compression = bucket.compression
    assert isinstance(compression, Quantized)
    return foreach_lion_scale(
        bucket.momenta,
        [storage_order_view("grad", grad) for grad in grads],
        beta1=context.beta1_of(bucket),
        norm=compression.norm,
        block=compression.block,
        grad_scale=context.factors[bucket.group_index],
        impl=context.impl,
    )


def _norm_of(bucket: Bucket) -> str:
    assert isinstance(bucket.compression, Quantized)
    return bucket.compression.norm


def _has_whole_scales(bucket: Bucket) -> bool:
    """Whether a parameter of the bucket has one scale, and is in parts."""
    return bucket.compression.has_one_scale and any(slot.part.sharded for slot in bucket.slots)


def _shares_scales(bucket: Bucket) -> bool:
    return _shares(bucket.compression)


def _shares(compression: Compression) -> TypeGuard[Quantized]:
    return isinstance(compression, Quantized) and compression.share_scales_every is not None


def _every(bucket: Bucket) -> int:
    assert isinstance(bucket.compression, Quantized)
    assert bucket.compression.share_scales_every is not None
    return bucket.compression.share_scales_every


def _scale_counts(bucket: Bucket) -> list[int]:
    """Return the number of scales of each parameter of a quantized bucket."""
    assert isinstance(bucket.compression, Quantized)
    return [scale_count(slot.numel, bucket.compression.block or 0) for slot in bucket.slots]


def _sampled(bucket: Bucket) -> list[tuple[int, Slot]]:
    return [(j, slot) for j, slot in enumerate(bucket.slots) if slot.numel]


def _sample_of(slot: Slot) -> tuple[slice, int]:
    """Return which elements are sampled, and how many."""
    count = min(slot.numel, max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, slot.numel // _SAMPLE_SHARE)))
    stride = slot.numel // count
    return slice(0, count * stride, stride), count


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


def _tag_of(index: int, kind: int) -> int:
    return PAYLOADS + _TAGS * index + kind


def _drift_phases(transport: Transport, sizes: Sequence[int], index: int, eager: bool) -> Phases[Tensor]:
    """Measure drift; see `Drift`."""
    mean_of, moments_of = (
        average_phases(transport, n, dtype="fp32", tag=_tag_of(index, kind), eager=eager)
        for n, kind in ((sum(sizes), _DRIFT), (2 * len(sizes), _DRIFT_MOMENTS))
    )
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
