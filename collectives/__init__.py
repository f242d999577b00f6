"""Collectives of packed votes on torch.distributed: how messages travel, and which way is cheapest."""

from lioncub.collectives.average import average_
from lioncub.collectives.cost import ALGORITHMS, Link, bytes_sent, choose, predicted_seconds
from lioncub.collectives.errors import WorkersDisagreeError
from lioncub.collectives.handshake import HANDSHAKE_BYTES, handshake
from lioncub.collectives.vote import PendingVote, Voter, vote, vote_async

__all__ = [
    "ALGORITHMS",
    "HANDSHAKE_BYTES",
    "Link",
    "PendingVote",
    "Voter",
    "WorkersDisagreeError",
    "average_",
    "bytes_sent",
    "choose",
    "handshake",
    "predicted_seconds",
    "vote",
    "vote_async",
]
