"""The choice of algorithm and size of buckets, corrected by the times of the first steps: the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from lioncub.collectives import Costs
from lioncub.collectives.cost import best_bucket_bytes, bytes_sent, candidates, seconds_of_step

# steps of each plan: the first reports the time of the plan before, and the second that of a step which pays for memory
TRIAL_STEPS, UNCOUNTED = 6, 2
# plans that are predicted to take longer than so many times the best are not tried, nor more than so many
WORST, MOST_PLANS = 2.0, 5
# of plans that are slower than the fastest by no more than this, the one with the fewest bytes is kept
MARGIN = 0.05
# of a bucket, as in `best_bucket_bytes`
LARGEST_BYTES = 16 * 2**20
# shorter messages keep the model's choice
LEAST_BYTES = 8192


@dataclass(frozen=True)
class Plan:
    """An algorithm for messages of at least `LEAST_BYTES`, and the bytes of one bit per code of a bucket.

    ``bytes_sent`` is about what each rank sends per step.
    """

    algorithm: str
    bucket_bytes: int
    bytes_sent: int = 0


def plans_of(
    group_bytes: Sequence[int], costs: Costs, *, algorithm: str, bucket_bytes: int | None, overlap: bool
) -> list[Plan]:
    """Return the plans that are worth a trial, the best by the model first.

    ``group_bytes`` are packed bytes of each set of parameters that may share buckets; ``algorithm`` and
    ``bucket_bytes`` are given, or "auto" and None.
    """
    total = max(-(-sum(group_bytes) // 8) * 8, 8)
    found: dict[Plan, float] = {}
    for name in candidates(costs.topology) if algorithm == "auto" else (algorithm,):
        best = bucket_bytes or best_bucket_bytes(group_bytes, name, costs, overlap=overlap)
        sizes = {best}
        if overlap and bucket_bytes is None:
            sizes |= {min(2 * best, total), max(-(-best // 16) * 8, 8)}
        for size in sizes:
            seconds = seconds_of_step(group_bytes, size, name, costs) if overlap else costs.seconds(name, total)
            found[Plan(name, size, bytes_sent(name, total, costs.topology))] = seconds
    ranked = sorted(found, key=lambda plan: (found[plan], plan.algorithm, plan.bucket_bytes))
    chosen = [plan for plan in ranked if found[plan] <= WORST * found[ranked[0]]][:MOST_PLANS]
    if overlap and bucket_bytes is None:
        # the model does not know that busy processors delay each further bucket
        whole = replace(chosen[0], bucket_bytes=max(chosen[0].bucket_bytes, min(total, LARGEST_BYTES)))
        chosen = [chosen[0], *dict.fromkeys([whole, *chosen[1:]])]
    return list(dict.fromkeys(chosen))


class Tuner:
    """Tries plans one after the other and keeps the one with the fewest bytes of those whose steps were the fastest.

    A step's time, from the end of the one before to its own, is in the control message of the next: every rank learns
    the slowest rank's, so all change plans in the same steps.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans, self._trial, self._count = list(plans), 0, 0
        self._best = [float("inf")] * len(plans)
        self._ended: float | None = None
        # this rank's time of the last step, for its control message; 0 where unknown
        self.microseconds = 0
        self.is_done = len(plans) < 2

    def step_ended(self) -> None:
        """Note the time of a step, and start the clock of the next."""
        now = perf_counter()
        if self._ended is not None:
            self.microseconds = int(1e6 * (now - self._ended))
        self._ended = now

    def note(self, slowest_microseconds: int) -> Plan | None:
        """Take the slowest rank's time of a step; returns the plan to go on with, where it changes."""
        if self.is_done:
            return None
        self._count += 1
        if slowest_microseconds and self._count > UNCOUNTED:
            self._best[self._trial] = min(self._best[self._trial], slowest_microseconds)
        if self._count < TRIAL_STEPS:
            return None
        before, self._count = self._trial, 0
        self._trial += 1
        if self._trial == len(self._plans):
            self.is_done = True
            limit = (1 + MARGIN) * min(self._best)
            fast = [i for i, best in enumerate(self._best) if best <= limit]
            self._trial = min(fast, key=lambda i: (self._plans[i].bytes_sent, self._best[i]))
        return self._plans[self._trial] if self._trial != before else None
