"""The vote as a collective: `vote` for one message, `Voter` for messages of one size over and over."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.algorithms import EXCHANGES, Exchange, Tally
from lioncub.collectives.cost import Link, bytes_sent, choose
from lioncub.collectives.handshake import handshake
from lioncub.collectives.header import Header, check_agreement, decode_headers, encode_header, header_bytes
from lioncub.collectives.transport import Group, world_size_of


class Voter:
    """Carries votes on messages of ``n_bytes`` about ``n_tensors`` tensors, without a handshake of its own.

    The caller has made sure, by `handshake`, that all workers' voters are alike. ``algorithm`` is the one that runs,
    ``bytes_sent`` the bytes that each worker sends per vote, headers included.
    """

    def __init__(
        self,
        n_bytes: int,
        *,
        n_tensors: int = 0,
        group: Group = None,
        algorithm: str = "auto",
        link: Link | None = None,
        impl: str = "auto",
    ) -> None:
        if n_bytes % 8:
            raise ValueError(f"n_bytes: expected a multiple of 8 (a padded message), got {n_bytes}")
        self.n_bytes, self.n_tensors, self.group = n_bytes, n_tensors, group
        self.world_size = world_size_of(group)
        head = header_bytes(n_tensors)
        self.algorithm = choose(algorithm, n_bytes, self.world_size, link or Link(), head)
        self.bytes_sent = bytes_sent(self.algorithm, n_bytes, self.world_size, head)
        self._impl = impl

    def start(self, packed: Tensor, header: Header, status: Tensor | None = None) -> Exchange:
        """Send uint8[n_bytes] ``packed``; ties follow the parity of ``header.step``.

        ``status`` (int32[n_tensors], non-zero where a tensor is not finite) travels in the header.
        """
        assert packed.numel() == self.n_bytes
        encoded = encode_header(header, packed.device, status)
        exchange: Exchange = EXCHANGES[self.algorithm](packed, encoded, header.step, self.group, self._impl)
        return exchange


class PendingVote:
    """Handle of a vote under way."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def wait(self) -> Tensor:
        """The packed majority uint8[B]. Raises WorkersDisagreeError on all workers where they disagree."""
        tally: Tally = self._exchange.result()
        check_agreement(decode_headers(tally.headers, 0))
        return tally.packed


def vote_async(
    packed: Tensor, *, group: Group = None, algorithm: str = "auto", parity: int = 0, impl: str = "auto"
) -> PendingVote:
    """Start `vote` and return a handle, whose ``wait()`` gives the result; the handshake is over on return.

    Handles started by one worker must be waited for in the same order on all workers.
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected a uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
    if packed.dim() != 1 or not packed.is_contiguous() or packed.numel() % 8:
        raise ValueError(
            f"packed: expected a contiguous tensor of shape (B,), B a multiple of 8, got shape {tuple(packed.shape)} "
            f"with strides {packed.stride()}"
        )
    facts = {"the bytes of the message": packed.numel(), "the algorithm": algorithm, "the parity": parity & 1}
    handshake(facts, group=group, device=packed.device)
    voter = Voter(packed.numel(), group=group, algorithm=algorithm, impl=impl)
    return PendingVote(voter.start(packed, Header(step=parity & 1)))


def vote(
    packed: Tensor, *, group: Group = None, algorithm: str = "auto", parity: int = 0, impl: str = "auto"
) -> Tensor:
    """The exact majority of all workers' packed one-bit codes (Lion Cub, arXiv 2411.16462, section 1).

    A collective call: every worker of ``group`` calls it with a message of the same size. A handshake of
    `HANDSHAKE_BYTES` per worker goes first, so that workers that disagree on size, algorithm or parity all raise
    instead of hanging; those who vote on one size over and over save it with `Voter`.

    Args:
        packed: uint8[B] of packed codes, B a multiple of 8; not changed.
        group: process group; the default group unless given.
        algorithm: "all_gather" (one phase, everyone votes on everything), "reduce_scatter" (all-to-all of chunks,
            vote, all-gather) or "auto" (the one that `cost.predicted_seconds` finds faster).
        parity: step counter t; a tie at code j gives bit (j + t) & 1.
        impl: implementation of the voting kernel.

    Returns:
        uint8[B], the same bytes on every worker. Raises WorkersDisagreeError on all workers where they disagree.
    """
    return vote_async(packed, group=group, algorithm=algorithm, parity=parity, impl=impl).wait()
