"""Collectives of packed votes on torch.distributed: how messages travel, and which way is cheapest."""

from lioncub.collectives.average import average_
from lioncub.collectives.codes import Codes
from lioncub.collectives.cost import ALGORITHMS, Costs, Link, LinkCosts, bytes_sent, choose, default_costs
from lioncub.collectives.errors import WorkersDisagreeError
from lioncub.collectives.handshake import HANDSHAKE_BYTES, handshake
from lioncub.collectives.profile import Profile
from lioncub.collectives.routes import Routes
from lioncub.collectives.topology import Topology, find_topology
from lioncub.collectives.traffic import traffic
from lioncub.collectives.vote import PendingVote, Voter, vote, vote_async

__all__ = [
    "ALGORITHMS",
    "HANDSHAKE_BYTES",
    "Codes",
    "Costs",
    "Link",
    "LinkCosts",
    "PendingVote",
    "Profile",
    "Routes",
    "Topology",
    "Voter",
    "WorkersDisagreeError",
    "average_",
    "bytes_sent",
    "choose",
    "default_costs",
    "find_topology",
    "handshake",
    "traffic",
    "vote",
    "vote_async",
]
