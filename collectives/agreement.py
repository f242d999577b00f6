"""Agreement of ranks before a message of their own size is sent, and the error that all of them raise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from lioncub.collectives.transport import Group, PeerLostError, all_gather, device_of, gather_objects, world_size_of

WIRE_VERSION = 3
HANDSHAKE_BYTES = 16

T = TypeVar("T")


class WorkersDisagreeError(RuntimeError):
    """The ranks of one group are not doing the same thing: every one of them raises this, with the same text.

    Where one rank cannot do it at all, that one raises its own error and all others this, with its rank and its error.
    """


class _Failure:
    """Takes the place of the fingerprint of a rank whose own arguments are wrong."""

    def __init__(self, error: Exception) -> None:
        self.text, self.is_loss = f"{type(error).__name__}: {error}", isinstance(error, PeerLostError)

    def __repr__(self) -> str:
        return f"failed with {self.text}"


def by_value(values: Sequence[object]) -> str:
    """List the ranks that have each value, e.g. ``ranks 0, 1, 3: 0.1; rank 2: 0.2``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return "; ".join(
        f"rank{'s' if len(holders) > 1 else ''} {', '.join(map(str, holders))}: {value}"
        for value, holders in ranks.items()
    )


def digest(value: object) -> int:
    """Return a signed 64-bit hash of ``repr(value)``, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def handshake(fingerprint: Mapping[str, object], *, group: Group, device: torch.device | None) -> None:
    """Compare ``fingerprint``, values by name, on all ranks of ``group``; a collective of `HANDSHAKE_BYTES` per rank.

    Messages are on ``device`` where the group carries nothing on the CPU.

    1. Every rank gathers everyone's (wire version, hash of the fingerprint): a fixed size, so it cannot be mismatched.
    2. Only where they differ, the fingerprints themselves are gathered, to find what differs and where.

    Raises WorkersDisagreeError on all ranks, naming the first entry that differs and each rank's value.
    """
    stated = gather_where_different({"wire version": WIRE_VERSION, **fingerprint}, group, device)
    if stated is None:
        return
    for name in dict.fromkeys(key for facts_of_rank in stated for key in facts_of_rank):
        values = [facts_of_rank.get(name, "(not stated)") for facts_of_rank in stated]
        if any(value != values[0] for value in values):
            raise WorkersDisagreeError(f"workers disagree on {name}: {by_value(values)}")
    raise AssertionError(f"hashes differ, fingerprints do not: {stated}")


@contextmanager
def agreement(group: Group, device: torch.device | None = None) -> Iterator[dict[str, object]]:
    """`handshake` of the fingerprint, a dict that the body fills; a collective.

    A body that raises informs the others, so that none waits for a rank that will not come: the error goes on here, and
    all others raise WorkersDisagreeError, which names the rank and the error. The body itself must not communicate.
    ``device`` as in `handshake`.
    """
    fingerprint: dict[str, object] = {}
    with informing(group, device=device):
        yield fingerprint
    world_size_of(group)
    handshake(fingerprint, group=group, device=device)


@contextmanager
def informing(*groups: Group, device: torch.device | None = None) -> Iterator[None]:
    """Inform the ranks in the next `handshake` or `gather_where_different` of each group of an error in the body."""
    try:
        yield
    except Exception as error:
        for group in groups:
            try:
                # raises where this process is in no such group, and nobody waits
                world_size_of(group)
                _gather(_Failure(error), group, device)
            except Exception as unreachable:
                error.add_note(f"the other workers could not be told: {unreachable}")
        raise


def gather_where_different(value: T, group: Group, device: torch.device | None) -> list[T] | None:
    """Return everyone's ``value``, or None where hashes are equal; a collective.

    Raises WorkersDisagreeError where a rank could not take part, PeerLostError where it has lost another one.
    """
    stated = _gather(value, group, device)
    if stated is not None:
        for rank, theirs in enumerate(stated):
            if isinstance(theirs, _Failure):
                kind = PeerLostError if theirs.is_loss else WorkersDisagreeError
                raise kind(f"no worker went on, because of an error on rank {rank}: {theirs.text}")
    return stated


def _gather(value: T, group: Group, device: torch.device | None) -> list[T] | None:
    # wherever a caller's data is, all ranks must meet on one backend
    device = device_of(group, device)
    # the order in which entries are stated does not matter
    compared = sorted(value.items()) if isinstance(value, dict) else value
    mine = torch.tensor([WIRE_VERSION, digest(compared)], dtype=torch.int64, device=device)
    size = world_size_of(group)
    everyone = torch.empty(2 * size, dtype=torch.int64, device=device)
    all_gather(everyone, mine, group).wait()
    rows = everyone.view(size, 2).tolist()
    return None if all(row == rows[0] for row in rows) else gather_objects(value, group, device)
