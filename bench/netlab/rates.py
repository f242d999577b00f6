"""Rates in bits per second and the names that people and tc give them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LARGEST_SEGMENT = 64 * 1024


def parse_rate(text: str) -> int:
    """ "100mbit" -> 100_000_000 bits per second. Raises ValueError for anything else than a number with a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    rate = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 10**6 <= rate <= 10**11:
        raise ValueError(f"rate: expected 1mbit to 100gbit, such as 100mbit or 1gbit, got {text!r}")
    return rate


def rate_name(rate: int) -> str:
    """100_000_000 -> "100 Mb/s"."""
    return f"{rate / 1e9:g} Gb/s" if rate >= 10**9 else f"{rate / 1e6:g} Mb/s"


@dataclass(frozen=True)
class Shape:
    """What a token bucket is told: bits per second, bytes that may pass at once, bytes that may wait."""

    rate: int
    burst_bytes: int
    queue_bytes: int


def shape_of(rate: int) -> Shape:
    """The token bucket for a link of ``rate`` bits per second.

    The burst is 1 ms of traffic, what a late timer of a busy machine costs, and no less than one whole segment: where
    real cards cut segments into frames, the kernel would do it here, in processor time that the workers need. An idle
    link may send that much at once, 5 ms at 100 Mb/s. The queue holds 100 ms, so that nothing is lost where several
    hosts send to one.
    """
    per_second = rate // 8
    burst = max(per_second // 1000, _LARGEST_SEGMENT + 2048)
    return Shape(rate, burst, max(per_second // 10, 4 * _LARGEST_SEGMENT))
