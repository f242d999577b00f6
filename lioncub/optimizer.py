"""LionCub: Lion for data-parallel training, with one bit per parameter on the wire."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lioncub.applying import plan_bucket
from lioncub.arguments import Hyperparameters, check_count, check_flag, hint_of_shards, refuse_shards
from lioncub.arrangement import Arrangement
from lioncub.base import MomentumOptimizer, Params
from lioncub.buckets import Bucket, bucket_bytes_of
from lioncub.capturable import FAILED as FAILED_WORD
from lioncub.capturable import UNVERIFIED as UNVERIFIED_WORD
from lioncub.capturable import CapturableStep, Rates, check_capturable, keep_tensors
from lioncub.collectives import Voter, WorkersDisagreeError, handshake
from lioncub.collectives.average import average_agreed_
from lioncub.collectives.errors import by_value
from lioncub.collectives.handshake import telling
from lioncub.collectives.header import UNVERIFIED
from lioncub.compression import AnyCompression, check_compression, default_compression
from lioncub.courier import Courier
from lioncub.explaining import Explanation
from lioncub.kernels import resolve_impl
from lioncub.momentum_sync import MomentumSync, check_momentum_sync
from lioncub.overlap import Overlap, check_devices, end_overlap, refuse_with_overlap
from lioncub.precision import Precision
from lioncub.replicas import broadcast_tensors, check_equal
from lioncub.shared_scales import NOT_AGREED, SharedScales
from lioncub.stats import Stats
from lioncub.synchronizing import NOT_MEASURED, Synchronizer
from lioncub.voting import (
    NO_GRADIENT_TO_SCALE,
    BucketVote,
    Draft,
    NonFiniteError,
    Verdict,
    alone,
    exchange,
    judge,
)
from lioncub.wiring import PathOrProfile, Wiring, destroy_groups

_LOG = logging.getLogger("lioncub")
# seconds that `close` waits for messages to end
_PATIENCE = 5.0
# what all workers raise in one and the same step
_AGREED_ERRORS = (WorkersDisagreeError, NonFiniteError)
_NOT_CAPTURABLE = (
    "capturable: expected LionCub(capturable=True) for a step that torch.compile traces, got False: an ordinary step "
    "waits for other workers"
)
# between measurements of drift, where it decides what is synchronized
_DRIFT_EVERY = 100


class LionCub(MomentumOptimizer):
    """Lion whose workers agree by majority vote on packed signs (Lion Cub, arXiv 2411.16462).

    Every worker keeps its own gradients and momentum, votes with the sign of its update, and moves by the majority:
    ``p = p*(1 - lr*wd) - lr*(+1 or -1)``. Replicas stay bit-identical. A step is taken by all workers or by none. One
    worker alone takes plain Lion steps, bit for bit those of `Lion`.

    Construction is a collective call (a handshake, then the broadcast), `step` too. The model is not wrapped in
    DistributedDataParallel, or is handed to `keep_gradients_local`. docs/numerics.md has the rules in full.

    Args:
        params: dense fp32, bf16 or fp16 parameters of any dense strides, named ones, or param groups.
        lr: learning rate, as in `Lion`; like betas and weight_decay those of every group are read at each step.
        betas: (beta1, beta2) of the update and of the momentum, as in `Lion`.
        weight_decay: decoupled weight decay, as in `Lion`.
        compression: what workers say about their updates, and what all make of it: `SignVote`, `SignMean`,
            `TernaryVote`, `Quantized`, or `BySize`, which has two of them; a param group can have one of its own.
            Unless given, ``BySize()``: tensors of at most 1024 elements by 8-bit levels, all others by `SignVote`; with
            ``capturable``, for one worker and for more than 258, `SignVote` for all.
        momentum_sync: when momentum, which drifts apart since every worker sees its own gradients, is averaged over
            workers; never unless a `MomentumSync` says when.
        drift_every: steps between measurements of how far momentum has drifted apart, for `stats` and
            ``MomentumSync(select="auto")``; 100 for that, else never.
        process_group: workers that vote together; the default group, or one worker where there is none.
        algorithm: "all_gather", "reduce_scatter", "hierarchical", "all_reduce" or "auto": for each bucket the one that
            the cost model finds fastest; `explain` shows why.
        mesh: a DeviceMesh of shape [nodes, workers per node]; else "auto" and "hierarchical" find the nodes by host
            names and LOCAL_WORLD_SIZE.
        profile: what ``lioncub probe`` measured of this group, as a path or a `Profile`, for the cost model.
        bucket_mb: largest message, in MiB of packed votes (1 MiB is 8.4 M parameters); unless given, the model chooses.
        overlap: send each bucket's votes while backward computes the next gradients. The result is the same, bit for
            bit; gradients must not be changed between backward and step.
        capturable: never wait for a device within `step`, so that torch.compile traces it whole and a CUDA graph
            captures it: errors are raised by the next step, or by `raise_errors`. For sign votes alone, without
            overlap and synchronization; lr can be a 0-dim tensor that is changed in place.
        broadcast: start from the parameters of the group's first rank.
        on_nonfinite: where any gradient, momentum or update of any worker is not finite, "raise" NonFiniteError on
            all workers or "skip" the step on all.
        maximize: ascend instead of descend.
        param_rounding: of bf16 and fp16 parameters: "nearest", or "stochastic", up or down at random so that steps
            smaller than their spacing add up on average; no memory, no state.
        master_weights: keep bf16 and fp16 parameters in fp32 too, in ``state[p]["master"]``, and move those.
        momentum_dtype: torch.float32 or torch.bfloat16; the latter is rounded as ``param_rounding`` says.
        rounding_seed: of stochastic rounding.
        impl: kernels to use: "auto", "triton", "cpu" or "reference".

    Raises ValueError or TypeError for arguments that are impossible, WorkersDisagreeError on all workers where their
    parameters or options differ.
    """

    _optional_state: ClassVar[dict[str, float]] = {"drift": NOT_MEASURED, "scale": NOT_AGREED}
    # GradScaler hands over grad_scale and found_inf instead of skipping the step on one worker alone
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        compression: AnyCompression | None = None,
        momentum_sync: MomentumSync | None = None,
        drift_every: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        algorithm: str = "auto",
        mesh: DeviceMesh | None = None,
        profile: PathOrProfile | None = None,
        bucket_mb: float | None = None,
        overlap: bool = False,
        capturable: bool = False,
        broadcast: bool = True,
        on_nonfinite: str = "raise",
        maximize: bool = False,
        param_rounding: str = "nearest",
        master_weights: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        rounding_seed: int = 0,
        impl: str = "auto",
    ) -> None:
        # construction is a collective call: where it fails on one worker alone, the others must know
        with _telling(process_group):
            precision = Precision(
                param_rounding=param_rounding,
                master_weights=master_weights,
                momentum_dtype=momentum_dtype,
                rounding_seed=rounding_seed,
            )
            if on_nonfinite not in ("raise", "skip"):
                raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
            check_flag("broadcast", broadcast)
            check_flag("capturable", capturable)
            bucket_bytes = None if bucket_mb is None else bucket_bytes_of(bucket_mb)
            # one for each param group; not in the groups, since a checkpoint fits any
            self._compressions: list[AnyCompression] = []
            policy = check_momentum_sync(momentum_sync)
            if drift_every is None and policy is not None and policy.is_auto:
                drift_every = _DRIFT_EVERY
            if drift_every is not None:
                check_count("drift_every", drift_every, "a number of steps")
            self._policy, self._drift_every = policy, drift_every
            self._wiring = Wiring(process_group, algorithm, mesh, profile, overlap, impl)
            self._group, self._workers = process_group, self._wiring.workers
            if compression is None:
                compression = default_compression(self._workers, votes_only=capturable)
            self._compression = check_compression(compression)
            self._broadcast, self._on_nonfinite = broadcast, on_nonfinite
            self._overlap: Overlap | None = None
            self._courier: Courier | None = None
            self._end_overlap: Callable[[], object] = _nothing
            # parameters to broadcast, and the number of buckets that all workers are known to have
            self._unequal: list[Tensor] = []
            self._agreed = 0
            self._unverified, self._interrupted = True, False
            self._seconds: list[float] = []
            self._exposed = 0.0
            self._skipped = 0
            self._counts = (0, 0)
            self._is_built = self._is_closed = False
            super().__init__(params, lr, betas, weight_decay, maximize, impl, precision)
            if not self._named_parameters():
                raise ValueError("params: expected at least one parameter, got none")
            device = self._named_parameters()[0][1].device
            devices = sorted({str(param.device) for _, param in self._named_parameters()})
            if overlap:
                check_devices(devices)
            self._capturable = capturable
            self._capturable_step: CapturableStep | None = None
            if capturable:
                check_capturable(self._wiring, devices, self._compressions, policy, drift_every)
                self._clock = torch.zeros((), dtype=torch.int64, device=device)
                self.param_groups[0]["step"] = self._clock
            facts = self._facts(bucket_mb)
        if self._workers > 1:
            self._shake_hands(facts, device)
            self._connect(device)
        self._arrangement = Arrangement(
            self._wiring, bucket_bytes, self.state, self._compressions, precision.momentum_dtype
        )
        routes = self._wiring.routes.group if self._workers > 1 else None
        self._sync = Synchronizer(
            policy, drift_every, self._arrangement, self.state, routes, self._workers, self._overlap is not None
        )
        self._scales = SharedScales(self._arrangement, self.state, routes, self._workers)
        self._is_built = True
        self._add_buckets(range(len(self.param_groups)))
        self._make_equal()
        self._agreed = len(self._buckets)
        if capturable:
            self.verify()
        self._hold()
        self._announce()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with momentum of its own, on all workers before the same step.

        It communicates nothing: the next step finds out whether all workers added the same, and makes the new
        parameters equal. Where the group is refused, nothing has changed. Its "compression" is that of `LionCub` unless
        it has one.
        """
        self._check_open()
        compression = self._compression
        if isinstance(param_group, dict) and "compression" in param_group:
            param_group = dict(param_group)
            compression = check_compression(param_group.pop("compression"))
        self._compressions.append(compression)
        try:
            super().add_param_group(param_group)
        except BaseException:
            self._compressions.pop()
            raise

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it, backward sends no votes, because more gradients will be added before the step.

        For all but the last backward of a step with ``overlap``, as DDP's ``no_sync``; without overlap it does nothing.
        """
        if self._overlap is None:
            yield
            return
        self._overlap.paused += 1
        try:
            yield
        finally:
            self._overlap.paused -= 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as in `torch.optim.Optimizer`."""
        super().zero_grad(set_to_none)
        if self._overlap is not None:
            self._overlap.restart()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on all workers or on none; gives the closure's loss. A collective call.

        Mutates parameters and momentum, after every vote and status is known. Raises NonFiniteError (or skips, by
        ``on_nonfinite``; under a GradScaler an overflow always skips) and WorkersDisagreeError on all workers alike.
        """
        self._check_open()
        if torch.compiler.is_compiling() and not self._capturable:
            _refuse_to_compile()
        self._check_process_group()
        loss, failure = None, None
        if closure is not None and self._overlap is None:
            try:
                with torch.enable_grad():
                    loss = closure()
            except Exception as error:
                # raised when the other workers have been told
                failure = error
        try:
            if self._capturable:
                self._take_capturable_step(failure)
            else:
                self._take_step(failure, has_closure=closure is not None)
        except Exception:
            # a GradScaler takes these back only after a step that returns; left behind, they would scale the next one
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this worker, bit for bit; the next step compares all workers' parameters by hash.

        Raises ValueError or TypeError, with nothing changed, where groups, shapes or dtypes do not fit.
        """
        self._check_open()
        kept = [{name: value for name, value in g.items() if isinstance(value, Tensor)} for g in self.param_groups]
        try:
            super().load_state_dict(state_dict)
            if self._capturable:
                keep_tensors(self.param_groups, kept)
            self._interrupted = False
        finally:
            # a user's hook can raise when the state has been loaded
            self._unverified = True
            self._sync.forget()
            self._scales.forget()
            if self._overlap is not None:
                self._overlap.end()

    def stats(self) -> Stats:
        """What the last step cost and how its votes fell; see `Stats`."""
        self._check_open()
        elements = max(sum(bucket.elements for bucket in self._buckets), 1)
        buckets, skipped = self._arrangement.stats(self._seconds), self._skipped
        sent = self._sync.bytes_sent + self._scales.bytes_sent
        if self._capturable_step is not None:
            buckets = self._capturable_step.stats(buckets)
            sent = self._capturable_step.control_bytes_sent
            self._counts, skipped = self._capturable_step.counted()
        return Stats(
            steps=self._step_count,
            skipped_steps=skipped,
            bytes_sent_per_step=sum(bucket.bytes_sent for bucket in buckets) + sent,
            sync_bytes_sent=self._sync.bytes_sent,
            communication_seconds=sum(bucket.seconds for bucket in buckets) + self._sync.seconds,
            exposed_seconds=self._exposed,
            tied=self._counts[0] / elements,
            unanimous=self._counts[1] / elements,
            drift=self._sync.drift(),
            buckets=buckets,
        )

    def explain(self) -> Explanation:
        """Which way each bucket travels and why: what every algorithm would send and is predicted to take.

        Printed, it is a table; it communicates nothing.
        """
        self._check_open()
        return self._arrangement.explain()

    def verify(self) -> None:
        """Make sure that all workers have the same layout and parameters; a collective call.

        A step does it by itself after construction, `load_state_dict` and `add_param_group`, unless it is compiled or
        captured. Raises WorkersDisagreeError on all workers where they differ.
        """
        self._check_open()
        if self._workers > 1:
            facts = {"the bucket layout": self._arrangement.layout, "the step": self._step_count}
            handshake(facts, group=self._group, device=self._buckets[0].device)
            self._make_equal()
            self.check_replicas()
        if self._capturable:
            self._refresh_masters()
            # what has not been told yet can only be told by the names of then
            self.raise_errors()
            before = self._capturable_step
            reports = self._on_nonfinite == "raise"
            self._capturable_step = self._arrangement.capturable_step(
                reports, self._precision, self._masters, self._impl
            )
            if before is not None:
                self._capturable_step.skipped.copy_(before.skipped)
        self._unverified, self._agreed = False, len(self._buckets)

    def raise_errors(self) -> None:
        """With ``capturable``, raise what went wrong in steps since it was last asked; waits for the device.

        NonFiniteError or WorkersDisagreeError, on all workers alike; no worker changed anything in such a step.
        """
        if self._capturable_step is not None:
            self._capturable_step.raise_report(self._capturable_step.report)

    def check_replicas(self) -> None:
        """Verify that all workers' parameters, and masters, are bit-identical; a collective call.

        Raises WorkersDisagreeError on all workers, naming the first parameter that differs.
        """
        self._check_open()
        if self._workers > 1:
            self._refresh_masters()
            named = self._named_parameters()
            check_equal([*named, *self._masters.named(named)], group=self._group)

    def sync_momentum(self) -> None:
        """Average momentum over workers, summed in rank order, so that all hold the same bits; a collective call.

        Before `state_dict`, it makes one worker's file serve any number of workers.
        """
        self._check_open()
        if self._workers > 1:
            handshake(
                {"the bucket layout": self._arrangement.layout}, group=self._group, device=self._buckets[0].device
            )
            for bucket in self._buckets:
                mean = bucket.exp_avg.float()
                average_agreed_(mean, group=self._group)
                bucket.exp_avg.copy_(mean)

    def close(self) -> None:
        """End the thread of ``overlap``, the hooks on parameters and the process groups that were made for this.

        On all workers, when no step or backward is under way. Parameters, state and `state_dict` remain; all else
        raises RuntimeError afterwards. Closing twice does nothing. An optimizer that is collected is closed too, but
        that its groups on backends other than Gloo last until destroy_process_group.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._end_overlap()
        ended = self._courier is None or self._courier.join(_PATIENCE)
        # with what refers to them, their threads and sockets end
        self._overlap = self._courier = self._capturable_step = None
        groups = self._wiring.own_groups
        del self._wiring, self._arrangement, self._sync, self._scales
        if not ended:
            raise RuntimeError(
                "close: expected no votes under way, got some that other workers have not answered; they end with the "
                "process group's timeout"
            )
        destroy_groups(groups)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LionCub cannot be copied or pickled, since its process group cannot; use state_dict()")

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("LionCub: expected an open optimizer, got one after close()")

    def _shake_hands(self, facts: dict[str, object], device: torch.device) -> None:
        try:
            handshake(facts, group=self._group, device=device)
        except WorkersDisagreeError as error:
            raise WorkersDisagreeError(f"{error}{hint_of_shards(str(error))}") from None

    def _connect(self, device: torch.device) -> None:
        """Make process groups and what overlaps; their end comes with this optimizer's."""
        self._wiring.connect(device)
        if self._wiring.overlap:
            self._courier, me = Courier(device), weakref.ref(self)

            # referred to by name, it would be collected late, and its end would come at another time on every worker
            def opt() -> LionCub:
                found = me()
                assert found is not None
                return found

            # the synchronizer is made later, and an average follows a vote
            self._overlap = Overlap(
                self._courier, lambda: opt()._new_draft(), lambda *what: opt()._sync.follower(*what)
            )
            self._end_overlap = weakref.finalize(self, end_overlap, self._courier, self._overlap.hooks)
        if self._wiring.ends_alone:
            # at exit the interpreter ends them anyhow
            weakref.finalize(self, destroy_groups, self._wiring.own_groups).atexit = False

    @property
    def _buckets(self) -> list[Bucket]:
        return self._arrangement.buckets

    @property
    def _voters(self) -> list[Voter]:
        return self._arrangement.voters

    def _check_last_group(self) -> None:
        super()._check_last_group()
        refuse_shards(self._named_parameters(), are_broadcast=self._broadcast and self._workers > 1)

    def _create_state(self, group_index: int) -> None:
        # at construction all groups are laid out together, when it is known how their votes will travel
        if self._is_built:
            self._add_buckets(range(group_index, group_index + 1))

    def _add_buckets(self, groups: range) -> None:
        """Lay out new groups; where it raises, nothing has changed."""
        params = self._arrangement.append(self.param_groups, groups)
        if self._sync.measures:
            for param in params:
                self.state[param]["drift"] = torch.full((), NOT_MEASURED, dtype=torch.float32, device=param.device)
        self._scales.add(groups)
        self._sync.forget()
        for i in groups:
            # with capturable, one tensor that all groups share
            self.param_groups[i]["step"] = self.param_groups[0]["step"]
        self._unequal += params
        self._unverified, self._order_known = True, False
        if self._overlap is not None:
            self._overlap.watch(params)
            self._overlap.end()

    def _learn_order(self) -> None:
        """Agree on the order in which gradients get ready, and arrange the buckets by it; a collective call."""
        assert self._overlap is not None
        params = [slot.param for bucket in self._buckets for slot in bucket.slots]
        ready = self._overlap.agreed_order(params, self._group)
        if ready is not None:
            self._arrangement.reorder(self.param_groups, ready)
            self._hold()
            self._sync.forget()
            self._scales.forget()
            self._agreed, self._order_known, self._seconds = len(self._buckets), True, []

    def _facts(self, bucket_mb: float | None) -> dict[str, object]:
        """What workers must have in common, by the names that an error gives it."""
        facts: dict[str, object] = {
            "the number of parameters": len(self._named_parameters()),
            **self._wiring.facts(),
            "bucket_mb": None if bucket_mb is None else float(bucket_mb),
            "capturable": self._capturable,
            "compression": list(self._compressions),
            "drift_every": self._drift_every,
            **({} if self._policy is None else self._policy.facts(self._named_parameters())),
            "broadcast": self._broadcast,
            "on_nonfinite": self._on_nonfinite,
            **self._precision.facts(),
        }
        groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        for i, (group_index, (name, p)) in enumerate(zip(groups, self._named_parameters(), strict=True)):
            facts[f"parameter {i}"] = (
                f"{name} of {p.dtype}, shape {tuple(p.shape)}, strides {p.stride()}, group {group_index}"
            )
        return facts

    def _make_equal(self) -> None:
        if self._broadcast and self._workers > 1:
            broadcast_tensors(self._unequal, group=self._group)
        self._unequal = []

    def _check_process_group(self) -> None:
        if self._workers == 1 and dist.is_initialized() and self._group is None and dist.get_world_size() > 1:
            raise RuntimeError(
                "process_group: expected torch.distributed to be initialised before LionCub is built, got a group of "
                f"{dist.get_world_size()} workers that came later: this optimizer would not communicate"
            )

    def _new_draft(self) -> Draft:
        """The draft of the step to come, with the state and the hyperparameters as they are now."""
        flags = UNVERIFIED if self._unverified else 0
        layout = self._arrangement.layout
        draft = Draft(self._next_step, layout, flags, self._wiring.rank, self._workers, self._impl, self._scales.of)

        def read() -> None:
            self._check_state()
            draft.step = self._step_count
            draft.layout = self._sync.agreed(layout)
            draft.read(self.param_groups)

        draft.attempt(read)
        return draft

    def _take_step(self, failure: Exception | None, *, has_closure: bool) -> None:
        draft = self._new_draft()
        draft.failure = failure or draft.failure
        # a GradScaler sets both for the duration of its step
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._overlap is not None:
            draft.attempt(lambda: refuse_with_overlap(has_closure, scale is not None or overflow is not None))
            self._overlap.exposed_seconds = 0.0
        draft.attempt(lambda: draft.unscale(scale, overflow))
        try:
            self._vote_and_apply(draft)
            if self._overlap is not None and not self._order_known:
                self._learn_order()
        except Exception as error:
            # where all workers are there and raise, what they have sent is waited for; else it would be in the way
            if self._overlap is not None and (isinstance(error, _AGREED_ERRORS) or error is draft.failure):
                self._overlap.drop_averages()
            raise
        finally:
            if self._overlap is not None:
                self._overlap.reset(learn=True)
                if self._order_known and not self._unverified and not self._overlap.has_begun:
                    self._overlap.begin(self._buckets, self._voters)

    def _vote_and_apply(self, draft: Draft) -> None:
        votes = self._vote(draft)
        verdict = judge(self._buckets, votes)
        self._seconds = [vote.seconds for vote in votes]
        self._exposed = sum(self._seconds) if self._overlap is None else self._overlap.exposed_seconds
        if verdict.found_inf or verdict.nonfinite is not None:
            if self._overlap is not None:
                self._overlap.drop_averages()
            self._pass_over(draft.step, verdict.found_inf, verdict.nonfinite)
        else:
            self._apply(votes, verdict, draft)

    def _take_capturable_step(self, failure: Exception | None) -> None:
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            if self._unverified:
                raise RuntimeError("expected verify() before a compiled or captured step, since parameters are new")
            if failure is not None:
                raise failure
        else:
            self._prepare_capturable_step(failure)
        assert self._capturable_step is not None
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        rates = [Rates.of(group) for group in self.param_groups]
        self._capturable_step.run(rates, self.param_groups[0]["step"], scale, overflow)

    def _prepare_capturable_step(self, failure: Exception | None) -> None:
        """Raise what an earlier step reported, and what would go wrong on this worker, when the others know of it."""
        step = self._capturable_step
        assert step is not None
        step.raise_last()
        if self._unverified:
            if self._workers > 1:
                words = step.tell(UNVERIFIED_WORD, self._clock)
                if set(words) != {UNVERIFIED_WORD}:
                    self._clock.add_(1)
                    news = ["loaded or new" if word == UNVERIFIED_WORD else "as they were" for word in words]
                    raise WorkersDisagreeError(
                        f"workers disagree on whether state or param groups are {by_value(news)}"
                    )
            self.verify()
            step = self._capturable_step
            assert step is not None
        try:
            if failure is not None:
                raise failure
            self._check_state()
            if any(group["step"] is not self._clock for group in self.param_groups):
                raise RuntimeError("step: expected the tensor made at construction, got another; change it in place")
            for group in self.param_groups:
                Hyperparameters.check_known(group)
            if (overflow := getattr(self, "found_inf", None)) is not None and not isinstance(overflow, Tensor):
                raise RuntimeError(NO_GRADIENT_TO_SCALE)
            step.check_unchanged()
            self._refresh_masters()
        except Exception:
            if self._workers > 1:
                step.tell(FAILED_WORD, self._clock)
                self._clock.add_(1)
            raise

    def _apply(self, votes: Sequence[BucketVote], verdict: Verdict, draft: Draft) -> None:
        means = self._sync.run(votes, verdict, draft)
        self._scales.run(votes, draft)
        self._refresh_masters()
        rounding = self._precision.rounding(draft.step, draft.rank)
        moves = [
            plan_bucket(bucket, vote, mean, taking_part, draft, self._masters, rounding)
            for bucket, vote, mean, taking_part in zip(self._buckets, votes, means, verdict.taking_part, strict=True)
        ]
        self._interrupted = True
        for move in moves:
            move()
        self._counts = sum(vote.ties for vote in votes), sum(vote.unanimous for vote in votes)
        self._advance()
        self._interrupted = False

    def _vote(self, draft: Draft) -> list[BucketVote]:
        """Exchange all buckets: first those that all workers are known to have, then those of groups added since."""
        if self._workers == 1:
            return alone(self._buckets, draft)
        vote = exchange if self._overlap is None else self._overlap.vote
        known = self._agreed
        votes = vote(self._buckets[:known], self._voters[:known], draft)
        if any(header.flags & UNVERIFIED for vote in votes for header in vote.headers):
            # by now all have the same layout and know that some worker's parameters may be new or loaded
            self._make_equal()
            self.check_replicas()
            self._unverified, self._agreed = False, len(self._buckets)
            draft.flags &= ~UNVERIFIED
        return votes + vote(self._buckets[known:], self._voters[known:], draft)

    def _check_state(self) -> None:
        if self._interrupted:
            raise RuntimeError(
                "an earlier step was interrupted while it wrote parameters, so replicas may differ: load a checkpoint"
            )
        self._check_held()

    def _pass_over(self, step: int, found_inf: bool, nonfinite: str | None) -> None:
        """Skip the step on all workers, or raise on all."""
        if not found_inf and self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"step {step}: a gradient, momentum or update is not finite, first in {nonfinite}; no worker changed "
                "anything"
            )
        _LOG.info("step %d skipped on all workers: %s", step, nonfinite or "the gradient scaler found an overflow")
        self._skipped += 1
        self._advance()

    def _announce(self) -> None:
        if self._wiring.rank != 0:
            return
        impls = sorted({resolve_impl(self._impl, bucket.device) for bucket in self._buckets})
        stats = self.stats()
        _LOG.info(
            "LionCub: %d worker(s), %s kernels, %d bucket(s) by %s, %d bytes sent per worker and step",
            self._workers,
            "+".join(impls),
            len(self._buckets),
            "+".join(sorted({bucket.algorithm for bucket in stats.buckets})),
            stats.bytes_sent_per_step,
        )


def _telling(group: dist.ProcessGroup | None) -> AbstractContextManager[object]:
    """`telling`, where there is anybody to tell."""
    is_there = dist.is_initialized() if group is None else isinstance(group, dist.ProcessGroup)
    return telling(group) if is_there else contextlib.nullcontext()


# called, not traced: an error that is raised while a compiler traces makes it run the step as it is, in pieces
@torch.compiler.disable(reason=_NOT_CAPTURABLE)  # type: ignore[no-untyped-call, untyped-decorator]
def _refuse_to_compile() -> None:
    raise RuntimeError(_NOT_CAPTURABLE)


def _nothing() -> None:
    pass
