"""Overlap with backward: a bucket's votes are sent as soon as backward has finished its gradients.

What was sent is only a forecast until `step`: the last bucket always waits for it, and its header says whether all
that this worker sent before still holds. Where it does not on any worker, because gradients were accumulated once
more, all vote again. So the result is always that of the gradients that `step` finds.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lioncub.buckets import Bucket
from lioncub.collectives import Voter
from lioncub.collectives.exchange import Exchange
from lioncub.collectives.header import STALE
from lioncub.collectives.transport import Group, all_gather, world_size_of
from lioncub.courier import Courier, Followed, Follower
from lioncub.voting import BucketVote, Draft, Mail, finish, prepare

NEVER = 2**62


@dataclass(frozen=True)
class Sent:
    """A bucket under way, and what it was encoded from: gradients with their versions, the version of its momentum."""

    mail: Mail
    exchange: Future[Exchange]
    followed: Followed
    gradients: tuple[tuple[Tensor | None, int], ...]
    momentum: int


class Overlap:
    """Watches the gradients of an optimizer's parameters, and sends buckets in their order while backward runs.

    ``draft`` makes the draft of the step to come, ``follower`` says what to do next with a bucket's vote. Until `begin`
    names buckets, nothing is sent early and only the order of the gradients is learnt.
    """

    def __init__(
        self,
        courier: Courier,
        draft: Callable[[], Draft],
        follower: Callable[[Bucket, Mail, Draft], Follower | None],
    ) -> None:
        self._courier, self._make_draft, self._follower = courier, draft, follower
        self.paused = 0
        self._draft: Draft | None = None
        self._sent: list[Sent] = []
        self._stale = False
        # seconds that `step` spent waiting, since it was last set
        self.exposed_seconds = 0.0
        self._buckets: list[Bucket] = []
        self._voters: list[Voter] = []
        self._bucket_of: dict[Tensor, int] = {}
        self._expected: dict[Tensor, int] = {}
        self._fired: dict[Tensor, int] = {}
        # when each parameter's gradient was accumulated last, counted over all of them since the last step
        self._last: dict[Tensor, int] = {}
        self._clock = 0
        self._waiting: list[int] = []
        # averages that follow votes of this step
        self._averages: list[Followed] = []
        # what ends the watching; not reached through this object, which may be gone by then
        self.hooks: list[RemovableHandle] = []

    def watch(self, params: Sequence[Tensor]) -> None:
        """Be told of these parameters' gradients; frozen ones have none."""
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

    def begin(self, buckets: Sequence[Bucket], voters: Sequence[Voter]) -> None:
        """Send these buckets early from now on, each when its gradients have come as often as in an earlier step."""
        self._buckets, self._voters = list(buckets), list(voters)
        self._bucket_of = {slot.param: i for i, bucket in enumerate(buckets) for slot in bucket.slots}
        self._waiting = [len(bucket.slots) for bucket in buckets]

    @property
    def has_begun(self) -> bool:
        """Whether buckets are sent early."""
        return bool(self._buckets)

    def end(self) -> None:
        """Send nothing early any more, until `begin`; what is under way no longer holds."""
        self._stale |= bool(self._sent)
        self._buckets, self._voters, self._bucket_of, self._waiting = [], [], {}, []

    def agreed_order(self, params: Sequence[Tensor], group: Group) -> dict[Tensor, int] | None:
        """When each parameter's last gradient of this step came, on the worker where it came last; a collective call.

        A number to sort by, `NEVER` for a parameter without gradient on some worker; None where no worker had any.
        """
        last = [self._last.get(param, NEVER) for param in params]
        mine = torch.tensor(last, dtype=torch.int64, device=params[0].device)
        everyone = mine.new_empty(world_size_of(group) * mine.numel())
        all_gather(everyone, mine, group).wait()
        latest = everyone.view(-1, mine.numel()).amax(dim=0).tolist()
        return None if min(latest) == NEVER else dict(zip(params, latest, strict=True))

    def vote(self, buckets: Sequence[Bucket], voters: Sequence[Voter], draft: Draft) -> list[BucketVote]:
        """Send what is left of ``buckets``, wait for all; vote anew where a worker's votes were stale."""
        draft.attempt(lambda: self._settle(draft))
        draft.flags |= STALE if self._stale else 0
        sent = self._sent
        self._draft, self._sent, self._stale = None, [], False
        votes = self._collect(buckets, voters, sent, draft)
        if any(header.flags & STALE for vote in votes for header in vote.headers):
            self.drop_averages()
            draft.flags &= ~STALE
            votes = self._collect(buckets, voters, [], draft)
        return votes

    def drop_averages(self) -> None:
        """Wait for the averages of a step that is not taken: messages that nobody takes would be taken for later."""
        for followed in self._averages:
            averaging = None if followed is None else followed.result()
            if averaging is not None:
                averaging.result()
        self._averages = []

    def reset(self, *, learn: bool = False) -> None:
        """After a step, or before anything was sent: count gradients from 0; ``learn`` how often each came."""
        if learn:
            self._expected.update({param: count for param, count in self._fired.items() if count})
        self._draft, self._sent, self._stale, self._averages = None, [], False, []
        self._fired = dict.fromkeys(self._fired, 0)
        self._last, self._clock = {}, 0
        self._waiting = [len(bucket.slots) for bucket in self._buckets]

    def restart(self) -> None:
        """Gradients are being cleared: what backward did before an exception no longer counts."""
        if self._sent:
            self._stale = True
        else:
            self.reset()

    def _collect(
        self, buckets: Sequence[Bucket], voters: Sequence[Voter], sent: Sequence[Sent], draft: Draft
    ) -> list[BucketVote]:
        mails = [one.mail for one in sent]
        under_way = [(one.exchange, one.followed) for one in sent]
        for bucket, voter in list(zip(buckets, voters, strict=True))[len(mails) :]:
            mails.append(prepare(bucket, draft))
            under_way.append(self._courier.send(voter, mails[-1], self._follower(bucket, mails[-1], draft)))
        self._averages += [followed for _, followed in under_way]
        began = perf_counter()
        exchanges = [exchange.result() for exchange, _ in under_way]
        self._courier.join_stream()
        votes = finish(buckets, mails, exchanges, draft)
        self.exposed_seconds += perf_counter() - began
        return [replace(vote, average=followed) for vote, (_, followed) in zip(votes, under_way, strict=True)]

    def _settle(self, draft: Draft) -> None:
        """Find out whether what was sent still holds.

        It is stale where gradients came or went since, by backward or zero_grad, or where hyperparameters or momentum
        changed.
        Raises RuntimeError where gradients were changed otherwise.
        """
        if self._draft is None:
            return
        if self._draft.failure is not None:
            raise self._draft.failure
        if self._draft.now != draft.now or self._draft.step != draft.step or self._draft.layout != draft.layout:
            self._stale = True
        for bucket, sent in zip(self._buckets, self._sent, strict=False):
            self._stale |= bucket.exp_avg._version != sent.momentum
            for slot, (grad, version) in zip(bucket.slots, sent.gradients, strict=True):
                now = slot.param.grad
                if now is None and grad is not None:
                    self._stale = True
                elif not self._stale and (now is not grad or (now is not None and now._version != version)):
                    raise RuntimeError(
                        f"gradient of {slot.name}: expected it unchanged since backward, as overlap=True has already "
                        "sent its votes, got one that was changed (by clipping, scaling or DistributedDataParallel); "
                        "use overlap=False"
                    )

    def _on_gradient(self, param: Tensor) -> None:
        """A gradient has been accumulated: send its bucket, and those that waited for it, once they are complete."""
        home = self._bucket_of.get(param)
        if home is not None and home < len(self._sent):
            self._stale = True
        if self.paused:
            return
        if not self._clock:
            # what the others send can then arrive without this worker's help
            for bucket, voter in zip(self._buckets, self._voters, strict=True):
                voter.expect(bucket.device)
        self._fired[param] += 1
        self._last[param] = self._clock
        self._clock += 1
        if home is None or self._fired[param] != self._expected.get(param):
            return
        self._waiting[home] -= 1
        # the last bucket is left to `step`, which knows whether the others still hold
        while len(self._sent) < len(self._buckets) - 1 and not self._waiting[len(self._sent)]:
            self._send_next()

    @torch.no_grad()
    def _send_next(self) -> None:
        if self._draft is None:
            self._draft = self._make_draft()
        bucket, voter = self._buckets[len(self._sent)], self._voters[len(self._sent)]
        grads = [slot.param.grad for slot in bucket.slots]
        mail = prepare(bucket, self._draft)
        evidence = tuple((grad, 0 if grad is None else grad._version) for grad in grads)
        under_way = self._courier.send(voter, mail, self._follower(bucket, mail, self._draft))
        self._sent.append(Sent(mail, *under_way, evidence, bucket.exp_avg._version))


def end_overlap(courier: Courier, hooks: list[RemovableHandle]) -> None:
    """End the thread and the watching of gradients, whether the `Overlap` is still there or not."""
    courier.close()
    while hooks:
        hooks.pop().remove()


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError unless all parameters are on one device whose votes can be sent during backward."""
    if len(devices) > 1 or devices[0].partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"overlap: expected all parameters on the CPU or on one CUDA device, got {devices}")


def refuse_with_overlap(has_closure: bool, has_scaler: bool) -> None:
    """Raise RuntimeError for what needs all gradients before the first vote is sent."""
    for present, what, why in (
        (has_closure, "a closure", "its backward would run within step, after votes may have been sent"),
        (has_scaler, "a GradScaler", "votes are sent before it has seen all gradients"),
    ):
        if present:
            raise RuntimeError(f"overlap: expected False with {what}, got True: {why}")
