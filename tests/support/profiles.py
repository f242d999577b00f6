"""Profiles of made-up groups."""

from __future__ import annotations

from collections.abc import Callable

from lioncub.collectives.cost import bytes_sent, candidates
from lioncub.collectives.probing import MESSAGE_BYTES
from lioncub.collectives.profile import Point, Profile, fit_line
from lioncub.collectives.topology import Topology


def profile_of(shape: Topology, seconds: Callable[[str, str, int], float]) -> Profile:
    """A profile whose votes take ``seconds(level, algorithm, bytes sent)``."""
    levels = [("whole", shape)]
    if shape.is_two_level:
        levels += [("intra", Topology.flat(shape.local_size)), ("inter", Topology.flat(shape.n_nodes))]
    fits = []
    for level, group in levels:
        for name in candidates(group):
            sent = [bytes_sent(name, n, group, 48) for n in MESSAGE_BYTES]
            points = [Point(n, s, seconds(level, name, s)) for n, s in zip(MESSAGE_BYTES, sent, strict=True)]
            fits.append(fit_line(level, name, points))
    hosts = tuple(f"host{i}" for i in range(shape.n_nodes))
    versions = {"lioncub": "1", "torch": "2", "python": "3"}
    return Profile(shape.workers, hosts, shape.nodes, "gloo", "2026-01-01 00:00 UTC", versions, tuple(fits))


def straight(level: str, algorithm: str, sent: int) -> float:
    alpha, beta = {"inter": (2e-3, 1e-7), "intra": (1e-3, 1e-9)}.get(level, (3e-3, 1e-8))
    return alpha * (1 + len(algorithm) % 3) + beta * sent
