"""Profiles of made-up groups, whose votes take exactly as long as the cost model says."""

from __future__ import annotations

from lioncub.collectives import Costs, Link, Profile, Topology
from lioncub.collectives.cost import candidates
from lioncub.collectives.probe import MESSAGE_BYTES
from lioncub.collectives.profile import Point

INTER, INTRA = Link(2e-3, 12.5e6), Link(1e-4, 1e9)


def points_of(shape: Topology, inter: Link = INTER, intra: Link = INTRA) -> list[Point]:
    """The votes that a probe would time on these links."""
    levels = [("whole", Costs(shape, inter, intra))]
    if shape.is_two_level:
        # all places of a node share its link
        share = Link(inter.latency_s, inter.bytes_per_s / shape.local_size)
        levels.append(("intra", Costs(Topology.even(1, shape.local_size), inter, intra)))
        levels.append(("inter", Costs(Topology.flat(shape.n_nodes), share, intra)))
    return [
        Point(level, name, n_bytes, costs.seconds(name, n_bytes))
        for level, costs in levels
        for name in candidates(costs.topology)
        for n_bytes in MESSAGE_BYTES
    ]


def profile_of(shape: Topology, inter: Link = INTER, intra: Link = INTRA) -> Profile:
    """The profile of a group with these links."""
    hosts = tuple(f"host{i}" for i in range(shape.n_nodes))
    versions = {"lioncub": "1", "torch": "2", "python": "3"}
    about = ("gloo", "2026-01-01 00:00 UTC", versions)
    points = tuple(points_of(shape, inter, intra))
    return Profile(shape.workers, hosts, shape.nodes, *about, inter, intra, 0.01, points)
