"""Overlap with backward: a bucket's codes are sent as soon as backward has finished its gradients.

They are a forecast until `step`, whose control message tells whether all that this rank sent still holds. Where it does
not on any rank, because gradients were accumulated once more, all vote again. So the result is always that of the
gradients that `step` finds.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lioncub.buckets import Bucket
from lioncub.collectives.algorithms import Exchange
from lioncub.control import Attempt
from lioncub.params import local_of

if TYPE_CHECKING:
    from lioncub.step import SentBucket, StepContext, StepEngine
    from lioncub.transaction import TransactionalOptimizer

NEVER = 2**62


class CommThread:
    """A thread that moves exchanges to their last phase, in the order they were given, while backward goes on.

    Phases are point-to-point messages with tags of their own, whose order does not matter.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Exchange[Any], Future[None]] | None] = queue.SimpleQueue()
        self._under_way: list[Future[None]] = []
        # a daemon, so that a process whose peers are gone can still end
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name="lioncub-comm", daemon=True)
        self._thread.start()

    def carry(self, exchange: Exchange[Any], message: Any) -> None:
        """Start an exchange at once, since its messages may arrive while an earlier one is waited for."""
        exchange.start(message)
        future: Future[None] = Future()
        self._under_way.append(future)
        self._jobs.put((exchange, future))

    def follow(self) -> None:
        """Do nothing: gradients are there when they are reported."""

    def join_gradients(self) -> None:
        """See `follow`."""

    def wait(self) -> None:
        """Wait until all exchanges are in their last phase; raises what one of them raised."""
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            future.result()

    def close(self) -> None:
        """End the thread when it has nothing left to do."""
        self._jobs.put(None)

    def join(self, seconds: float) -> bool:
        """Wait for the thread's end; whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


class CommStream:
    """A CUDA stream on which exchanges start, one after the other, so that all ranks start them in one order.

    The host waits for none of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # those of backward and, of fully_shard, of its reduction
        self._gradients: dict[torch.cuda.Stream, None] = {}

    def carry(self, exchange: Exchange[Any], message: Any) -> None:
        """Start an exchange and enqueue all of its phases behind what the current stream has encoded."""
        encoded = torch.cuda.current_stream(self._stream.device).record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(encoded)
            exchange.start(message)
            exchange.result()

    def follow(self) -> None:
        """Make what is encoded later wait for the current stream, on which a gradient was reduced."""
        self._gradients[torch.cuda.current_stream(self._stream.device)] = None

    def join_gradients(self) -> None:
        """Make the current stream wait for all gradients."""
        now = torch.cuda.current_stream(self._stream.device)
        for stream in self._gradients:
            now.wait_stream(stream)

    def wait(self) -> None:
        """Make the current stream wait for what has been enqueued."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def close(self) -> None:
        """Do nothing: a stream has no thread to end."""

    def join(self, seconds: float) -> bool:
        """See `CommThread.join`."""
        return True


@dataclass(frozen=True)
class Evidence:
    """The inputs of an encoded bucket: gradients with their versions, the version of its momentum.

    Operations on lists of DTensors, as of clipping, count no versions: sums of such gradients are compared too.
    """

    gradients: tuple[tuple[Tensor | None, int], ...]
    momentum: int
    sums: Tensor | None

    @classmethod
    def of(cls, bucket: Bucket) -> Evidence:
        """Note the bucket as it is."""
        grads = [param.grad for param in bucket.owners]
        versions = tuple((grad, 0 if grad is None else grad._version) for grad in grads)
        return cls(versions, bucket.exp_avg._version, _sums_of(bucket) if bucket.is_sharded else None)

    def has_sums_of(self, bucket: Bucket) -> bool:
        """Whether gradients add up to what they did; waits for the device where they are sharded."""
        # of sums that are not finite, bits can be compared
        return self.sums is None or torch.equal(self.sums.view(torch.int32), _sums_of(bucket).view(torch.int32))


class Overlap:
    """Watches the gradients of an optimizer's parameters, and sends buckets in their order while backward runs.

    Until `send_early` names buckets, nothing is sent early and only the order of the gradients is learned. Optimizer
    and engine are weak proxies, since hooks refer to this object.
    """

    def __init__(self, device: torch.device, optimizer: TransactionalOptimizer, engine: StepEngine) -> None:
        self.comm: CommThread | CommStream = CommStream(device) if device.type == "cuda" else CommThread()
        self._optimizer, self._engine = optimizer, engine
        self.paused = 0
        # what was sent early, from what, and the context of the step to come
        self.sent: list[SentBucket] = []
        self._evidence: list[Evidence] = []
        self._context: StepContext | None = None
        self._attempt = Attempt()
        self._stale = False
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[Tensor, int] = {}
        self._expected: dict[Tensor, int] = {}
        self._fired: dict[Tensor, int] = {}
        # when each parameter's gradient was accumulated last, counted over all of them since the last step
        self._last: dict[Tensor, int] = {}
        self._clock = 0
        self._waiting: list[int] = []
        # what ends the watching; not reached through this object, which may be gone by then
        self.hooks: list[RemovableHandle] = []

    def watch(self, params: Sequence[Tensor]) -> None:
        """Observe these parameters' gradients; frozen ones have none."""
        me = weakref.ref(self)

        def accumulated(param: Tensor) -> None:
            overlap = me()
            if overlap is not None:
                overlap._on_gradient(param)

        for param in params:
            if param.requires_grad and param not in self._fired:
                self._fired[param] = 0
                hook = param.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
                self.hooks.append(hook)

    def send_early(self, buckets: Sequence[Bucket]) -> None:
        """Send these buckets early from now on, each when its gradients have come as often as in an earlier step."""
        self._buckets = list(buckets)
        self._bucket_of = {slot.param: i for i, bucket in enumerate(buckets) for slot in bucket.slots}
        self._waiting = [len(bucket.slots) for bucket in buckets]

    @property
    def sends_early(self) -> bool:
        """Whether buckets are sent early."""
        return bool(self._buckets)

    def send_late(self) -> None:
        """Send nothing early any more, until `send_early`; what is in progress no longer holds."""
        self._stale |= bool(self.sent)
        self._buckets, self._bucket_of, self._waiting = [], {}, []

    def order(self, params: Sequence[Tensor]) -> list[int]:
        """Return when each parameter's last gradient of this step came, `NEVER` for one without."""
        return [self._last.get(param, NEVER) for param in params]

    def take(self, context: StepContext | None, attempt: Attempt) -> tuple[list[SentBucket], bool, StepContext | None]:
        """Return what was sent early, whether it no longer holds, and the context it was encoded in."""
        attempt.run(lambda: self._settle(context))
        sent, stale, early = self.sent, self._stale, self._context
        self._start_over()
        return sent, stale, early

    def reset(self, *, learn: bool = False) -> None:
        """After a step, or before anything was sent: count gradients from 0; ``learn`` how often each came."""
        if learn:
            self._expected.update({param: count for param, count in self._fired.items() if count})
        self._start_over()
        self._fired = dict.fromkeys(self._fired, 0)
        self._last, self._clock = {}, 0
        self._waiting = [len(bucket.slots) for bucket in self._buckets]

    def invalidate(self) -> None:
        """Drop what was sent before gradients are cleared, as after an exception in backward."""
        if self.sent:
            self._stale = True
        else:
            self.reset()

    def _start_over(self) -> None:
        self.sent, self._evidence, self._stale = [], [], False
        self._context, self._attempt = None, Attempt()

    def _settle(self, context: StepContext | None) -> None:
        """Find out whether what was sent still holds.

        It is stale where gradients came or went since, by backward or zero_grad, or where hyperparameters or momentum
        changed. Raises RuntimeError where gradients were changed otherwise.
        """
        if self._attempt.failure is not None:
            raise self._attempt.failure
        if self._context is None:
            return
        if context is None or not self._context.is_like(context):
            self._stale = True
        for bucket, evidence in zip(self._buckets, self._evidence, strict=False):
            self._stale |= bucket.exp_avg._version != evidence.momentum
            for slot, (grad, version) in zip(bucket.slots, evidence.gradients, strict=True):
                now = slot.param.grad
                if now is None and grad is not None:
                    self._stale = True
                elif not self._stale and (now is not grad or (now is not None and now._version != version)):
                    raise RuntimeError(
                        f"gradient of {slot.name}: expected it unchanged since backward, as overlap=True has already "
                        "sent its votes, got one that was changed (by clipping, scaling or DistributedDataParallel); "
                        "use overlap=False"
                    )
            if not self._stale and not evidence.has_sums_of(bucket):
                raise RuntimeError(
                    f"gradients of {bucket.slots[0].name} to {bucket.slots[-1].name}: expected them unchanged since "
                    "backward, as overlap=True has already sent their votes, got some that were changed (by clipping "
                    "or scaling); use overlap=False"
                )

    def _on_gradient(self, param: Tensor) -> None:
        """Send the parameter's bucket, and those that waited for it, once they are complete."""
        home = self._bucket_of.get(param)
        if home is not None and home < len(self.sent):
            self._stale = True
        if self.paused:
            return
        self.comm.follow()
        if not self._clock and self._buckets:
            # what the others send can then arrive without this rank's help
            self._engine.expect()
        self._fired[param] += 1
        self._last[param] = self._clock
        self._clock += 1
        if home is None or self._fired[param] != self._expected.get(param):
            return
        self._waiting[home] -= 1
        while len(self.sent) < len(self._buckets) and not self._waiting[len(self.sent)]:
            i = len(self.sent)
            self.comm.join_gradients()
            self._evidence.append(Evidence.of(self._buckets[i]))
            with torch.no_grad():
                if self._context is None:
                    self._context = self._attempt.run(self._optimizer._read_context)
                self.sent.append(self._engine.send(i, self._context, self._attempt))


def _sums_of(bucket: Bucket) -> Tensor:
    """Return the sums of the local gradients, and of their absolute values, fp32."""
    grads = [local_of(param.grad) for param in bucket.owners if param.grad is not None]
    return torch.stack([total for grad in grads for total in (grad.float().sum(), grad.float().abs().sum())])


def end_overlap(comm: CommThread | CommStream, hooks: list[RemovableHandle]) -> None:
    """End the thread and the watching of gradients, whether the `Overlap` is still there or not."""
    comm.close()
    while hooks:
        hooks.pop().remove()


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError unless all parameters are on one device whose codes can be sent during backward."""
    if len(devices) > 1 or devices[0].partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"overlap: expected all parameters on the CPU or on one CUDA device, got {devices}")


def refuse_with_overlap(has_closure: bool, has_scaler: bool) -> None:
    """Raise RuntimeError for what needs all gradients before the first code is sent."""
    for present, name, why in (
        (has_closure, "a closure", "its backward would run within step, after votes may have been sent"),
        (has_scaler, "a GradScaler", "votes are sent before it has seen all gradients"),
    ):
        if present:
            raise RuntimeError(f"overlap: expected False with {name}, got True: {why}")


def _work(jobs: queue.SimpleQueue[tuple[Exchange[Any], Future[None]] | None]) -> None:
    while (job := jobs.get()) is not None:
        exchange, future = job
        try:
            while not exchange.is_last:
                exchange.advance()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)
        # else the message, and its gradients, would live on until the next one comes
        del job, exchange, future
