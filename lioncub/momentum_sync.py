"""The policy of averaging momentum over ranks: in which steps, which segments of it, in how many bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from lioncub.arguments import check_count
from lioncub.buckets import Bucket, BucketList
from lioncub.collectives.average import BLOCK, check_dtype, payload_bytes

SCHEDULES = ("fixed", "staggered")
Selection = str | Sequence[str] | Callable[[str, Tensor], bool] | None


@dataclass(frozen=True, kw_only=True)
class MomentumSync:
    """A policy of averaging momentum over workers (Lion Cub, arXiv 2411.16462, section 3): m <- mean of all m.

    Args:
        every: k, in steps.
        schedule: "fixed": in every k-th step; "staggered": in each step the next 1/k of the elements, so that
            traffic is even.
        select: which parameters: all (None), those whose names match one of these patterns (as in a shell: ``*.bias``),
            those for which a function of name and parameter is true, or "auto": those whose momentum differs most
            between workers, measured every ``drift_every`` steps (see `Comm`), as many as ``budget`` allows.
        budget: with "auto", the bytes of synchronization as a fraction of the votes', both as one worker's messages
            and on average over steps.
        dtype: in which values are sent: "fp32", "bf16", or "int8" with a scale per 64 of them.
    """

    every: int = 1
    schedule: str = "fixed"
    select: Selection = None
    budget: float | None = None
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        check_count("every", self.every, "a number of steps")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        check_dtype(self.dtype)
        if isinstance(self.select, str) and self.select != "auto":
            raise ValueError(f"select: expected 'auto', a list of patterns or a function, got {self.select!r}")
        if isinstance(self.select, Sequence) and not all(isinstance(pattern, str) for pattern in self.select):
            raise TypeError(f"select: expected patterns, which are strings, got {self.select!r}")
        if not (self.select is None or isinstance(self.select, Sequence) or callable(self.select)):
            raise TypeError(f"select: expected 'auto', a list of patterns or a function, got {self.select!r}")
        if isinstance(self.budget, bool):
            raise TypeError(f"budget: expected a fraction > 0 or None, got {self.budget!r}")
        if self.is_auto and not (isinstance(self.budget, int | float) and 0 < self.budget < float("inf")):
            raise ValueError(f"budget: expected a fraction > 0 with select='auto', got {self.budget!r}")
        if not self.is_auto and self.budget is not None:
            raise ValueError(f"budget: expected it with select='auto' only, got {self.budget!r}")

    @property
    def is_auto(self) -> bool:
        """Whether the parameters are chosen by measured drift."""
        return isinstance(self.select, str)

    def chooses(self, name: str, param: Tensor) -> bool:
        """Whether a parameter can ever be synchronized."""
        if self.select is None or self.is_auto:
            return True
        if callable(self.select):
            return bool(self.select(name, param))
        return any(fnmatchcase(name, pattern) for pattern in self.select)

    def fingerprint(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, object]:
        """Return what ranks must have in common. Raises ValueError where ``select`` chooses no parameter."""
        chosen = [name for name, param in named if self.chooses(name, param)]
        if not chosen:
            raise ValueError(f"select: expected it to choose at least one parameter, got none by {self.select!r}")
        return {
            "momentum_sync": (self.every, self.schedule, self.is_auto, self.budget, self.dtype),
            "the parameters whose momentum is synchronized": chosen,
        }

    def piece(self, step: int) -> tuple[int, int] | None:
        """Return (i, k) where the i-th of k equal pieces of the elements is due in a step; None where nothing is."""
        if self.schedule == "staggered":
            return step % self.every, self.every
        return (0, 1) if (step + 1) % self.every == 0 else None


def check_momentum_sync(value: object) -> MomentumSync | None:
    """Return ``value``. Raises TypeError unless it is a `MomentumSync` or None."""
    if value is None or isinstance(value, MomentumSync):
        return value
    raise TypeError(f"momentum_sync: expected None or MomentumSync(...), got {type(value).__name__} {value!r}")


@dataclass(frozen=True)
class Segment:
    """Elements ``start`` to ``end`` of the slot ``index`` of a bucket, the first at the beginning of a block."""

    index: int
    start: int
    end: int

    @property
    def part(self) -> slice:
        """Of the slot's elements."""
        return slice(self.start, self.end)

    @property
    def padded(self) -> int:
        """Values in a message: whole blocks, so that no block's scale depends on the rest of the message."""
        return _blocks(self.end - self.start) * BLOCK


def segments_of(
    buckets: BucketList, chosen: frozenset[int], piece: tuple[int, int] | None
) -> dict[Bucket, tuple[Segment, ...]]:
    """Return the segments of each bucket that are due: the i-th of k equal pieces of the parameters ``chosen`` by id.

    ``piece`` is (i, k), or None where nothing is due.
    """
    found: dict[Bucket, list[Segment]] = {}
    if piece is None:
        return {}
    places = [place for place in buckets.slots if place[2].param_id in chosen]
    # pieces are those of whole parameters, so that a shard's are the same elements
    parts = [(slot.part.first, slot.part.numel) if slot.part.is_run else (0, slot.numel) for *_, slot in places]
    blocks = sum(_blocks(numel) for _, numel in parts)
    first, last = (blocks * i // piece[1] for i in (piece[0], piece[0] + 1))
    before = 0
    for (bucket, j, slot), (begin, numel) in zip(places, parts, strict=True):
        start = max((first - before) * BLOCK - begin, 0)
        end = min((last - before) * BLOCK - begin, slot.numel)
        before += _blocks(numel)
        if start < end:
            found.setdefault(bucket, []).append(Segment(j, start, end))
    return {bucket: tuple(segments) for bucket, segments in found.items()}


def chosen_ids(policy: MomentumSync, buckets: BucketList, drift: Mapping[int, float]) -> frozenset[int]:
    """Return the ids of the parameters that are synchronized: those selected, or by descending drift up to the budget.

    ``drift`` is by id; without one, or with one of 0, a parameter is not chosen by drift. One that is too large for the
    rest of the budget is passed over.
    """
    slots = [slot for *_, slot in buckets.slots]
    if not policy.is_auto:
        return frozenset(slot.param_id for slot in slots if policy.chooses(slot.name, slot.param))
    assert policy.budget is not None
    # of parameters, not of buckets, whose number depends on the links
    votes = sum(slot.n_bytes * bucket.compression.form.bits for bucket, _, slot in buckets.slots)
    room, chosen = policy.budget * votes * policy.every, []
    drifting = [slot for slot in slots if drift.get(slot.param_id, 0) > 0]
    for slot in sorted(drifting, key=lambda slot: (-drift[slot.param_id], slot.param_id)):
        cost = payload_bytes(_blocks(slot.numel) * BLOCK, policy.dtype)
        if cost <= room:
            room -= cost
            chosen.append(slot.param_id)
    return frozenset(chosen)


def _blocks(n: int) -> int:
    return -(-n // BLOCK)
