"""Intervals of what paired seeds differ by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from scipy import stats

CONFIDENCE = 0.95
_RESAMPLES, _BOOTSTRAP_SEED = 4000, 0


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` values and the interval that holds the true one with 95 % confidence."""

    mean: float
    low: float
    high: float
    count: int

    def within(self, limit: float) -> bool:
        """Whether all of it is at most ``limit`` from zero."""
        return -limit <= self.low and self.high <= limit

    def beyond(self, limit: float) -> bool:
        """Whether all of it is more than ``limit`` from zero, on one side."""
        return self.low > limit or self.high < -limit


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t over independent values; infinitely wide for one. Raises ValueError for none."""
    count = len(values)
    if not count:
        raise ValueError("values: expected at least one, got none")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def relative_difference(losses: Sequence[float], reference: Sequence[float]) -> Interval:
    """Of loss / reference - 1 over paired seeds. Raises ValueError for different lengths."""
    return t_interval([loss / other - 1 for loss, other in zip(losses, reference, strict=True)])


def recovered_share(
    candidate: Sequence[float], without: Sequence[float], reference: Sequence[float]
) -> Interval | None:
    """What part of the loss that ``without`` loses against ``reference`` the candidate wins back.

    (mean without - mean candidate) / (mean without - mean reference), its interval by bootstrap over paired seeds.
    None where it cannot be told that anything is lost: the interval of without - reference does not lie above 0.
    """
    lost = [w - r for w, r in zip(without, reference, strict=True)]
    won = [w - c for w, c in zip(without, candidate, strict=True)]
    if len(lost) < 2 or t_interval(lost).low <= 0:
        return None
    picks = numpy.random.default_rng(_BOOTSTRAP_SEED).integers(len(lost), size=(_RESAMPLES, len(lost)))
    below = numpy.asarray(lost)[picks].mean(axis=1)
    ratios = numpy.asarray(won)[picks].mean(axis=1)[below > 0] / below[below > 0]
    low, high = numpy.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(math.fsum(won) / math.fsum(lost), float(low), float(high), len(lost))
