"""LionCub: Lion for data-parallel training, with one bit per parameter on the wire."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from lioncub.arguments import check_count, check_flag, hint_of_shards, refuse_shards, refuse_zero
from lioncub.base import AVERAGED, Params
from lioncub.buckets import BucketList
from lioncub.collectives import WorkersDisagreeError, handshake
from lioncub.collectives.agreement import informing
from lioncub.collectives.average import average_agreed_
from lioncub.collectives.groups import destroy_groups
from lioncub.collectives.transport import is_listed, world_size_of
from lioncub.compression import AnyCompression, BySize, check_compression, default_compression
from lioncub.config import Comm, Precision, check_config, refuse_unknown
from lioncub.control import (
    LateReport,
)
from lioncub.kernels import resolve_impl
from lioncub.membership import Membership, check_capturable
from lioncub.momentum_sync import MomentumSync, check_momentum_sync
from lioncub.overlap import check_devices
from lioncub.params import Meshes, describe, local_of, locals_of
from lioncub.payloads import NOT_AGREED, NOT_MEASURED, Drift, MomentumAverages, SharedScales
from lioncub.replicas import check_equal
from lioncub.state import keep_tensors
from lioncub.stats import Explanation, Stats, explain, stats_of
from lioncub.step import StepEngine
from lioncub.transaction import PendingStep, TransactionalOptimizer

_LOG = logging.getLogger("lioncub")
_NOT_CAPTURABLE = (
    "capturable: expected LionCub(capturable=True) for a step that torch.compile traces, got False: an ordinary step "
    "waits for other workers"
)
# between measurements of drift, where it decides what is synchronized
_DRIFT_EVERY = 100


class LionCub(TransactionalOptimizer, Joinable):
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
        compression: the codes of updates and of their result: `SignVote`, `SignMean`,
            `TernaryVote`, `Quantized`, or `BySize`, which has two of them; a param group can have its own.
            Unless given, ``BySize()``: tensors of at most 1024 elements by 8-bit levels, all others by `SignVote`;
            for one worker and for more than 258, `SignVote` for all.
        momentum_sync: when momentum, which drifts apart since every worker sees its own gradients, is averaged over
            ranks; never unless a `MomentumSync` is given.
        process_group: workers that vote together; the default group, or one worker where there is none.
        overlap: send each bucket's votes while backward computes the next gradients. The result is the same, bit for
            bit; gradients must not be changed between backward and step.
        capturable: never wait for a device within `step`, so that torch.compile traces it whole and a CUDA graph
            captures it: errors are raised by the next step, or by `raise_errors`. Without overlap, and of momentum
            synchronization only that of every step; lr can be a 0-dim tensor that is changed in place.
        comm: how ranks communicate: algorithm, nodes, profile, sizes of buckets; see `Comm`.
        precision: rounding, master weights and the dtype of momentum; see `Precision`.
        on_nonfinite: where any gradient, momentum or update of any rank is not finite, "raise" NonFiniteError on all
            ranks or "skip" the step on all.
        maximize: ascend instead of descend.
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
        process_group: dist.ProcessGroup | None = None,
        overlap: bool = False,
        capturable: bool = False,
        comm: Comm = Comm(),  # noqa: B008
        precision: Precision = Precision(),  # noqa: B008
        on_nonfinite: str = "raise",
        maximize: bool = False,
        impl: str = "auto",
        **unknown: Any,
    ) -> None:
        params = _as_list(params)
        meshes = Meshes(_tensors_of(params))
        # construction is a collective: where it fails on one rank alone, the others must know
        with _informing(process_group, meshes):
            refuse_unknown("LionCub", unknown)
            refuse_zero()
            check_config("comm", comm, Comm)
            check_config("precision", precision, Precision)
            if on_nonfinite not in ("raise", "skip"):
                raise ValueError(f"on_nonfinite: expected 'raise' or 'skip', got {on_nonfinite!r}")
            check_flag("broadcast", comm.broadcast)
            check_flag("capturable", capturable)
            policy, drift_every = check_momentum_sync(momentum_sync), comm.drift_every
            if drift_every is None and policy is not None and policy.is_auto:
                drift_every = _DRIFT_EVERY
            if drift_every is not None:
                check_count("drift_every", drift_every, "a number of steps")
            self._policy, self._drift_every = policy, drift_every
            self._members = Membership(process_group, comm, overlap, impl, meshes)
            # for copies of an optimizer that is alone
            self._options = {
                "compression": compression,
                "momentum_sync": momentum_sync,
                "overlap": overlap,
                "capturable": capturable,
                "comm": comm,
                "precision": precision,
                "on_nonfinite": on_nonfinite,
                "impl": impl,
            }
            self._given_compression = compression
            # one for each param group; not in the groups, since a checkpoint fits any
            self._compressions: list[AnyCompression] = []
            # the same for any number of ranks
            self._configured: list[AnyCompression] = []
            self._capturable = capturable
            self._compression = check_compression(compression or self._default_compression())
            self._comm, self._on_nonfinite = comm, on_nonfinite
            Joinable.__init__(self)
            self._start_transactions()
            self._is_averaged, self._own_state = True, self._members.own_state
            self._is_built = self._is_closed = False
            self._offloaded: list[tuple[Tensor, Tensor]] | None = None
            super().__init__(params, lr, betas, weight_decay, maximize, impl, precision)
            if not self._named_parameters():
                raise ValueError("params: expected at least one parameter, got none")
            self._device = local_of(self._named_parameters()[0][1]).device
            devices = sorted({str(param.device) for _, param in locals_of(self._named_parameters())})
            if overlap:
                check_devices(devices)
            self._late: LateReport | None = None
            if capturable:
                check_capturable(self._members, devices, policy, drift_every)
                self._late = LateReport(self._device, raises=on_nonfinite == "raise")
                self._clock = torch.zeros((), dtype=torch.int64, device=self._device)
                self.param_groups[0]["step"] = self._clock
            fingerprint = self._fingerprint()
        self._shake_hands(fingerprint)
        self._buckets = BucketList(
            self.state, self._compressions, precision.momentum_dtype, self._members.choose_bucket_bytes, meshes
        )
        self._drift = Drift(drift_every, self._buckets, self.state)
        self._momentum = MomentumAverages(policy if self._workers > 1 else None, self._buckets, self._drift)
        self._scales = SharedScales(self._buckets, self.state, self._configured, capturable=capturable)
        self._is_built = True
        self._add_buckets(range(len(self.param_groups)))
        self._engine = StepEngine(
            self._buckets,
            self._members,
            self._masters,
            precision,
            self._momentum,
            self._drift,
            self._scales,
            impl=impl,
            capturable=capturable,
        )
        self._start_overlap()
        self._make_equal()
        if capturable:
            self.verify()
        self._hold()
        self._announce()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all ranks before the same step.

        It communicates nothing: the next step finds out whether all workers added the same, and makes the new
        parameters equal. Where the group is refused, nothing has changed. Its "compression" is that of `LionCub` unless
        it has one.
        """
        self._check_open()
        self._check_in_place()
        compression, configured = self._compression, self._given_compression or BySize()
        if isinstance(param_group, dict) and "compression" in param_group:
            param_group = dict(param_group)
            compression = configured = check_compression(param_group.pop("compression"))
        self._compressions.append(compression)
        self._configured.append(configured)
        try:
            super().add_param_group(param_group)
        except BaseException:
            self._compressions.pop()
            self._configured.pop()
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
            self._overlap.invalidate()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step on all ranks or on none; returns the closure's loss. A collective: `propose`, then `commit`.

        Mutates parameters and momentum, after all votes and the decision are known. Raises NonFiniteError (or skips, by
        ``on_nonfinite``; under a GradScaler an overflow always skips) and WorkersDisagreeError on all ranks.
        """
        self._check_open()
        if torch.compiler.is_compiling() and not self._capturable:
            _refuse_to_compile()
        if not torch.compiler.is_compiling():
            Join.notify_join_context(self)
        loss, failure = None, None
        if closure is not None and self._overlap is None:
            try:
                with torch.enable_grad():
                    loss = closure()
            except Exception as error:
                # raised when the other ranks have been informed
                failure = error
        try:
            self._propose(failure, has_closure=closure is not None).commit()
        except Exception:
            # a GradScaler takes these back only after a step that returns; left behind, they would scale the next one
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise
        return loss

    @torch.no_grad()
    def propose(self, *, abstain: bool = False) -> PendingStep:
        """Exchange the votes of a step and decide, without changing anything; a collective.

        A rank that abstains has no opinion: its gradients and momentum do not count, by the rule for elements whose
        update is zero. It moves with the others. So does one that has no data left, or is not up to date.

        The first half of `step`, for those who take part in a larger transaction: every rank calls `PendingStep.commit`
        on the result, or every rank calls `PendingStep.discard`, before the next step. Gradients must not change in
        between. Raises as `step`.
        """
        self._check_open()
        Join.notify_join_context(self)
        return self._propose(None, has_closure=False, abstains=check_flag("abstain", abstain))

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """Return the hook of `torch.distributed.algorithms.Join`: a rank whose inputs have ended abstains in steps."""
        return _Abstentions(self)

    @property
    def join_device(self) -> torch.device:
        """See `torch.distributed.algorithms.Joinable`."""
        return self._device

    @property
    def join_process_group(self) -> Any:
        """See `torch.distributed.algorithms.Joinable`."""
        return dist.group.WORLD if self._group is None else self._group

    def rebind(self, process_group: dist.ProcessGroup | None) -> None:
        """Continue with another set of ranks: parameters, momentum and the step stay; a collective of the new group.

        Its ranks must hold the same parameters, in the same step. Raises WorkersDisagreeError on all of them where they
        differ; ValueError or TypeError for a group that is impossible.
        """
        self._check_open()
        old, before, compressions = self._members, self._compression, list(self._compressions)
        try:
            meshes = old.meshes
            with _informing(process_group, meshes):
                self._check_in_place()
                if self._pending is not None:
                    raise RuntimeError("rebind: expected no step between propose and commit, got one")
                # nodes and profile are those of the old group
                comm = replace(self._comm, mesh=None, profile=None)
                self._members = Membership(process_group, comm, old.overlap, self._impl, meshes)
                meshes.check(self._named_parameters(), self._members.voting_ranks)
                if self._given_compression is None:
                    # that of as many ranks, which one that comes from elsewhere has not had yet
                    self._compression = self._default_compression()
                    self._compressions[:] = [self._compression if one is before else one for one in compressions]
                fingerprint = {**self._fingerprint(), "the step": self._step_count}
            self._shake_hands(fingerprint)
        except BaseException:
            self._members, self._compression, self._compressions[:] = old, before, compressions
            raise
        # ranks hold the same parameters: a group that is new to this rank may be known to others
        self._unverified, self._unequal = True, []
        self._stop_overlap()
        is_all = not dist.is_initialized() or self._workers == dist.get_world_size()
        if self._workers == 1 or is_all or not is_listed(self._group):
            destroy_groups(old.own_groups)
        else:
            # by `close`: torch names groups of a part of all processes by a number that must not fall and rise again
            self._members.own_groups += old.own_groups
        self._buckets.choose_bytes = self._members.choose_bucket_bytes
        self._rearrange(None)
        self._momentum.use(self._policy if self._workers > 1 else None)
        if self._workers == 1:
            self._scales.reset()
        # what one rank alone has differs from what others have
        self._is_averaged = self._workers == 1 or (self._is_averaged and old.workers > 1)
        self._engine.members, self._own_state = self._members, self._members.own_state
        self._engine.agree()
        self._hold()
        self._start_overlap()
        self.verify()

    def _leave(self) -> None:
        """Let go of the process groups, where a rank is lost; the next step needs `rebind`. No collective."""
        self._members.leave()
        self._engine.agree()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of this rank, bit for bit; the next step compares all ranks' parameters by hash.

        Raises ValueError or TypeError, with nothing changed, where groups, shapes or dtypes do not fit.
        """
        self._check_open()
        self._check_in_place()
        kept = [{name: value for name, value in g.items() if isinstance(value, Tensor)} for g in self.param_groups]
        try:
            super().load_state_dict(state_dict)
            if self._capturable:
                keep_tensors(self.param_groups, kept)
            self._interrupted = False
        finally:
            # a user's hook can raise when the state has been loaded
            self._unverified = True
            self._scales.loaded()
            if self._overlap is not None:
                self._overlap.send_late()

    def offload(self) -> None:
        """Move momentum and masters to the host, and free their memory on the device, until `reload`.

        For phases without steps, such as sampling. On each rank, at any time when no step is in progress; it
        communicates nothing. Steps, checkpoints and `rebind` raise RuntimeError until then.
        """
        self._check_open()
        self._check_in_place()
        if self._pending is not None:
            raise RuntimeError("offload: expected no step between propose and commit, got one")
        self._offloaded = [(tensor, tensor.to("cpu", copy=True)) for tensor in self._movable()]
        for tensor, _ in self._offloaded:
            # state, and whatever refers to it, keeps its tensors
            tensor.untyped_storage().resize_(0)

    def reload(self) -> None:
        """Bring back what `offload` moved, bit for bit."""
        if self._offloaded is None:
            raise RuntimeError("reload: expected an optimizer after offload(), got one whose state is in place")
        for tensor, kept in self._offloaded:
            tensor.untyped_storage().resize_(tensor.numel() * tensor.element_size())
            tensor.copy_(kept)
        self._offloaded = None
        self._hold()

    def _movable(self) -> list[Tensor]:
        """Return the tensors of state that own memory of the device: momentum of each bucket, masters."""
        tensors = [*(bucket.exp_avg for bucket in self._buckets.all), *self._masters.of(self._named_parameters())]
        return [tensor for tensor in tensors if not _is_on_host(tensor)]

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer` does; ``momentum_state`` of a group tells whose momentum it is.

        Of a sharded parameter, entries are DTensors with its mesh and placements.
        """
        self._check_in_place()
        return super().state_dict()

    def stats(self) -> Stats:
        """Return what the last step cost and how its votes fell; see `Stats`."""
        self._check_open()
        skipped = self._skipped if self._late is None else int(self._late.skipped) + self._skipped
        return stats_of(self._engine, self._step_count, skipped)

    def explain(self) -> Explanation:
        """Return the algorithm of each bucket and why: the bytes and predicted time of every algorithm.

        Printed, it is a table; it communicates nothing.
        """
        self._check_open()
        return explain(self._engine)

    def verify(self) -> None:
        """Verify that all ranks have the same layout and parameters; a collective.

        A step does it by itself after construction, `load_state_dict` and `add_param_group`, unless it is compiled or
        captured. Raises WorkersDisagreeError on all ranks where they differ.
        """
        self._check_open()
        fingerprint = {"the bucket layout": self._momentum.agreed_layout(), "the step": self._step_count}
        with self._members.agreeing(self._device):
            if self._workers > 1:
                handshake(fingerprint, group=self._group, device=self._device)
        if self._late is not None:
            # an error that was not raised yet refers to the parameters of then
            self.raise_errors()
        self._agree()

    def raise_errors(self) -> None:
        """With ``capturable``, raise what went wrong in steps since it was last asked; waits for the device.

        NonFiniteError or WorkersDisagreeError, on all ranks; no rank changed anything in such a step.
        """
        if self._late is not None:
            self._late.raise_all(self._engine.control)

    def check_replicas(self) -> None:
        """Verify that all workers' parameters, and masters, are bit-identical; a collective call.

        Shards are compared with the same shards, DTensors also over the meshes that replicate them, and plain
        parameters of a model with shards over all ranks that share any. Raises WorkersDisagreeError on all workers,
        naming the first parameter that differs.
        """
        self._check_open()
        self._compare()
        if self._members.layouts is not None:
            check_equal(self._plain(), group=self._members.deciding)

    def _compare(self) -> None:
        """Compare what ranks must have in common; see `check_replicas`."""
        named = self._named_parameters()
        with self._members.agreeing(self._device):
            if self._workers > 1:
                check_equal([*locals_of(named), *self._masters.named(named)], group=self._group)
        for group, replicated in self._members.meshes.replicated(named):
            with self._members.agreeing(self._device):
                check_equal([*locals_of(replicated), *self._masters.named(replicated)], group=group)

    def sync_momentum(self) -> None:
        """Average momentum over workers, summed in rank order, so that all hold the same bits; a collective call.

        Before `state_dict`, it makes one worker's file serve any number of workers, and before
        `torch.distributed.checkpoint`, which keeps one replica of each shard, any mesh.
        """
        self._check_open()
        with _informing(self._group, self._members.meshes):
            self._check_in_place()
        with self._members.agreeing(self._device):
            if self._workers > 1:
                handshake({"the bucket layout": self._buckets.layout}, group=self._group, device=self._device)
        if self._workers > 1:
            for bucket in self._buckets.all:
                mean = bucket.exp_avg.float()
                average_agreed_(mean, group=self._group)
                bucket.exp_avg.copy_(mean)
        self._is_averaged = True

    def close(self) -> None:
        """End the thread of ``overlap``, the hooks on parameters and the process groups that were created for this.

        On all ranks, when no step or backward is in progress. Parameters, state and `state_dict` remain; all else
        raises RuntimeError afterwards. Closing twice does nothing. An optimizer that is collected is closed too, but
        that its groups on backends other than Gloo last until destroy_process_group.
        """
        if self._is_closed:
            return
        self._is_closed = True
        ended = self._stop_overlap()
        # with what refers to them, their threads and sockets end
        groups = self._members.own_groups
        del self._members, self._engine
        if not ended:
            raise RuntimeError(
                "close: expected no votes under way, got some that other workers have not answered; they end with the "
                "process group's timeout"
            )
        destroy_groups(groups)

    def __getstate__(self) -> dict[str, Any]:
        self._check_open()
        if not self._members.is_alone or dist.is_initialized():
            raise TypeError(
                "LionCub cannot be copied or pickled, since its process group cannot; build another one of the copied "
                "model's parameters, and load_state_dict(opt.state_dict())"
            )
        groups = []
        for group, compression in zip(self.param_groups, self._compressions, strict=True):
            options = {name: value for name, value in group.items() if name not in ("params", "param_names", "step")}
            names = group.get("param_names")
            options["params"] = (
                list(group["params"]) if names is None else list(zip(names, group["params"], strict=True))
            )
            groups.append(options if compression is self._compression else {**options, "compression": compression})
        return {"groups": groups, "state": super().state_dict(), "options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["groups"], **state["options"])  # type: ignore[misc]
        self.load_state_dict(state["state"])

    def __repr__(self) -> str:
        if self._is_closed:
            return f"{super().__repr__()}\nclosed"
        stats, rates = self.stats(), [f"lr={float(group['lr']):g}" for group in self.param_groups]
        used = "+".join(sorted({bucket.algorithm for bucket in stats.buckets}))
        impls = "+".join(sorted({resolve_impl(self._impl, bucket.device) for bucket in self._buckets.all}))
        compressions = ", ".join(dict.fromkeys(map(repr, self._compressions)))
        modes = [name for name in ("overlap", "capturable") if getattr(self, f"_{name}")]
        return (
            f"LionCub({', '.join([*dict.fromkeys(rates), *modes])}): {self._workers} worker(s), {compressions}; "
            f"{len(stats.buckets)} bucket(s) by {used}, {stats.bytes_sent_per_step:,} bytes sent per worker and step; "
            f"{impls} kernels"
        )

    def _loaded_momentum(self, momentum_state: str) -> None:
        self._is_averaged = momentum_state == AVERAGED or self._workers == 1
        super()._loaded_momentum(momentum_state)

    def _default_compression(self) -> AnyCompression:
        return default_compression(self._workers)

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("LionCub: expected an open optimizer, got one after close()")

    def _check_in_place(self) -> None:
        if self._offloaded is not None:
            raise RuntimeError("LionCub: expected its state in place, got one after offload(); call reload() first")

    def _check_state(self) -> None:
        self._check_in_place()
        super()._check_state()

    def _shake_hands(self, fingerprint: dict[str, object]) -> None:
        """Agree with all ranks of the vote, then with those of the meshes, and create process groups."""
        meshes = self._members.meshes.groups
        groups = [*([self._group] if self._workers > 1 else []), *meshes]
        for i, group in enumerate(groups):
            # an error on any rank of a grid reaches all, along one of its dimensions after the other
            with informing(*groups[i + 1 :], device=self._device):
                try:
                    handshake(fingerprint, group=group, device=self._device)
                except WorkersDisagreeError as error:
                    raise WorkersDisagreeError(f"{error}{hint_of_shards(str(error))}") from None
        if groups:
            self._connect()

    def _connect(self) -> None:
        """Create process groups; their end comes with this optimizer's."""
        self._members.connect(self._device)
        if self._members.ends_alone:
            # at exit the interpreter ends them anyhow
            weakref.finalize(self, destroy_groups, self._members.own_groups).atexit = False

    def _check_last_group(self) -> None:
        super()._check_last_group()
        named, meshes = self._named_parameters(), self._members.meshes
        refuse_shards(self._plain(), are_broadcast=self._comm.broadcast and self._workers > 1)
        if self._is_built and not Meshes(param for _, param in named).ranks <= meshes.ranks:
            raise ValueError("params: expected shards on the meshes of the other groups, got one on another mesh")
        meshes.check(named, self._members.voting_ranks)

    def _create_state(self, group_index: int) -> None:
        # at construction all groups are laid out together, when the group is connected
        if self._is_built:
            self._add_buckets(range(group_index, group_index + 1))

    def _add_buckets(self, groups: range) -> None:
        """Lay out new groups; where it raises, nothing has changed."""
        self._members.meshes.add(param for i in groups for param in self.param_groups[i]["params"])
        params = self._buckets.append(self.param_groups, groups, by_readiness=self._members.overlap)
        self._drift.add(params)
        self._scales.add(params)
        for i in groups:
            # with capturable, one tensor that all groups share
            self.param_groups[i]["step"] = self.param_groups[0]["step"]
        self._unequal += params
        self._unverified, self._order_known, self._ready = True, False, None
        if self._overlap is not None:
            self._overlap.watch(params)
            self._overlap.send_late()

    def _fingerprint(self) -> dict[str, object]:
        """Return what ranks must have in common, by the names that an error gives it."""
        fingerprint: dict[str, object] = {
            "the number of parameters": len(self._named_parameters()),
            **self._members.fingerprint(),
            "bucket_mb": None if self._comm.bucket_mb is None else float(self._comm.bucket_mb),
            "capturable": self._capturable,
            "compression": list(self._compressions),
            "drift_every": self._drift_every,
            **({} if self._policy is None else self._policy.fingerprint(self._named_parameters())),
            "broadcast": self._comm.broadcast,
            "on_nonfinite": self._on_nonfinite,
            **vars(self._precision),
        }
        groups = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        for i, (group_index, (name, p)) in enumerate(zip(groups, self._named_parameters(), strict=True)):
            fingerprint[f"parameter {i}"] = f"{name} of {describe(p)}, group {group_index}"
        return fingerprint

    def _announce(self) -> None:
        if self._members.rank != 0:
            return
        _LOG.info("%r", self)


def _is_on_host(tensor: Tensor) -> bool:
    return tensor.is_cpu


class _Abstentions(JoinHook):
    """Takes the steps of a rank whose inputs have ended, while others still have some."""

    def __init__(self, opt: LionCub) -> None:
        self._opt = opt

    def main_hook(self) -> None:
        """Abstain in one step."""
        self._opt._propose(None, has_closure=False, abstains=True).commit()


def _informing(group: dist.ProcessGroup | None, meshes: Meshes) -> AbstractContextManager[object]:
    """Return `informing` of all groups with which a handshake follows."""
    is_there = dist.is_initialized() if group is None else isinstance(group, dist.ProcessGroup)
    if is_there and meshes.groups and world_size_of(group) == 1:
        # nobody waits in it
        is_there = False
    return informing(*([group] if is_there else []), *meshes.groups)


def _as_list(params: Params) -> Any:
    """Return parameters as a list, which is read twice; what is none is refused later, with the other arguments."""
    return list(params) if isinstance(params, Iterable) and not isinstance(params, Tensor | Mapping) else params


def _tensors_of(params: Any) -> list[Tensor]:
    """Return the tensors among parameters, named ones or groups; raises nothing."""
    if isinstance(params, Tensor):
        return [params]
    if isinstance(params, Mapping):
        return _tensors_of(params.get("params"))
    if isinstance(params, list | tuple):
        return [tensor for one in params for tensor in _tensors_of(one)]
    return []


# called, not traced: an error that is raised while a compiler traces makes it run the step as it is, in pieces
@torch.compiler.disable(reason=_NOT_CAPTURABLE)  # type: ignore[no-untyped-call, untyped-decorator]
def _refuse_to_compile() -> None:
    raise RuntimeError(_NOT_CAPTURABLE)
