"""The buckets of an optimizer and what carries each: laid out once, extended by new groups, arranged anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import parameter_names
from lioncub.buckets import Bucket, build_buckets, packed_sizes
from lioncub.capturable import CapturableStep
from lioncub.collectives import Voter
from lioncub.collectives.graph import GRAPH_ALGORITHMS, GraphVote
from lioncub.collectives.handshake import digest
from lioncub.collectives.traffic import candidates
from lioncub.compression import AnyCompression
from lioncub.explaining import Explanation, Message, explain
from lioncub.masters import Masters
from lioncub.precision import Precision
from lioncub.stats import BucketStats
from lioncub.wiring import Wiring

# one worker sends nothing, so all that may share a bucket does: on a GPU a step is two launches and one wait
_ALONE_BYTES = 2**62


class Arrangement:
    """Buckets, their voters (none for one worker) and the hash of their layout.

    ``state`` is the optimizer's: each parameter's ``exp_avg`` is kept a view into its bucket. ``compressions`` has one
    for every param group.
    """

    def __init__(
        self,
        wiring: Wiring,
        bucket_bytes: int | None,
        state: Mapping[Tensor, dict[str, Any]],
        compressions: Sequence[AnyCompression],
        momentum_dtype: torch.dtype,
    ) -> None:
        self._wiring, self._state, self._compressions = wiring, state, compressions
        self._momentum_dtype = momentum_dtype
        # None: chosen by the model when the first groups are known
        self.bucket_bytes = bucket_bytes
        self.buckets: list[Bucket] = []
        self.voters: list[Voter] = []
        self.layout = digest([])

    def append(self, param_groups: Sequence[dict[str, Any]], groups: range) -> list[Tensor]:
        """Lay out new groups behind those there are; their parameters. Where it raises, nothing has changed."""
        params = [param for i in groups for param in param_groups[i]["params"]]
        # gradients come in about the reverse of the order of use
        self._use(self.buckets + self._lay_out(param_groups, groups, {param: -i for i, param in enumerate(params)}))
        return params

    def reorder(self, param_groups: Sequence[dict[str, Any]], ready: Mapping[Tensor, int]) -> None:
        """Lay out all groups anew, in the order in which gradients get ready; momentum moves along."""
        self._use(self._lay_out(param_groups, range(len(param_groups)), ready))

    def stats(self, seconds: Sequence[float]) -> tuple[BucketStats, ...]:
        """What each bucket's last exchange cost; 0 seconds for buckets that have not travelled yet."""
        took = [*seconds, *[0.0] * (len(self.buckets) - len(seconds))]
        ways = [(voter.algorithm, voter.bytes_sent) for voter in self.voters] or [("none", 0)] * len(self.buckets)
        return tuple(
            BucketStats(bucket.elements, algorithm, sent, spent, repr(bucket.compression))
            for bucket, (algorithm, sent), spent in zip(self.buckets, ways, took, strict=True)
        )

    def explain(self) -> Explanation:
        """See `LionCub.explain`."""
        if not self.voters:
            alone = [Message(bucket.elements, bucket.n_bytes, 0, None) for bucket in self.buckets]
            return explain(alone, None)
        messages = [
            Message(bucket.elements, voter.n_bytes, voter.header_bytes, voter.algorithm, voter.codes)
            for bucket, voter in zip(self.buckets, self.voters, strict=True)
        ]
        return explain(messages, self._wiring.costs)

    def capturable_step(self, reports: bool, precision: Precision, masters: Masters, impl: str) -> CapturableStep:
        """The step of all buckets, and masters, as they are now."""
        wiring, votes = self._wiring, []
        for bucket, voter in zip(self.buckets, self.voters, strict=bool(self.voters)):
            algorithm = voter.algorithm
            if wiring.algorithm == "auto":
                possible = [name for name in candidates(wiring.costs.topology) if name in GRAPH_ALGORITHMS]
                algorithm = min(possible, key=lambda name: wiring.costs.seconds(name, bucket.n_bytes))
            votes.append(GraphVote(bucket.n_bytes, algorithm, wiring.group, bucket.device, impl))
        return CapturableStep(
            self.buckets,
            votes,
            wiring.group,
            layout=self.layout,
            reports=reports,
            precision=precision,
            masters=masters,
            impl=impl,
        )

    def _lay_out(
        self, param_groups: Sequence[dict[str, Any]], groups: range, ready: Mapping[Tensor, int]
    ) -> list[Bucket]:
        members = {
            i: list(zip(parameter_names(param_groups[i], i), param_groups[i]["params"], strict=True)) for i in groups
        }
        if self.bucket_bytes is None:
            alone = self._wiring.workers == 1
            sizes = packed_sizes(members, self._compressions)
            self.bucket_bytes = _ALONE_BYTES if alone else self._wiring.bucket_bytes(sizes)
        order = ready if self._wiring.overlap else None
        return build_buckets(members, self.bucket_bytes, self._compressions, order, self._momentum_dtype)

    def _use(self, buckets: list[Bucket]) -> None:
        # a voter that stays may have posted receives already
        kept = self.voters if buckets[: len(self.buckets)] == self.buckets else []
        voters = [*kept, *self._wiring.voters(buckets[len(kept) :], len(kept))] if self._wiring.workers > 1 else []
        for bucket in buckets:
            for slot, view in zip(bucket.slots, bucket.views, strict=True):
                state = self._state[slot.param]
                if state.get("exp_avg", view) is not view:
                    view.copy_(state["exp_avg"])
                state["exp_avg"] = view
        self.buckets, self.voters = buckets, voters
        self.layout = digest([bucket.layout() for bucket in buckets])
