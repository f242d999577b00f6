"""Collectives of packed votes on torch.distributed: the algorithms, and which one is cheapest."""

from lioncub.collectives.agreement import HANDSHAKE_BYTES, WorkersDisagreeError, handshake
from lioncub.collectives.average import average_
from lioncub.collectives.codes import CodeFormat
from lioncub.collectives.cost import (
    ALGORITHMS,
    Costs,
    Link,
    bytes_by_level,
    bytes_sent,
    choose,
    default_costs,
)
from lioncub.collectives.groups import ProcessGroups, Topology, find_topology
from lioncub.collectives.profile import Profile
from lioncub.collectives.transport import PeerLostError
from lioncub.collectives.vote import PendingVote, Voter, vote, vote_async

__all__ = [
    "ALGORITHMS",
    "HANDSHAKE_BYTES",
    "CodeFormat",
    "Costs",
    "Link",
    "PeerLostError",
    "PendingVote",
    "ProcessGroups",
    "Profile",
    "Topology",
    "Voter",
    "WorkersDisagreeError",
    "average_",
    "bytes_by_level",
    "bytes_sent",
    "choose",
    "default_costs",
    "find_topology",
    "handshake",
    "vote",
    "vote_async",
]
