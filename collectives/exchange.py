"""What every way of voting has in common: it moves in phases and ends in a tally.

`advance` waits for the phase under way and starts the next, so that many exchanges can be in flight at once, in an
order that the caller keeps the same on all workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.cost import RESULT_HEADER_BYTES, chunk_bytes
from lioncub.collectives.counting import Count
from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.handshake import WIRE_VERSION
from lioncub.collectives.header import combined_status
from lioncub.collectives.routes import Routes
from lioncub.collectives.transport import LATER, AtOnce


@dataclass(frozen=True)
class Tally:
    """A finished vote: the packed result uint8[r*B], every worker's header uint8[N, H], and int64[2] counts.

    Counts are (ties, unanimous) among the 8*B codes, pad codes of the message included as unanimous.
    """

    packed: Tensor
    headers: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Terms:
    """How an exchange is to be made: parity of ties, groups, kernels, the tag of its messages, the format of codes.

    ``inbox`` has receives that are posted already, for messages that are sent all at once.
    """

    parity: int
    routes: Routes
    impl: str = "auto"
    tag: int = 0
    inbox: Inbox | None = None
    codes: Codes = VOTES

    @property
    def count(self) -> Count:
        """How the codes of all workers are counted."""
        return Count(self.codes, self.routes.workers, self.parity, self.impl)

    @property
    def result_bits(self) -> int:
        """Bits of a code of the result."""
        return self.codes.result_bits(self.routes.workers)


class Inbox:
    """Posted receives of both legs of one reduce-scatter vote, and where they put what arrives."""

    def __init__(self, routes: Routes, n_bytes: int, header_bytes: int, tag: int, codes: Codes) -> None:
        workers = routes.workers
        chunk = chunk_bytes(n_bytes, workers)
        there, back = header_bytes + chunk * codes.bits, RESULT_HEADER_BYTES + chunk * codes.result_bits(workers)
        self.received = torch.empty(workers, there, dtype=torch.uint8, device="cpu")
        self.replies = torch.empty(workers, back, dtype=torch.uint8, device="cpu")
        self.there = AtOnce(self.received, routes.group, tag)
        self.back = AtOnce(self.replies, routes.group, tag + LATER)


class Phase:
    """The collectives under way, whose messages are on ``device``, and the host's time for starting and awaiting them.

    On a GPU a wait holds up the current stream alone, so each stream that reads what arrives must wait for itself.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._works: list[Any] = []
        # the streams that wait for the works already; on a CPU there is one
        self._waited: set[object] = set()

    def start(self, *starters: Callable[[], Any]) -> None:
        """Start the collectives of the next phase."""
        began = time.perf_counter()
        self._works, self._waited = [start() for start in starters], set()
        self.seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Wait for all of them, on the host or on the current stream."""
        began = time.perf_counter()
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if stream not in self._waited:
            for work in self._works:
                work.wait()
            self._waited.add(stream)
        self.seconds += time.perf_counter() - began


class Exchange:
    """A vote under way, of one phase unless `advance` says otherwise; a subclass starts the first on construction."""

    def __init__(self, terms: Terms, device: torch.device) -> None:
        self._terms = terms
        self._phase = Phase(device)

    @property
    def seconds(self) -> float:
        """Time that the host spent starting and awaiting collectives."""
        return self._phase.seconds

    def advance(self) -> bool:
        """Wait for the phase under way and start the next; in the last phase do nothing and return False."""
        return False

    def headers(self) -> Tensor:
        """Everyone's header uint8[N, H]; waits for them, and is there when `advance` has returned False."""
        raise NotImplementedError

    def result(self) -> Tally:
        """Run all remaining phases and give the result."""
        raise NotImplementedError


def headed_rows(packed: Tensor, header: Tensor, n_rows: int, width: int) -> Tensor:
    """uint8[n_rows, H + width]: the header, then the bytes of ``packed`` row by row, zeros where they end."""
    message = packed.new_zeros(n_rows, header.numel() + width)
    message[:, : header.numel()] = header
    _fill_rows(packed, message[:, header.numel() :])
    return message


def _fill_rows(packed: Tensor, rows: Tensor) -> None:
    """Fill ``rows`` [N, C] with the bytes of ``packed``, row by row; what is left over stays as it is."""
    width = rows.shape[1]
    if width == 0:
        return
    whole = packed.numel() // width
    rows[:whole] = packed[: whole * width].view(whole, width)
    rest = packed[whole * width :]
    if rest.numel():
        rows[whole, : rest.numel()] = rest


def new_reply(headers: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """An answer to ``headers`` uint8[N, H]: the whole message, its voted chunk, and its int64[2] counts, as views."""
    reply = torch.empty(RESULT_HEADER_BYTES + chunk, dtype=torch.uint8, device=headers.device)
    words = reply[:RESULT_HEADER_BYTES].view(torch.int64)
    words[0] = WIRE_VERSION
    words[1] = combined_status(headers)
    words[2:] = 0
    return reply, reply[RESULT_HEADER_BYTES:], words[2:]


def join_replies(replies: Tensor, n_bytes: int, bits: int) -> tuple[Tensor, Tensor]:
    """The result, 8*n_bytes codes of ``bits``, and the counts from everyone's answer uint8[N, 32 + bits*C].

    Answers are in the order of the chunks.
    Every worker must have seen the same headers; otherwise the network or a kernel is broken.
    """
    words = replies[:, :RESULT_HEADER_BYTES].contiguous().view(torch.int64)
    said: Sequence[list[int]] = words[:, :2].tolist()
    if any(status != said[0] for status in said):
        raise WorkersDisagreeError(f"workers disagree on the wire version and status of a vote: {by_value(said)}")
    voted = replies[:, RESULT_HEADER_BYTES:]
    counts = words[:, 2:].sum(dim=0)
    # chunks are padded: those codes, 0 on every worker, were counted as unanimous
    counts[1] -= 8 * (voted.numel() // bits - n_bytes)
    return voted.reshape(-1)[: n_bytes * bits], counts
