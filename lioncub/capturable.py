"""A step that the host never waits for, so that a compiler can trace it whole and a CUDA graph can capture it.

Everything that decides stands on the device: the step counter, who has a gradient, whether all is finite and all
workers agree. What must not move is held back by a gate, and what went wrong is kept in a report for later.

1. Encode every bucket, and send its votes.
2. Send one control message: what workers must agree on, the first tensor that is not finite, who has a gradient.
3. Judge everyone's control messages: one gate per tensor.
4. Vote, and apply what the gates let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lioncub.arguments import gradient_of
from lioncub.buckets import Bucket
from lioncub.collectives.errors import WorkersDisagreeError
from lioncub.collectives.graph import GRAPH_ALGORITHMS, Gather, GraphVote, arrived
from lioncub.collectives.handshake import WIRE_VERSION
from lioncub.collectives.header import first_nonfinite
from lioncub.collectives.transport import Group, rank_of, world_size_of
from lioncub.collectives.virtual import VirtualGroup
from lioncub.compression import AnyCompression, SignVote
from lioncub.kernels import abstain_parity, tie_parity
from lioncub.kernels.flat import apply_bucket_, encode_bucket, step_bucket_
from lioncub.kernels.scalars import Scalar
from lioncub.masters import Masters
from lioncub.momentum_sync import MomentumSync
from lioncub.precision import Precision
from lioncub.stats import BucketStats
from lioncub.voting import NonFiniteError

if TYPE_CHECKING:
    from lioncub.wiring import Wiring

# reasons, the first word of a report; then step, tensor and rank
_NOTHING, _NONFINITE, _DISAGREE, _ABSENT = range(4)
# in place of the wire version in a control message: its worker takes no step because of an error, or because its
# parameters may be new
FAILED, UNVERIFIED = -1, -2
# one bit of a word is its sign
_BITS = 63


def check_capturable(
    wiring: Wiring,
    devices: Sequence[str],
    compressions: Sequence[AnyCompression],
    policy: MomentumSync | None,
    drift_every: int | None,
) -> None:
    """Raise ValueError, naming the argument, for what a capturable step cannot do."""
    refused: list[tuple[bool, str, object]] = [
        (wiring.overlap, "overlap: expected False", wiring.overlap),
        (policy is not None, "momentum_sync: expected None", policy),
        (drift_every is not None, "drift_every: expected None", drift_every),
        (isinstance(wiring.group, VirtualGroup), "process_group: expected real workers", "simulated ones"),
        (len(set(devices)) > 1, "params: expected all on one device", devices),
        (
            wiring.algorithm not in ("auto", *GRAPH_ALGORITHMS),
            f"algorithm: expected one of {('auto', *GRAPH_ALGORITHMS)}",
            wiring.algorithm,
        ),
    ]
    for compression in compressions:
        refused.append((compression != SignVote(), "compression: expected SignVote()", compression))
    for is_refused, expected, got in refused:
        if is_refused:
            raise ValueError(f"{expected} with capturable=True, got {got!r}")


def keep_tensors(param_groups: Sequence[dict[str, Any]], kept: Sequence[dict[str, Tensor]]) -> None:
    """Write what was loaded into the tensors that the groups had, which graphs may hold."""
    for group, tensors in zip(param_groups, kept, strict=True):
        for name, tensor in tensors.items():
            tensor.copy_(torch.as_tensor(group[name], dtype=tensor.dtype, device=tensor.device))
            group[name] = tensor


@dataclass(frozen=True)
class Rates:
    """The hyperparameters of a param group as they are: numbers, or 0-dim tensors that are not read by the host."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    weight_decay: Scalar
    maximize: bool

    @classmethod
    def of(cls, group: dict[str, Any]) -> Rates:
        """Those of a param group now."""
        beta1, beta2 = group["betas"]
        return cls(group["lr"], beta1, beta2, group["weight_decay"], bool(group["maximize"]))


class CapturableStep:
    """The step of all buckets, which lie on one device.

    ``votes`` has one for each bucket, none for one worker alone. Where ``reports`` is false, what is not finite is
    counted among ``skipped`` and not reported.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        votes: Sequence[GraphVote],
        group: Group,
        *,
        layout: int,
        reports: bool,
        precision: Precision,
        masters: Masters,
        impl: str,
    ) -> None:
        device = buckets[0].device
        self._buckets, self._votes, self._impl = buckets, votes, impl
        self._worst = _NONFINITE if reports else _NOTHING
        self._workers = world_size_of(group) if votes else 1
        self._rank = rank_of(group) if votes else 0
        self._gather = Gather(group, device) if votes else None
        self._starts = [[slot.start for slot in bucket.slots] for bucket in buckets]
        self._numbers = [[slot.number for slot in bucket.slots] for bucket in buckets]
        self._precision, self._masters = precision, masters
        # what moves: parameters, or their masters
        self._params = [[masters.moved(slot.name, slot.param) for slot in bucket.slots] for bucket in buckets]
        self._n_tensors = sum(len(bucket.slots) for bucket in buckets)
        indices = torch.arange(self._n_tensors, dtype=torch.int64, device=device)
        self._words, self._shifts = indices // _BITS, indices % _BITS
        # copied once, since a captured step copies nothing from the host
        padding = sum(8 * bucket.n_bytes - bucket.elements for bucket in buckets)
        self._padding = torch.tensor([0, padding], dtype=torch.int64, device=device)
        self._constants = torch.tensor([WIRE_VERSION, layout], dtype=torch.int64, device=device)
        self.report = torch.zeros(4, dtype=torch.int64, device=device)
        # the last step's report on the host, and when it is there
        self._last = (
            torch.zeros(4, dtype=torch.int64, device="cpu").pin_memory() if self.report.is_cuda else self.report
        )
        self._copied: torch.cuda.Event | None = None
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def control_bytes_sent(self) -> int:
        """Bytes of control messages that each worker sends per step."""
        return (self._workers - 1) * 8 * (self._n_fixed + -(-self._n_tensors // _BITS))

    @property
    def _n_fixed(self) -> int:
        """Words of a control message before the bitmap."""
        return 3 + 5 * len({bucket.group_index for bucket in self._buckets}) + 2

    def stats(self, buckets: Sequence[BucketStats]) -> tuple[BucketStats, ...]:
        """Those of buckets that travel as this step sends them."""
        if not self._votes:
            return tuple(buckets)
        ways = [(vote.algorithm, vote.bytes_sent) for vote in self._votes]
        return tuple(
            replace(bucket, algorithm=algorithm, bytes_sent=sent)
            for bucket, (algorithm, sent) in zip(buckets, ways, strict=True)
        )

    def counted(self) -> tuple[tuple[int, int], int]:
        """(Ties, unanimous votes) of the last step, and skipped steps; waits for the device."""
        ties, unanimous = self.counts.tolist()
        return (ties, unanimous), int(self.skipped)

    def run(self, rates: Sequence[Rates], clock: Tensor, scale: Tensor | None, overflow: Tensor | None) -> None:
        """Take the step, with the rates of every param group and what a GradScaler set. A collective call.

        Mutates parameters and momentum where the gates let it, ``clock`` (the step counter, int64[] on the device),
        and what is reported.
        """
        factors = [_factor(now, scale) for now in rates]
        grads = [self._gradients(bucket) for bucket in self._buckets]
        present = [slot.param.grad is not None for bucket in self._buckets for slot in bucket.slots]
        status = torch.zeros(self._n_tensors, dtype=torch.int32, device=clock.device)
        abstain, tie = abstain_parity(clock, self._rank, self._workers), tie_parity(clock)
        pending, at = [], 0
        for i, bucket in enumerate(self._buckets):
            packed = torch.zeros(bucket.n_bytes, dtype=torch.uint8, device=clock.device)
            now = rates[bucket.group_index]
            encode_bucket(
                bucket.exp_avg,
                grads[i],
                self._starts[i],
                beta1=now.beta1,
                parity=abstain,
                out=packed,
                status=status[at : at + len(bucket.slots)],
                grad_scale=factors[bucket.group_index],
                impl=self._impl,
            )
            at += len(bucket.slots)
            pending.append(self._votes[i].start(packed) if self._votes else packed)
        control = self._control(rates, clock, status, present, overflow)
        everyone = control.view(1, -1)
        if self._gather is not None:
            sent = self._gather(control)
            pending = [vote.advance(each, tie) for vote, each in zip(self._votes, pending, strict=True)]
            everyone = arrived(sent).view(self._workers, -1)
        gates = self._judge(everyone, len(control) - len(self._words_of(present)), clock)
        self._apply(rates, factors, clock, tie, grads, pending, gates)
        self._masters.write_back([slot.param for bucket in self._buckets for slot in bucket.slots])
        clock.add_(1)
        if self.report.is_cuda and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
            self._keep_report()

    def tell(self, word: int, clock: Tensor) -> list[int]:
        """Send the messages that others wait for, in a step that this worker does not take; everyone's first words.

        A collective call as `run`, which raises on all others with their next step. ``word`` is `FAILED` or
        `UNVERIFIED`. Changes what is reported, and waits for the device.
        """
        assert self._gather is not None
        device, bitmap = self.report.device, -(-self._n_tensors // _BITS)
        blanks = [torch.zeros(bucket.n_bytes, dtype=torch.uint8, device=device) for bucket in self._buckets]
        pending = [vote.start(blank) for vote, blank in zip(self._votes, blanks, strict=True)]
        sent = self._gather(torch.full((self._n_fixed + bitmap,), word, dtype=torch.int64, device=device))
        pending = [vote.advance(each, clock) for vote, each in zip(self._votes, pending, strict=True)]
        everyone = arrived(sent).view(self._workers, -1)
        for vote, each in zip(self._votes, pending, strict=True):
            vote.finish(each, clock)
        words: list[int] = everyone[:, 0].tolist()
        if set(words) != {UNVERIFIED}:
            self._judge(everyone, self._n_fixed, clock)
            self._keep_report()
        return words

    def _keep_report(self) -> None:
        """Bring the report to the host, without waiting."""
        if self.report.is_cuda:
            self._last.copy_(self.report, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def check_unchanged(self) -> None:
        """Raise where parameters or gradients are not what this step was made for."""
        for bucket in self._buckets:
            for slot in bucket.slots:
                slot.check_unchanged(bucket.device)
                gradient_of(slot.name, slot.param)

    def raise_last(self) -> None:
        """Raise what the last step reported, and no more than that: what has been launched since is not waited for."""
        if self.report.is_cuda:
            if self._copied is None:
                return
            self._copied.synchronize()
        self.raise_report(self._last)

    def raise_report(self, report: Tensor) -> None:
        """Raise what ``report`` says, and forget it: NonFiniteError or WorkersDisagreeError, on all workers alike."""
        reason, step, tensor, rank = report.tolist()
        if reason != _NOTHING:
            self.report.zero_()
            if self._copied is not None:
                # a copy of it that is under way would bring it back
                self._copied.synchronize()
            self._last.zero_()
        if reason == _NONFINITE:
            names = [slot.name for bucket in self._buckets for slot in bucket.slots]
            raise NonFiniteError(
                f"step {step}: a gradient, momentum or update is not finite, first in parameter {names[tensor - 1]} on "
                f"rank {rank}; no worker changed anything"
            )
        if reason == _ABSENT:
            raise WorkersDisagreeError(
                f"step {step} was taken by no worker, because of an error on rank {rank} (reported there)"
            )
        if reason == _DISAGREE:
            raise WorkersDisagreeError(
                f"workers disagree on the step, the bucket layout or the hyperparameters (lr, betas, weight_decay, "
                f"maximize) at step {step}; no worker changed anything"
            )

    def _gradients(self, bucket: Bucket) -> list[Tensor]:
        found = [(slot.param, gradient_of(slot.name, slot.param)) for slot in bucket.slots]
        return [torch.zeros_like(param) if grad is None else grad for param, grad in found]

    def _words_of(self, present: Sequence[bool]) -> list[int]:
        return [
            sum(1 << i for i, has in enumerate(present[start : start + _BITS]) if has)
            for start in range(0, len(present), _BITS)
        ]

    def _control(
        self, rates: Sequence[Rates], clock: Tensor, status: Tensor, present: Sequence[bool], overflow: Tensor | None
    ) -> Tensor:
        """int64: what must be equal, the first tensor that is not finite, overflow, a bitmap of gradients."""
        used = sorted({bucket.group_index for bucket in self._buckets})
        numbers = [
            number
            for i in used
            for number in (rates[i].lr, rates[i].beta1, rates[i].beta2, rates[i].weight_decay, float(rates[i].maximize))
        ]
        exact = _filled(numbers, torch.float64, clock.device)
        found_inf = clock.new_zeros(1) if overflow is None else (overflow != 0).view(1).to(torch.int64)
        return torch.cat(
            [
                self._constants,
                clock.view(1),
                exact.view(torch.int64),
                first_nonfinite(status).view(1),
                found_inf,
                _filled(self._words_of(present), torch.int64, clock.device),
            ]
        )

    def _judge(self, everyone: Tensor, n_fixed: int, clock: Tensor) -> Tensor:
        """int32[tensors], 1 where a tensor may move, from int64[N, W]; what is wrong goes into the report."""
        agreed = (everyone[:, : n_fixed - 2] == everyone[0, : n_fixed - 2]).all()
        first, found_inf = everyone[:, n_fixed - 2], everyone[:, n_fixed - 1]
        is_bad = first != 0
        overflows, any_bad = (found_inf != 0).any(), is_bad.any()
        fine = agreed & ~any_bad & ~overflows
        has = (everyone[:, n_fixed:][:, self._words] >> self._shifts) & 1
        # the least of those that are not 0, and the first worker that has it
        least = torch.where(is_bad, first, self._n_tensors + 1).amin()
        rank = torch.where(
            is_bad & (first == least), torch.arange(len(first), dtype=torch.int64, device=first.device), len(first)
        ).amin()
        # an overflow that a GradScaler found is no error
        reason = torch.where(agreed, torch.where(any_bad & ~overflows, self._worst, _NOTHING), _DISAGREE)
        absent = everyone[:, 0] < 0
        reason = torch.where(absent.any(), _ABSENT, reason)
        rank = torch.where(absent.any(), absent.to(torch.int64).argmax(), rank)
        news = torch.stack([reason, clock, least, rank])
        # what nobody has been told yet is kept
        self.report.copy_(torch.where(self.report[0] == _NOTHING, news, self.report))
        self.skipped.add_((agreed & ~fine).to(torch.int64))
        return (has.amax(0) * fine).to(torch.int32)

    def _apply(
        self,
        rates: Sequence[Rates],
        factors: Sequence[Scalar],
        clock: Tensor,
        tie: Tensor,
        grads: Sequence[Sequence[Tensor]],
        pending: Sequence[Tensor],
        gates: Tensor,
    ) -> None:
        at, totals, rounding = 0, [], self._precision.rounding(clock, self._rank)
        for i, bucket in enumerate(self._buckets):
            now, gate = rates[bucket.group_index], gates[at : at + len(bucket.slots)]
            at += len(bucket.slots)
            if not self._votes:
                step_bucket_(
                    self._params[i],
                    grads[i],
                    bucket.exp_avg,
                    self._starts[i],
                    lr=now.lr,
                    beta1=now.beta1,
                    beta2=now.beta2,
                    weight_decay=now.weight_decay,
                    gate=gate,
                    grad_scale=factors[bucket.group_index],
                    rounding=rounding,
                    tensors=self._numbers[i],
                    impl=self._impl,
                )
                continue
            voted, counts = self._votes[i].finish(pending[i], tie)
            totals.append(counts)
            apply_bucket_(
                self._params[i],
                voted,
                self._starts[i],
                lr=now.lr,
                weight_decay=now.weight_decay,
                grad=grads[i],
                exp_avg=bucket.exp_avg,
                beta2=now.beta2,
                gate=gate,
                grad_scale=factors[bucket.group_index],
                rounding=rounding,
                tensors=self._numbers[i],
                impl=self._impl,
            )
        if totals:
            self.counts.copy_(torch.stack(totals).sum(0) - self._padding)


def _filled(values: Sequence[Scalar], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[n] of numbers and 0-dim tensors; numbers are arguments of the kernels that write them, and not copied."""
    return torch.stack([torch.empty((), dtype=dtype, device=device).fill_(value) for value in values])


def _factor(rates: Rates, scale: Tensor | None) -> Scalar:
    """What gradients are multiplied by: the inverse loss scale, negative where maximized."""
    sign = -1.0 if rates.maximize else 1.0
    return sign if scale is None else sign / scale.double().view(())
