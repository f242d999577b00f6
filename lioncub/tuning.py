"""The choice of algorithm and size of buckets, corrected by the times of the first steps: the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from lioncub.collectives import Costs
from lioncub.collectives.cost import best_bucket_bytes, candidates, seconds_of_step

# steps of each plan; the first after a change pays for memory and is not counted
TRIAL_STEPS = 4
# plans that are predicted to take longer than so many times the best are not tried, nor more than so many
WORST, MOST_PLANS = 2.0, 5
# another plan than the model's must be better by so much
MARGIN = 0.03
# shorter messages keep the model's choice
LEAST_BYTES = 8192


@dataclass(frozen=True)
class Plan:
    """An algorithm for messages of at least `LEAST_BYTES`, and the bytes of one bit per code of a bucket."""

    algorithm: str
    bucket_bytes: int


def plans_of(
    group_bytes: Sequence[int], costs: Costs, *, algorithm: str, bucket_bytes: int | None, overlap: bool
) -> list[Plan]:
    """Return the plans that are worth a trial, the best by the model first.

    ``group_bytes`` are packed bytes of each set of parameters that may share buckets; ``algorithm`` and
    ``bucket_bytes`` are given, or "auto" and None.
    """
    total = max(sum(group_bytes), 8)
    found: dict[Plan, float] = {}
    for name in candidates(costs.topology) if algorithm == "auto" else (algorithm,):
        best = bucket_bytes or best_bucket_bytes(group_bytes, name, costs, overlap=overlap)
        sizes = {best}
        if overlap and bucket_bytes is None:
            sizes |= {min(2 * best, -(-total // 8) * 8), max(-(-best // 16) * 8, 8)}
        for size in sizes:
            seconds = seconds_of_step(group_bytes, size, name, costs) if overlap else costs.seconds(name, total)
            found[Plan(name, size)] = seconds
    ranked = sorted(found, key=lambda plan: (found[plan], plan.algorithm, plan.bucket_bytes))
    return [plan for plan in ranked if found[plan] <= WORST * found[ranked[0]]][:MOST_PLANS]


class Tuner:
    """Tries plans one after the other and keeps the one whose fastest step was the fastest.

    A step's time is the slowest rank's from the end of the step before, which every rank learns from the control
    messages: so all ranks change plans in the same steps.
    """

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans, self._trial, self._count = list(plans), 0, 0
        self._best = [float("inf")] * len(plans)
        self._ended: float | None = None
        self.is_done = len(plans) < 2

    @property
    def microseconds(self) -> int:
        """This rank's time since the end of the last step, for its control message; 0 where unknown."""
        return 0 if self._ended is None else int(1e6 * (perf_counter() - self._ended))

    def step_ended(self) -> None:
        """Start the clock of the next step."""
        self._ended = perf_counter()

    def note(self, slowest_microseconds: int) -> Plan | None:
        """Take the slowest rank's time of a step; returns the plan to go on with, where it changes."""
        if self.is_done:
            return None
        self._count += 1
        if slowest_microseconds and self._count > 1:
            self._best[self._trial] = min(self._best[self._trial], slowest_microseconds)
        if self._count < TRIAL_STEPS:
            return None
        before, self._count = self._trial, 0
        self._trial += 1
        if self._trial == len(self._plans):
            self.is_done = True
            fastest = min(range(len(self._plans)), key=lambda i: self._best[i])
            self._trial = fastest if self._best[fastest] < (1 - MARGIN) * self._best[0] else 0
        return self._plans[self._trial] if self._trial != before else None
