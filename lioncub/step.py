"""One step, written once: encode, exchange, control, decide, result, apply, report.

Every variant is this sequence: overlap has a gradient hook call `StepEngine.send` early; simulated ranks have another
process group; one rank alone leaves out the exchange and applies plain Lion; a captured or compiled step reads its
report at the next step. Encoding reads only; parameters, momentum and scales change in `StepEngine.apply` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters
from lioncub.buckets import Bucket, BucketList
from lioncub.collectives import Voter
from lioncub.collectives.algorithms import Exchange, VoteResult
from lioncub.collectives.transport import Transport
from lioncub.compression import Quantized, TernaryVote
from lioncub.config import Precision
from lioncub.control import COMMIT, FAILED, Attempt, Control, Decision
from lioncub.kernels import (
    abstain_parity,
    foreach_lion_apply_,
    foreach_lion_encode,
    foreach_lion_quantize,
    foreach_lion_step_,
    tie_parity,
)
from lioncub.kernels.scalars import Scalar
from lioncub.membership import Membership
from lioncub.overlap import Overlap
from lioncub.payloads import Drift, LateBuckets, MomentumAverages, Payload, SharedScales, own_scales
from lioncub.precision import Masters, rounding_of

R = TypeVar("R")
# with the least normal number as scale, every other one is past the largest level
_LEAST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class StepContext:
    """The inputs of a step beside gradients and momentum: its number, each group's rates, the factors of gradients.

    ``step`` is a number, or a tensor on the device in a capturable step. ``nonfinite`` is int32[T], written as buckets
    are encoded: 1 where a parameter's update is not finite. A rank that ``abstains`` encodes updates of zero.
    """

    step: int | Tensor
    layout: int
    rates: tuple[Hyperparameters, ...]
    factors: tuple[Scalar, ...]
    nonfinite: Tensor
    impl: str
    abstains: bool = False

    def beta1_of(self, bucket: Bucket) -> Scalar:
        """Return the beta1 by which a bucket is encoded: 0 leaves momentum out."""
        return 0.0 if self.abstains else self.rates[bucket.group_index].beta1

    def gradients_of(self, bucket: Bucket) -> tuple[list[Tensor], list[bool]]:
        """Return `Bucket.gradients`, or zeros for a rank that abstains."""
        return bucket.no_gradients() if self.abstains else bucket.gradients()

    def is_like(self, other: StepContext) -> bool:
        """Whether codes that were encoded in the other are those of this one."""
        same = (self.step, self.layout, self.rates) == (other.step, other.layout, other.rates)
        return same and self.abstains == other.abstains


@dataclass(frozen=True)
class EncodedBucket:
    """One bucket of this rank: gradients, of their parameters' shape or 1-d in storage order, and who has one."""

    grads: list[Tensor]
    present: list[bool]


@dataclass(frozen=True)
class SentBucket:
    """A bucket in progress; nothing was encoded where this rank had failed. One rank alone sends nothing."""

    encoded: EncodedBucket | None
    vote: Exchange[VoteResult] | None = None
    payloads: tuple[tuple[Payload, Exchange[Tensor]], ...] = ()

    @property
    def exchanges(self) -> list[Exchange[Any]]:
        """All that is in progress, the vote first."""
        return [] if self.vote is None else [self.vote, *(exchange for _, exchange in self.payloads)]


@dataclass(frozen=True)
class Proposal:
    """A step up to its application: this rank's part with what was exchanged, and what was decided."""

    context: StepContext
    sent: list[SentBucket]
    decision: Decision


class StepEngine:
    """Takes the steps of the buckets that all ranks are known to have, ``n_agreed``, on one set of ranks.

    ``overlap`` is set where buckets are sent early. Bytes and seconds are those of the last step.
    """

    def __init__(
        self,
        buckets: BucketList,
        members: Membership,
        masters: Masters,
        precision: Precision,
        momentum: MomentumAverages,
        drift: Drift,
        scales: SharedScales,
        *,
        impl: str,
        capturable: bool,
    ) -> None:
        self.buckets, self.members, self._masters, self._precision = buckets, members, masters, precision
        self.momentum, self.drift, self.scales = momentum, drift, scales
        self._impl, self._capturable = impl, capturable
        self.overlap: Overlap | None = None
        # by which the host knows what is due: the step that all ranks have agreed on
        self.schedule = 0
        self.sync_seconds = self.exposed_seconds = 0.0
        # int64[2] (ties, unanimous) of each bucket of the last step that was taken
        self.counts: list[Tensor] = []
        self.has_moved = False
        self.agree()

    def agree(self) -> None:
        """Prepare what carries the buckets, which all ranks are known to have as they are now."""
        buckets, members = self.buckets.all, self.members
        self.n_agreed = len(buckets)
        names = [slot.name for bucket in buckets for slot in bucket.slots]
        self.voters: list[Voter] = []
        self._device, self._transport, deciding = buckets[0].device, None, None
        if members.workers > 1:
            self.voters = members.voters(buckets, functional=self._capturable)
            self._transport = Transport(members.groups.group, self._device, functional=self._capturable)
        if not members.is_alone:
            deciding = Transport(members.deciding, self._device, functional=self._capturable)
        self.control = Control(
            names,
            sorted({bucket.group_index for bucket in buckets}),
            deciding,
            self._device,
            capturable=self._capturable,
            order=None if members.layouts is None else self.buckets.order(self.n_agreed),
            layouts=members.layouts,
        )
        self._late = LateBuckets(buckets, members.meshes, self.scales)
        self._n_params = len(names)
        self._least = [_least_scales(bucket) for bucket in buckets]
        self.seconds: list[float] = [0.0] * len(self.voters)
        if self._capturable:
            self._totals = torch.zeros(2, dtype=torch.int64, device=self._device)

    def context(
        self,
        groups: Sequence[Mapping[str, Any]],
        step: int | Tensor,
        scale: Tensor | float | None,
        *,
        abstains: bool = False,
    ) -> StepContext:
        """Read the hyperparameters of a step; ``scale`` is that of a GradScaler."""
        rates = tuple(Hyperparameters.of(group, keep_tensors=self._capturable) for group in groups)
        factors = tuple(_factor(now, scale) for now in rates)
        nonfinite = torch.zeros(self._n_params, dtype=torch.int32, device=self._device)
        return StepContext(step, self.momentum.agreed_layout(), rates, factors, nonfinite, self._impl, abstains)

    def expect(self, first: int = 0) -> None:
        """Post the receives of a step, of buckets from ``first`` on."""
        for voter in self.voters[first:]:
            voter.expect()
        self.control.expect()

    def exchange(
        self,
        context: StepContext | None,
        attempt: Attempt,
        early: Sequence[SentBucket],
        flags: int,
        overflow: Tensor | int | None,
    ) -> Proposal | Decision:
        """Run stages 1 to 5: encode and send what is not sent, exchange everything, decide. A collective.

        A rank that fails, as ``attempt`` keeps, sends what the others wait for, and gets only the decision.
        """
        # of none twice: those of a later step would take its messages, even if other voters carry it
        self.expect(len(early))
        sent = list(early)
        self._late.prepare(context, attempt)
        for i in range(len(sent), self.n_agreed):
            sent.append(self.send(i, context, attempt))
        message = None
        if context is not None:
            message = attempt.run(self._control_message, context, sent, flags, overflow)
        if message is None:
            message = self.control.blank(FAILED, self.schedule if context is None else context.step)
        everyone = message.view(1, -1)
        if self.control.is_sent:
            with _range("exchange"):
                everyone = self._exchange_control(message, [exchange for one in sent for exchange in one.exchanges])
            self.seconds = [one.vote.seconds for one in sent if one.vote is not None]
            self.sync_seconds = sum(exchange.seconds for one in sent for _, exchange in one.payloads)
        decision = self.control.decide(everyone)
        if attempt.failure is not None or context is None:
            return decision
        return Proposal(context, sent, decision)

    def send(self, i: int, context: StepContext | None, attempt: Attempt) -> SentBucket:
        """Run stages 1 and 2 of a bucket: encode it, and start its vote and the averages of what is due of it.

        A rank that takes no step sends codes and values of zero.
        """
        bucket, step = self.buckets.all[i], self.schedule
        encoded = None
        if context is not None:
            with _range("encode"):
                encoded = attempt.run(self._encode, i, context)
        if not self.voters:
            return SentBucket(encoded)
        if encoded is None:
            bucket.packed.zero_()
        now: Any = step if context is None else context.step
        vote = self._start(self.voters[i].prepare(), (bucket.packed, tie_parity(now) + bucket.parity))
        payloads: list[tuple[Payload, Exchange[Tensor]]] = []
        for payload in (self.scales, self.momentum, self.drift):
            if i == 0:
                payload.bytes_sent = 0
            if payload.is_due(bucket, step):
                assert self._transport is not None
                exchange = payload.exchange(bucket, i, step, self._transport, self.overlap is not None)
                values = None if encoded is None else attempt.run(payload.values, bucket, step, encoded, context)
                if values is None:
                    values = torch.zeros(payload.size(bucket, step), dtype=torch.float32, device=bucket.device)
                payloads.append((payload, self._start(exchange, values)))
        return SentBucket(encoded, vote, tuple(payloads))

    def apply(self, proposal: Proposal, n_active: int | None) -> None:
        """Run stage 6: move parameters and momentum by the votes, or alone by plain Lion, where the decision allows it.

        ``n_active`` is the number of parameters that move, None where the host does not know.
        """
        decision, context = proposal.decision, proposal.context
        all_move = n_active == self._n_params
        takes_step = None if n_active is not None else decision.words[0] == COMMIT
        counts = []
        for bucket, sent in zip(self.buckets.all, proposal.sent, strict=False):
            active = None if all_move else decision.active[bucket.span]
            assert sent.encoded is not None
            voted = None if sent.vote is None else sent.vote.result()
            with _range("apply"):
                self._apply(bucket, sent.encoded, context, active, None if voted is None else voted.packed)
            if voted is not None:
                counts.append(voted.counts)
            for payload, exchange in sent.payloads:
                payload.write(bucket, self.schedule, exchange.result(), active, takes_step, context.step)
        if self._capturable and counts:
            self._totals.copy_(torch.stack(counts).sum(0))
            counts = [self._totals]
        self.counts, self.has_moved = counts, True

    def _start(self, exchange: Exchange[R], message: Any) -> Exchange[R]:
        if self.overlap is None:
            exchange.start(message)
        else:
            self.overlap.comm.carry(exchange, message)
        return exchange

    def _control_message(
        self, context: StepContext, sent: Sequence[SentBucket], flags: int, overflow: Tensor | int | None
    ) -> Tensor:
        """Write this rank's control message."""
        return self.control.message(
            context.step,
            context.rates,
            flags=flags,
            overflow=overflow,
            nonfinite=context.nonfinite,
            present=[has for one in sent if one.encoded is not None for has in one.encoded.present],
            layout=context.layout,
            microseconds=self.members.tuner.microseconds,
        )

    def _exchange_control(self, message: Tensor, exchanges: Sequence[Exchange[Any]]) -> Tensor:
        """Run stage 3: send the control message, and wait for everything that is in progress."""
        is_traced = torch.compiler.is_compiling()
        began = 0.0 if is_traced else perf_counter()
        control = self._start(self.control.prepare(), message)
        if self.overlap is not None:
            self.overlap.comm.wait()
        # every rank starts the later phases in this order
        moving = [*exchanges, control]
        while moving:
            moving = [exchange for exchange in moving if exchange.advance()]
        if not is_traced:
            self.exposed_seconds += perf_counter() - began
        return control.result()

    def _encode(self, i: int, context: StepContext) -> EncodedBucket:
        """Run stage 1: pack the codes of a bucket's updates. Reads momentum and gradients, changes neither."""
        bucket = self.buckets.all[i]
        bucket.check_unchanged()
        grads, present = context.gradients_of(bucket)
        compression = bucket.compression
        rank, workers = self.members.rank, self.members.workers
        step: Any = context.step
        how: dict[str, Any] = {
            "beta1": context.beta1_of(bucket),
            "grad_scale": context.factors[bucket.group_index],
            "starts": bucket.starts,
            "out": bucket.packed,
            "nonfinite": context.nonfinite[bucket.span],
            "impl": self._impl,
        }
        if compression.form.bits == 1:
            parity = abstain_parity(step, rank, workers) + bucket.parity
            foreach_lion_encode(bucket.exp_avg, grads, parity=parity, **how)
            return EncodedBucket(grads, present)
        if isinstance(compression, Quantized):
            how |= {
                "bits": compression.bits,
                "norm": compression.norm,
                "block": compression.block,
                "stochastic": compression.stochastic,
                "seed": compression.seed,
                "worker": rank,
                "step": step,
                "scale": self.scales.of(bucket, lambda: own_scales(bucket, grads, context)),
            }
        else:
            assert isinstance(compression, TernaryVote)
            how |= {"bits": 2, "norm": "linf", "scale": self._least[i]}
        foreach_lion_quantize(
            bucket.exp_avg, grads, param_ids=bucket.param_ids, stream_starts=bucket.stream_starts, **how
        )
        return EncodedBucket(grads, present)

    def _apply(
        self,
        bucket: Bucket,
        encoded: EncodedBucket,
        context: StepContext,
        active: Tensor | None,
        voted: Tensor | None,
    ) -> None:
        """Move a bucket by its voted codes or, where there are none, by plain Lion."""
        now, form, workers = context.rates[bucket.group_index], bucket.compression.form, self.members.workers
        how: dict[str, Any] = {
            "grad": encoded.grads,
            "exp_avg": bucket.exp_avg,
            "lr": now.lr,
            "weight_decay": now.weight_decay,
            "beta2": now.beta2,
            "grad_scale": context.factors[bucket.group_index],
            "active": active,
            "master": self._masters.of(bucket.named) or None,
            "rounding": rounding_of(self._precision, context.step, self.members.rank),
            "param_ids": bucket.param_ids,
            "stream_starts": bucket.stream_starts,
            "starts": bucket.starts,
            "impl": self._impl,
        }
        if voted is None:
            foreach_lion_step_(bucket.params, beta1=now.beta1, **how)
            return
        step, offset, divisor = form.result_value(workers)
        bits = form.result_bits(workers)
        foreach_lion_apply_(bucket.params, voted, bits=bits, step=step, offset=offset, divisor=divisor, **how)


def _range(name: str) -> AbstractContextManager[object]:
    """Return a range of torch's profiler, named ``lioncub::`` and the stage, where one runs."""
    if torch.compiler.is_compiling() or not torch._C._autograd._profiler_enabled():
        return nullcontext()
    return torch.profiler.record_function(f"lioncub::{name}")


def _least_scales(bucket: Bucket) -> list[Tensor]:
    """Return fp32[1] of the least normal number for each parameter of a ternary bucket, to be read only."""
    if not isinstance(bucket.compression, TernaryVote):
        return []
    return [torch.full((1,), _LEAST_NORMAL, dtype=torch.float32, device=bucket.device)] * len(bucket.slots)


def _factor(rates: Hyperparameters, scale: Tensor | float | None) -> Scalar:
    """Return what gradients are multiplied by: the inverse loss scale, negative where maximized."""
    sign = -1.0 if rates.maximize else 1.0
    if scale is None:
        return sign
    return sign / (scale.double().view(()) if isinstance(scale, Tensor) else scale)
