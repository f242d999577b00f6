"""The startup handshake: workers compare what they are about to do before a message of their own size travels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.transport import Group, all_gather, gather_objects, world_size_of

WIRE_VERSION = 2
HANDSHAKE_BYTES = 16


def digest(value: object) -> int:
    """A signed 64-bit hash of ``repr(value)``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def handshake(facts: Mapping[str, object], *, group: Group, device: torch.device) -> None:
    """Compare ``facts`` on all workers of ``group``; a collective call of `HANDSHAKE_BYTES` per worker.

    1. Every worker gathers everyone's (wire version, hash of the facts): a fixed size, so it cannot be mismatched.
    2. Only where they differ, the facts themselves are gathered, to say which and where.

    Raises WorkersDisagreeError on all workers, naming the first fact that differs and each rank's value.
    """
    mine = torch.tensor([WIRE_VERSION, digest(sorted(facts.items()))], dtype=torch.int64, device=device)
    size = world_size_of(group)
    everyone = torch.empty(2 * size, dtype=torch.int64, device=device)
    all_gather(everyone, mine, group).wait()
    rows = everyone.view(size, 2).tolist()
    if all(row == rows[0] for row in rows):
        return
    stated = gather_objects({"wire version": WIRE_VERSION, **facts}, group, device)
    for name in dict.fromkeys(key for facts_of_rank in stated for key in facts_of_rank):
        values = [facts_of_rank.get(name, "(not stated)") for facts_of_rank in stated]
        if any(value != values[0] for value in values):
            raise WorkersDisagreeError(f"workers disagree on {name}: {by_value(values)}")
    raise AssertionError(f"hashes differ, facts do not: {stated}")
