"""Plans by the cost model, and the one that the first steps choose."""

from __future__ import annotations

import time

import pytest

from lioncub.collectives import Costs, Link, Topology, bytes_sent
from lioncub.tuning import LARGEST_BYTES, MARGIN, TRIAL_STEPS, Plan, Tuner, plans_of

FOUR = Topology.flat(4)
SLOW = Costs(FOUR, Link(1e-4, 12.5e6), Link())
MEGABYTE = 1 << 20


def test_without_overlap_each_algorithm_is_one_plan_of_the_largest_buckets() -> None:
    plans = plans_of([MEGABYTE], SLOW, algorithm="auto", bucket_bytes=None, overlap=False)
    assert plans[0] == Plan("reduce_scatter", MEGABYTE, bytes_sent("reduce_scatter", MEGABYTE, FOUR))
    # all-reduce of fields takes more than twice as long
    assert [plan.algorithm for plan in plans] == ["reduce_scatter", "all_gather"]


def test_with_overlap_other_sizes_are_tried_and_one_bucket_for_all() -> None:
    plans = plans_of([MEGABYTE], SLOW, algorithm="reduce_scatter", bucket_bytes=None, overlap=True)
    sizes = [plan.bucket_bytes for plan in plans]
    assert sizes[1] == MEGABYTE
    assert len(set(sizes)) == len(sizes) >= 3
    assert {sizes[0] * 2, sizes[0] // 16 * 8} & set(sizes)
    (given,) = plans_of([MEGABYTE], SLOW, algorithm="reduce_scatter", bucket_bytes=4096, overlap=True)
    assert given.bucket_bytes == 4096
    huge = plans_of([1 << 28], SLOW, algorithm="reduce_scatter", bucket_bytes=None, overlap=True)
    assert max(plan.bucket_bytes for plan in huge) <= LARGEST_BYTES


def run(plans: list[Plan], microseconds: dict[Plan, list[int]]) -> tuple[list[Plan], Tuner]:
    """The plan of each step, by the slowest rank's times."""
    tuner, current, used = Tuner(plans), plans[0], []
    for step in range(TRIAL_STEPS * len(plans) + 3):
        used.append(current)
        times = microseconds[current]
        current = tuner.note(times[step % len(times)]) or current
    return used, tuner


FAST, LEAN, OTHER = Plan("all_gather", 64, 300), Plan("reduce_scatter", 64, 150), Plan("all_reduce", 64, 900)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({FAST: [1000], LEAN: [1500], OTHER: [1200]}, FAST),
        # as good as equal: the fewest bytes
        ({FAST: [1000], LEAN: [int(1000 * (1 + MARGIN))], OTHER: [1000]}, LEAN),
        # a disturbance is no reason
        ({FAST: [1000], LEAN: [9000, 700, 9000], OTHER: [800]}, LEAN),
        ({FAST: [1000], LEAN: [1200], OTHER: [500]}, OTHER),
        # nothing is known yet
        ({FAST: [0], LEAN: [0], OTHER: [0]}, LEAN),
    ],
)
def test_the_fewest_bytes_of_the_fastest(times: dict[Plan, list[int]], chosen: Plan) -> None:
    used, tuner = run([FAST, LEAN, OTHER], times)
    trials = [plan for plan in (FAST, LEAN, OTHER) for _ in range(TRIAL_STEPS)]
    assert used[: len(trials)] == trials
    assert set(used[len(trials) :]) == {chosen}
    assert tuner.is_done


def test_one_plan_is_not_tried() -> None:
    tuner = Tuner([LEAN])
    assert tuner.is_done
    assert tuner.note(5) is None
    assert tuner.microseconds == 0
    tuner.step_ended()
    assert tuner.microseconds == 0
    time.sleep(0.01)
    tuner.step_ended()
    assert tuner.microseconds >= 10_000
