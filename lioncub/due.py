"""Which elements of momentum are averaged in a step, by policy, parameters and measured drift: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lioncub.buckets import Bucket, Slot
from lioncub.collectives.average import BLOCK, payload_bytes
from lioncub.momentum_sync import MomentumSync


@dataclass(frozen=True)
class Stretch:
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
        """Values in a message: whole blocks, so that no block's scale depends on what else is in the message."""
        return _blocks(self.end - self.start) * BLOCK


def slots_of(buckets: Sequence[Bucket]) -> list[tuple[int, int, Slot]]:
    """(bucket, place in it, slot) in the order of the parameters, whatever the buckets."""
    found = [(i, j, slot) for i, bucket in enumerate(buckets) for j, slot in enumerate(bucket.slots)]
    return sorted(found, key=lambda place: place[2].number)


def due_stretches(
    buckets: Sequence[Bucket], chosen: frozenset[int], piece: tuple[int, int] | None
) -> list[tuple[Stretch, ...]]:
    """By bucket, the i-th of k equal pieces of all elements of the slots with these numbers; ``piece`` is (i, k)."""
    found: list[list[Stretch]] = [[] for _ in buckets]
    if piece is None:
        return [() for _ in buckets]
    places = [place for place in slots_of(buckets) if place[2].number in chosen]
    blocks = sum(_blocks(slot.numel) for *_, slot in places)
    first, last = (blocks * i // piece[1] for i in (piece[0], piece[0] + 1))
    before = 0
    for i, j, slot in places:
        start, end = max(first - before, 0) * BLOCK, min((last - before) * BLOCK, slot.numel)
        before += _blocks(slot.numel)
        if start < end:
            found[i].append(Stretch(j, start, end))
    return [tuple(stretches) for stretches in found]


def chosen_slots(policy: MomentumSync, buckets: Sequence[Bucket], drift: Mapping[int, float]) -> frozenset[int]:
    """Numbers of the slots that are synchronized: those selected, or by descending drift as many as the budget allows.

    ``drift`` is by number; without one, or with one of 0, a slot is not chosen by drift. One that is too large for what
    is left of the budget is passed over.
    """
    slots = [slot for *_, slot in slots_of(buckets)]
    if not policy.is_auto:
        return frozenset(slot.number for slot in slots if policy.chooses(slot.name, slot.param))
    assert policy.budget is not None
    votes = sum(bucket.n_bytes * bucket.compression.codes.bits for bucket in buckets)
    room, chosen = policy.budget * votes * policy.every, []
    drifting = [slot for slot in slots if drift.get(slot.number, 0) > 0]
    for slot in sorted(drifting, key=lambda slot: (-drift[slot.number], slot.number)):
        cost = payload_bytes(_blocks(slot.numel) * BLOCK, policy.dtype)
        if cost <= room:
            room -= cost
            chosen.append(slot.number)
    return frozenset(chosen)


def _blocks(n: int) -> int:
    return -(-n // BLOCK)
