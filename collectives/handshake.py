"""The startup handshake: workers compare what they are about to do before a message of their own size travels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.transport import Group, all_gather, device_of, gather_objects, world_size_of

WIRE_VERSION = 2
HANDSHAKE_BYTES = 16

T = TypeVar("T")


class _Failure:
    """What a rank says in place of what it is about to do: its own arguments are wrong."""

    def __init__(self, error: Exception) -> None:
        self.text = f"{type(error).__name__}: {error}"

    def __repr__(self) -> str:
        return f"failed with {self.text}"


def digest(value: object) -> int:
    """A signed 64-bit hash of ``repr(value)``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def handshake(facts: Mapping[str, object], *, group: Group, device: torch.device | None) -> None:
    """Compare ``facts`` on all workers of ``group``; a collective call of `HANDSHAKE_BYTES` per worker.

    Messages are on ``device`` where the group carries nothing on the CPU.

    1. Every worker gathers everyone's (wire version, hash of the facts): a fixed size, so it cannot be mismatched.
    2. Only where they differ, the facts themselves are gathered, to say which and where.

    Raises WorkersDisagreeError on all workers, naming the first fact that differs and each rank's value.
    """
    stated = gather_where_different({"wire version": WIRE_VERSION, **facts}, group, device)
    if stated is None:
        return
    for name in dict.fromkeys(key for facts_of_rank in stated for key in facts_of_rank):
        values = [facts_of_rank.get(name, "(not stated)") for facts_of_rank in stated]
        if any(value != values[0] for value in values):
            raise WorkersDisagreeError(f"workers disagree on {name}: {by_value(values)}")
    raise AssertionError(f"hashes differ, facts do not: {stated}")


@contextmanager
def agreement(group: Group, device: torch.device | None = None) -> Iterator[dict[str, object]]:
    """`handshake` of the facts that the body puts into the dict it gets; a collective call.

    A body that raises tells the others, so that none waits for a worker that will not come: the error goes on here, and
    all others raise WorkersDisagreeError, which names the rank and the error. The body itself must not communicate.
    ``device`` as in `handshake`.
    """
    facts: dict[str, object] = {}
    with telling(group, device):
        yield facts
    world_size_of(group)
    handshake(facts, group=group, device=device)


@contextmanager
def telling(group: Group, device: torch.device | None = None) -> Iterator[None]:
    """Tell the other workers, who are in the next `handshake` or `gather_where_different`, of an error in the body."""
    try:
        yield
    except Exception as error:
        try:
            # raises where this process is in no such group, and there is nobody to tell
            world_size_of(group)
            _gather(_Failure(error), group, device)
        except Exception as unreachable:
            error.add_note(f"the other workers could not be told: {unreachable}")
        raise


def gather_where_different(value: T, group: Group, device: torch.device | None) -> list[T] | None:
    """Everyone's ``value``, or None where hashes say that all are alike; a collective call.

    Raises WorkersDisagreeError where a worker could not take part.
    """
    stated = _gather(value, group, device)
    if stated is not None:
        for rank, said in enumerate(stated):
            if isinstance(said, _Failure):
                raise WorkersDisagreeError(f"no worker went on, because of an error on rank {rank}: {said.text}")
    return stated


def _gather(value: T, group: Group, device: torch.device | None) -> list[T] | None:
    # wherever a caller's data is, all workers must meet on one backend
    device = device_of(group, device)
    # facts are the same in whatever order they are stated
    compared = sorted(value.items()) if isinstance(value, dict) else value
    mine = torch.tensor([WIRE_VERSION, digest(compared)], dtype=torch.int64, device=device)
    size = world_size_of(group)
    everyone = torch.empty(2 * size, dtype=torch.int64, device=device)
    all_gather(everyone, mine, group).wait()
    rows = everyone.view(size, 2).tolist()
    return None if all(row == rows[0] for row in rows) else gather_objects(value, group, device)
