"""The transaction around a step: propose, verify where ranks must, commit or discard, and learn for the next one."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import takewhile

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.base import MomentumOptimizer
from lioncub.buckets import BucketList
from lioncub.collectives.transport import Transport
from lioncub.config import Comm
from lioncub.control import (
    COMMIT,
    NONFINITE,
    OVERFLOW,
    R_STALE,
    R_UNVERIFIED,
    STALE,
    UNVERIFIED,
    Attempt,
    Decision,
    LateReport,
    Report,
)
from lioncub.membership import Membership
from lioncub.overlap import NEVER, Overlap, end_overlap, refuse_with_overlap
from lioncub.params import is_sharded, local_of
from lioncub.payloads import MomentumAverages, SharedScales
from lioncub.replicas import broadcast_tensors
from lioncub.step import Proposal, SentBucket, StepContext, StepEngine
from lioncub.tuning import Plan
from lioncub.watch import Watch

_LOG = logging.getLogger("lioncub")
# seconds that `close` waits for messages to end
_PATIENCE = 5.0
_NO_GRADIENT_TO_SCALE = (
    "GradScaler: expected a gradient on every worker, got none on this one, where its update() would fail and leave "
    "the others waiting; give one parameter a gradient of zeros"
)


class PendingStep:
    """A step whose votes are known and that has changed nothing yet; see `LionCub.propose`.

    ``takes_step`` is False where all ranks skip it, None where the host does not know (with ``capturable``).
    """

    def __init__(self, opt: TransactionalOptimizer, proposal: Proposal, report: Report | None) -> None:
        self._opt, self._proposal, self._report = opt, proposal, report

    @property
    def takes_step(self) -> bool | None:
        """Whether `commit` moves parameters."""
        return None if self._report is None else self._report.reason == COMMIT

    def commit(self) -> None:
        """Apply the step: mutates parameters, momentum and the step counter. No collective."""
        opt, report = self._opt, self._report
        self._check_pending()
        # not a decorator, since a compiler does not trace that of an object which it has traced the making of
        with torch.no_grad():
            opt._commit(self._proposal, report)

    def discard(self, *, advance: bool = True) -> None:
        """Drop the step: only the step counter advances, and the step is counted as skipped. No collective.

        Without ``advance`` it is as if nothing had been proposed: the next step has the same number.
        """
        self._check_pending()
        if advance:
            self._opt._skipped += 1
            self._opt._advance()
        self._opt._finish()

    def _check_pending(self) -> None:
        if not _is_traced() and self._opt._pending is not self:
            raise RuntimeError("commit, discard: expected a step that is pending, got one that has ended")


class TransactionalOptimizer(MomentumOptimizer):
    """Base of `LionCub`: takes the steps of an engine as transactions of all ranks.

    The subclass sets what is declared here; ``_late`` is None but for a capturable optimizer, whose clock is the step
    counter on the device.
    """

    _engine: StepEngine
    _buckets: BucketList
    _members: Membership
    _momentum: MomentumAverages
    _scales: SharedScales
    _comm: Comm
    _device: torch.device
    _clock: Tensor
    _late: LateReport | None
    _on_nonfinite: str

    def _start_transactions(self) -> None:
        """Set what an optimizer starts with: nothing is learned, and nothing is pending."""
        self._overlap: Overlap | None = None
        self._end_overlap: Callable[[], object] = _nothing
        # parameters to broadcast
        self._unequal: list[Tensor] = []
        # loaded or new; interrupted while it wrote
        self._unverified, self._interrupted = True, False
        # when each gradient gets ready, by which buckets are arranged once all ranks know
        self._order_known = False
        self._ready: dict[Tensor, int] | None = None
        self._learned: tuple[dict[Tensor, int] | None, Plan | None] | None = None
        self._pending: PendingStep | None = None
        self._skipped = 0
        self._watch = Watch()

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._members.group

    @property
    def _workers(self) -> int:
        return self._members.workers

    def _compare(self) -> None:
        """Compare what ranks must have in common."""
        raise NotImplementedError

    def _plain(self) -> list[tuple[str, Tensor]]:
        """Return the parameters that are no DTensors."""
        return [(name, param) for name, param in self._named_parameters() if not is_sharded(param)]

    def _propose(self, failure: Exception | None, *, has_closure: bool, abstains: bool = False) -> PendingStep:
        """Run stages 1 to 5, again where votes were stale or parameters had to be verified."""
        is_traced = _is_traced()
        if is_traced:
            if self._unverified:
                raise RuntimeError("expected verify() before a compiled or captured step, since parameters are new")
            if failure is not None:
                raise failure
        else:
            self._check_process_group()
            if self._late is not None:
                self._late.raise_last(self._engine.control)
        # a GradScaler sets both for the duration of its step
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        attempt = Attempt(failure)
        try:
            if self._members.layouts is not None:
                self._watch.compare(self._plain, self._members.deciding)
            proposal, report = self._exchange(attempt, scale, overflow, has_closure, abstains)
            if report is not None and self._late is None:
                self._learn(report)
        except BaseException:
            # one that was proposed before has ended too: other ranks may have gone on
            self._finish()
            raise
        pending = PendingStep(self, proposal, report)
        if not is_traced:
            self._pending = pending
        return pending

    def _exchange(
        self,
        attempt: Attempt,
        scale: Tensor | None,
        overflow: Tensor | int | None,
        has_closure: bool,
        abstains: bool,
    ) -> tuple[Proposal, Report | None]:
        engine, overlap, flags = self._engine, self._overlap, 0
        engine.exposed_seconds = 0.0

        def read() -> StepContext:
            if overlap is not None:
                refuse_with_overlap(has_closure, scale is not None or overflow is not None)
            return self._read_context(scale, overflow, abstains=abstains)

        context = attempt.run(read)
        early: list[SentBucket] = []
        if overlap is not None:
            early, is_stale, first = overlap.take(context, attempt)
            flags = STALE if is_stale else 0
            if first is not None and context is not None and not is_stale:
                context = replace(context, nonfinite=first.nonfinite)
        while True:
            if attempt.failure is not None and self._members.is_alone:
                raise attempt.failure
            current = flags | (UNVERIFIED if self._unverified else 0)
            proposal = engine.exchange(context, attempt, early, current, overflow)
            decision = proposal.decision if isinstance(proposal, Proposal) else proposal
            report = None
            if attempt.failure is not None and self._members.is_alone:
                raise attempt.failure
            if self._late is None or self._unverified:
                report = decision.read()
                if report.reason == R_STALE:
                    early, flags = [], 0
                    continue
                if report.reason == R_UNVERIFIED and self._are_unverified(decision):
                    self._agree()
                    context, early = attempt.run(read), []
                    continue
            self._note(decision, attempt)
            if attempt.failure is not None:
                raise attempt.failure
            if report is not None:
                self._raise_agreed(report, decision)
            assert isinstance(proposal, Proposal)
            return proposal, report

    def _commit(self, proposal: Proposal, report: Report | None) -> None:
        """Run stages 6 and 7."""
        try:
            if report is None or report.reason == COMMIT:
                self._interrupted = True
                self._engine.apply(proposal, None if self._late is not None or report is None else report.n_active)
                self._interrupted = False
                self._is_averaged &= self._workers == 1 or self._momentum.averages_all
                if report is not None and self._late is None:
                    self._watch.note(self._engine, report.n_active)
            else:
                reason = "the gradient scaler found an overflow"
                if report.reason == NONFINITE:
                    reason = str(self._engine.control.nonfinite_error(report, proposal.decision.everyone))
                _LOG.info("step %d skipped on all workers: %s", report.step, reason)
                if self._late is None:
                    self._skipped += 1
            self._advance()
        finally:
            self._finish()

    def _note(self, decision: Decision, attempt: Attempt) -> None:
        """Keep the report of a capturable step for the next one."""
        if self._late is None:
            return
        self._late.note(decision, self._clock)
        if not _is_traced():
            self._late.keep()
            if attempt.failure is not None:
                self._clock.add_(1)

    def _raise_agreed(self, report: Report, decision: Decision) -> None:
        """Raise on all ranks what stops a step."""
        if report.reason > OVERFLOW:
            if self._late is not None:
                self._clock.add_(1)
            raise self._engine.control.disagreement(report, decision.everyone)
        if report.reason == NONFINITE and self._on_nonfinite == "raise" and self._late is None:
            raise self._engine.control.nonfinite_error(report, decision.everyone)

    def _are_unverified(self, decision: Decision) -> bool:
        """Whether all ranks know that parameters must be verified; those of a capturable step know of themselves."""
        return self._late is None or bool(self._engine.control.have_flag(decision.everyone, UNVERIFIED))

    def _read_context(
        self, scale: Tensor | None = None, overflow: Tensor | int | None = None, *, abstains: bool = False
    ) -> StepContext:
        """Check this rank's part of a step, and read what it depends on."""
        step: int | Tensor
        factor: Tensor | float | None = scale
        if self._late is not None:
            step = self._clock
            if not _is_traced() and any(group["step"] is not step for group in self.param_groups):
                raise RuntimeError("step: expected the tensor made at construction, got another; change it in place")
        else:
            step = self._step_count
        if not _is_traced():
            if self._pending is not None:
                raise RuntimeError(
                    "step: expected commit() or discard() of the step that was proposed, got another step"
                )
            self._check_state()
            if overflow is not None and not isinstance(overflow, Tensor):
                # a sum over no devices
                raise RuntimeError(_NO_GRADIENT_TO_SCALE)
            if scale is not None and self._late is None and scale.device.type == "cpu":
                factor = float(scale)
                if not 0 < factor < math.inf:
                    raise ValueError(f"grad_scale: expected a finite scale > 0, got {factor}")
        return self._engine.context(self.param_groups, step, factor, abstains=abstains)

    def _agree(self) -> None:
        """Make new parameters equal, compare all, and carry all buckets from now on: ranks agree on the layout."""
        if not self._members.is_alone:
            self._make_equal()
            self._compare()
        self._engine.agree()
        self._engine.schedule = 0 if self._late is not None else self._step_count
        self._momentum.invalidate()
        self._unverified = False

    def _finish(self) -> None:
        """End a step, taken or not: arrange buckets by what was learned, and watch the next backward."""
        self._pending = None
        if self._learned is not None:
            ready, plan = self._learned
            self._learned = None
            if plan is not None:
                self._members.plan = plan
            if ready is not None:
                self._ready, self._order_known = ready, True
            self._rearrange(self._ready)
            self._engine.agree()
            self._hold()
            if self._overlap is not None:
                self._overlap.send_late()
        if self._late is None:
            self._members.tuner.step_ended()
        if self._overlap is None:
            return
        self._overlap.reset(learn=True)
        if self._order_known and not self._unverified and not self._overlap.sends_early:
            self._overlap.send_early(list(takewhile(lambda bucket: not bucket.is_late, self._buckets.all)))

    def _learn(self, report: Report) -> None:
        """Take from a step that all ranks agree on what `_finish` arranges buckets by; a collective at first."""
        ready = None
        if self._overlap is not None and not self._order_known:
            ready = self._agreed_order()
        plan = self._members.tuner.note(report.microseconds) if self._overlap is None or self._order_known else None
        if ready is not None or plan is not None:
            self._learned = ready, plan

    def _rearrange(self, ready: Mapping[Tensor, int] | None) -> None:
        self._buckets.rearrange(self.param_groups, ready)
        self._momentum.invalidate()
        self._scales.invalidate()

    def _agreed_order(self) -> dict[Tensor, int] | None:
        """Return when each parameter's gradient got ready, on the rank where it did last; a collective.

        A number to sort by, `NEVER` for a parameter without gradient on some rank; None where no rank had any.
        """
        assert self._overlap is not None
        params = [param for _, param in self._named_parameters()]
        mine = torch.tensor(self._overlap.order(params), dtype=torch.int64, device=self._device)
        everyone = Transport(self._members.deciding, self._device).gather(mine).wait()
        latest = everyone.amax(dim=0).tolist()
        return None if min(latest) == NEVER else dict(zip(params, latest, strict=True))

    def _advance(self) -> None:
        if self._late is None:
            super()._advance()
            self._engine.schedule = self._next_step
            return
        self._clock.add_(1)
        if not _is_traced():
            self._late.keep()

    def _start_overlap(self) -> None:
        """Watch gradients, where there is anyone to send their codes to."""
        if not self._members.overlap or self._workers == 1:
            return
        # referred to by name, they would be collected late, and their end would come at another time on every rank
        me, engine = weakref.proxy(self), weakref.proxy(self._engine)
        self._overlap = self._engine.overlap = Overlap(self._device, me, engine)
        self._end_overlap = weakref.finalize(self, end_overlap, self._overlap.comm, self._overlap.hooks)
        self._overlap.watch([slot.param for *_, slot in self._buckets.slots])
        self._order_known = False

    def _stop_overlap(self) -> bool:
        """End what watches gradients; whether all that it sent has been answered."""
        self._end_overlap()
        overlap, self._overlap, self._engine.overlap = self._overlap, None, None
        return overlap is None or overlap.comm.join(_PATIENCE)

    def _make_equal(self) -> None:
        if self._comm.broadcast and not self._members.is_alone:
            with self._members.agreeing(self._device):
                if self._workers > 1:
                    broadcast_tensors(map(local_of, self._unequal), group=self._group)
        self._unequal = []

    def _check_state(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "an earlier step was interrupted while it wrote parameters, so replicas may differ: load a checkpoint"
            )
        self._check_held()

    def _check_process_group(self) -> None:
        if self._workers == 1 and dist.is_initialized() and self._group is None and dist.get_world_size() > 1:
            raise RuntimeError(
                "process_group: expected torch.distributed to be initialised before LionCub is built, got a group of "
                f"{dist.get_world_size()} workers that came later: this optimizer would not communicate"
            )


def _is_traced() -> bool:
    """Whether a compiler traces this code, or a CUDA graph captures it."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _nothing() -> None:
    pass
