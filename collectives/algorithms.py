"""How packed votes travel: each algorithm takes packed codes and gives the majority, the same bytes everywhere.

An exchange moves in phases. `advance` waits for the phase under way and starts the next, so that many exchanges can
be in flight at once, in an order that the caller keeps the same on all workers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lioncub.collectives.cost import RESULT_HEADER_BYTES, chunk_bytes
from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.handshake import WIRE_VERSION
from lioncub.collectives.header import combined_status
from lioncub.collectives.transport import Group, all_gather, all_to_all, world_size_of
from lioncub.kernels import majority_vote


@dataclass(frozen=True)
class Tally:
    """A finished vote: the packed majority uint8[B], every worker's header uint8[N, H], and int64[2] counts.

    Counts are (ties, unanimous) among the 8*B codes, pad codes of the message included as unanimous.
    """

    packed: Tensor
    headers: Tensor
    counts: Tensor


class Exchange(Protocol):
    """A vote under way; ``seconds`` is the time that the host spent starting and awaiting its collectives."""

    seconds: float

    def advance(self) -> None:
        """Wait for the phase under way and start the next; does nothing in the last phase."""

    def result(self) -> Tally:
        """Run all remaining phases and give the result."""


class AllGatherVote:
    """1. every worker gathers everyone's message; 2. every worker votes on all of it."""

    def __init__(self, packed: Tensor, header: Tensor, parity: int, group: Group, impl: str) -> None:
        self.seconds = 0.0
        self._parity, self._impl, self._header_bytes = parity, impl, header.numel()
        message = torch.cat([header, packed])
        self._received = packed.new_empty(world_size_of(group), message.numel())
        started = time.perf_counter()
        self._message = message
        self._work = all_gather(self._received.view(-1), message, group)
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """There is no second phase to start."""

    def result(self) -> Tally:
        """Wait, vote."""
        self.seconds += _wait(self._work)
        headers = self._received[:, : self._header_bytes]
        counts = torch.zeros(2, dtype=torch.int64, device=headers.device)
        ballots = self._received[:, self._header_bytes :]
        voted = majority_vote(ballots, parity=self._parity, counts=counts, impl=self._impl)
        return Tally(voted, headers, counts)


class ReduceScatterVote:
    """1. all-to-all: worker k receives everyone's k-th chunk; 2. it votes on it; 3. all-gather of the voted chunks."""

    def __init__(self, packed: Tensor, header: Tensor, parity: int, group: Group, impl: str) -> None:
        self.seconds = 0.0
        self._parity, self._impl, self._group = parity, impl, group
        self._n_bytes, self._header_bytes = packed.numel(), header.numel()
        self._workers = world_size_of(group)
        self._chunk = chunk_bytes(self._n_bytes, self._workers)
        self._message = packed.new_zeros(self._workers, self._header_bytes + self._chunk)
        self._message[:, : self._header_bytes] = header
        _scatter_rows(packed, self._message[:, self._header_bytes :])
        self._received = torch.empty_like(self._message)
        self._voted: Tensor | None = None
        started = time.perf_counter()
        self._work = all_to_all(self._received, self._message, group)
        self.seconds += time.perf_counter() - started

    def advance(self) -> None:
        """Wait for the chunks, vote on them, start gathering the voted ones."""
        if self._voted is not None:
            return
        self.seconds += _wait(self._work)
        headers = self._received[:, : self._header_bytes]
        device = headers.device
        reply = torch.empty(RESULT_HEADER_BYTES + self._chunk, dtype=torch.uint8, device=device)
        words = reply[:RESULT_HEADER_BYTES].view(torch.int64)
        words[0] = WIRE_VERSION
        words[1] = combined_status(headers)
        words[2:] = 0
        majority_vote(
            self._received[:, self._header_bytes :],
            parity=self._parity,
            out=reply[RESULT_HEADER_BYTES:],
            counts=words[2:],
            impl=self._impl,
        )
        self._reply = reply
        self._voted = torch.empty(self._workers, reply.numel(), dtype=torch.uint8, device=device)
        started = time.perf_counter()
        self._work = all_gather(self._voted.view(-1), reply, self._group)
        self.seconds += time.perf_counter() - started

    def result(self) -> Tally:
        """Run the second phase if need be and put the voted chunks together."""
        self.advance()
        assert self._voted is not None
        self.seconds += _wait(self._work)
        words = self._voted[:, :RESULT_HEADER_BYTES].contiguous().view(torch.int64)
        _check_replies(words)
        voted = self._voted[:, RESULT_HEADER_BYTES:].reshape(-1)[: self._n_bytes]
        counts = words[:, 2:].sum(dim=0)
        # chunks are padded: those codes, 0 on every worker, were counted as unanimous
        counts[1] -= 8 * (self._workers * self._chunk - self._n_bytes)
        return Tally(voted, self._received[:, : self._header_bytes], counts)


EXCHANGES: dict[str, Any] = {"all_gather": AllGatherVote, "reduce_scatter": ReduceScatterVote}


def _scatter_rows(packed: Tensor, rows: Tensor) -> None:
    """Fill ``rows`` [N, C] with the bytes of ``packed``, row by row; what is left over stays as it is."""
    width = rows.shape[1]
    if width == 0:
        return
    whole = packed.numel() // width
    rows[:whole] = packed[: whole * width].view(whole, width)
    rest = packed[whole * width :]
    if rest.numel():
        rows[whole, : rest.numel()] = rest


def _check_replies(words: Tensor) -> None:
    """Every worker must have seen the same headers; otherwise the network or a kernel is broken."""
    replies = words[:, :2].tolist()
    if any(reply != replies[0] for reply in replies):
        raise WorkersDisagreeError(f"workers disagree on the wire version and status of a vote: {by_value(replies)}")


def _wait(work: Any) -> float:
    started = time.perf_counter()
    work.wait()
    return time.perf_counter() - started
