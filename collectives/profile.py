"""What a probe measured of a group, as JSON, and the times that it predicts."""

from __future__ import annotations

import dataclasses
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.cost import EFFICIENCY, Link
from lioncub.collectives.topology import Topology
from lioncub.collectives.traffic import ALGORITHMS, bytes_sent, candidates, describe

FORMAT = 1
LEVELS = ("whole", "intra", "inter")


@dataclass(frozen=True)
class Point:
    """A measured vote: bytes of the message, bytes that each worker sent for it, seconds of the slowest worker."""

    n_bytes: int
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class Fit:
    """alpha + beta * bytes for one algorithm on one level, and the points that it was fitted to, by ascending bytes.

    ``level`` is "whole" (all workers), "intra" (those of each node by themselves, all nodes at once) or "inter" (those
    with the same place on every node, all places at once). ``error`` is the root mean square of the relative errors.
    """

    level: str
    algorithm: str
    alpha_s: float
    beta_s_per_byte: float
    error: float
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Profile:
    """The measured times of one group.

    ``nodes`` are the group's ranks by node, ``hosts`` a host name for each node, ``versions`` those of lioncub, torch
    and python.
    """

    world_size: int
    hosts: tuple[str, ...]
    nodes: tuple[tuple[int, ...], ...]
    backend: str
    date: str
    versions: dict[str, str]
    fits: tuple[Fit, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where fields contradict each other."""
        topology = self.topology
        if topology.workers != self.world_size or len(self.hosts) != topology.n_nodes:
            raise ValueError(f"nodes: expected {self.world_size} ranks on {len(self.hosts)} hosts, got {self.nodes}")
        for fit in self.fits:
            if fit.level not in LEVELS or fit.algorithm not in ALGORITHMS:
                raise ValueError(f"fits: expected a known level and algorithm, got {fit.level}, {fit.algorithm}")
            sent = [point.bytes_sent for point in fit.points]
            if not sent or sent != sorted(set(sent)):
                raise ValueError(f"points: expected ascending bytes_sent, got {sent} for {fit.level}, {fit.algorithm}")
            numbers = [fit.alpha_s, fit.beta_s_per_byte, fit.error, *(point.seconds for point in fit.points)]
            if not all(0 <= number < float("inf") for number in numbers):
                raise ValueError(f"fits: expected finite numbers >= 0, got {numbers} for {fit.level}, {fit.algorithm}")
        missing = [name for name in candidates(topology) if not any(self._is_whole(fit, name) for fit in self.fits)]
        if missing:
            raise ValueError(f"fits: expected one of every algorithm, got none of {', '.join(missing)}")

    @staticmethod
    def _is_whole(fit: Fit, algorithm: str) -> bool:
        return fit.level == "whole" and fit.algorithm == algorithm

    @property
    def topology(self) -> Topology:
        """The group's nodes. Raises ValueError where ``nodes`` are none."""
        return Topology(self.nodes)

    def fit(self, level: str, algorithm: str) -> Fit | None:
        """The fit of one algorithm on one level, where it was measured."""
        return next((fit for fit in self.fits if (fit.level, fit.algorithm) == (level, algorithm)), None)

    def costs(self, topology: Topology, backend: str) -> ProfileCosts:
        """Predicted times of a group.

        Raises ValueError where the group's world size, nodes or backend are not those that were measured.
        """
        facts = (
            ("world size", self.world_size, topology.workers),
            ("nodes", describe(self.topology), describe(topology)),
            ("ranks of the nodes", self.nodes, topology.nodes),
            ("backend", self.backend, backend),
        )
        for name, measured, got in facts:
            if measured != got:
                raise ValueError(f"profile: expected this group's {name}, {got}, got a profile of {measured}")
        return ProfileCosts(topology, f"measured on {self.about}", tuple(f for f in self.fits if f.level == "whole"))

    @property
    def about(self) -> str:
        """What was measured, and when."""
        return f"{describe(self.topology)} over {self.backend} on {self.date}"

    def links(self) -> tuple[Link | None, Link | None]:
        """(node's link to other nodes, worker's link inside a node) as all-gathers on them imply; None: not measured.

        Raises ValueError where a fitted bandwidth cannot be told from infinity.
        """
        if self.topology.n_nodes == 1:
            return None, self._link("whole", self.world_size, 1)
        if not self.topology.is_two_level:
            return self._link("whole", self.world_size, 1), None
        nodes, local = self.topology.n_nodes, self.topology.local_size
        return self._link("inter", nodes, local), self._link("intra", local, 1)

    def _link(self, level: str, size: int, sharing: int) -> Link:
        fit = self.fit(level, "all_gather")
        if fit is None or fit.beta_s_per_byte == 0 or size == 1:
            raise ValueError(f"profile: expected a measured bandwidth of an all_gather ({level}), got none")
        return Link(fit.alpha_s / (size - 1), sharing / (fit.beta_s_per_byte * EFFICIENCY["ring"]))

    def to_json(self) -> str:
        """The profile as indented JSON text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Profile:
        """Read a profile that `lioncub probe` wrote.

        Raises ValueError, naming the file, where it cannot be read or is not a profile of this format.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ValueError(f"profile {path}: cannot be read: {reason}") from error
        try:
            return _from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"profile {path}: expected JSON, got something else: {error}") from error
        except ValueError as error:
            raise ValueError(f"profile {path}: {error}") from error


@dataclass(frozen=True)
class ProfileCosts:
    """Times read off the measured points of the same group.

    Between points time is linear in the bytes sent; above the largest it goes on with the fitted beta; below the
    smallest it stays. Where noise made more bytes take less time, neighbouring points are averaged.
    """

    topology: Topology
    source: str
    fits: tuple[Fit, ...]
    is_measured: bool = True

    def seconds(self, algorithm: str, n_bytes: int, header_bytes: int = 0, codes: Codes = VOTES) -> float:
        """See `lioncub.collectives.cost.Costs`."""
        sent = bytes_sent(algorithm, n_bytes, self.topology, header_bytes, codes=codes)
        fit = next(fit for fit in self.fits if fit.algorithm == algorithm)
        return predicted_seconds(fit, sent)


def predicted_seconds(fit: Fit, sent: int) -> float:
    """Time of a vote for which each worker sends ``sent`` bytes."""
    sizes = [point.bytes_sent for point in fit.points]
    times = ascending([point.seconds for point in fit.points])
    if sent >= sizes[-1]:
        return times[-1] + fit.beta_s_per_byte * (sent - sizes[-1])
    if sent <= sizes[0]:
        return times[0]
    i = bisect_left(sizes, sent)
    share = (sent - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
    return times[i - 1] + share * (times[i] - times[i - 1])


def ascending(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence next to ``values`` in least squares: falling neighbours become their mean."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while blocks and blocks[-1][0] > mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return [mean for mean, count in blocks for _ in range(count)]


def fit_line(level: str, algorithm: str, points: Sequence[Point]) -> Fit:
    """alpha and beta, both >= 0, by least squares of the relative errors; ``points`` by ascending bytes."""
    rows = [(1 / p.seconds, p.bytes_sent / p.seconds) for p in points]
    aa, ab, bb = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    lines = [(a / aa, 0.0)]
    if bb > 0:
        lines.append((0.0, b / bb))
    # as good as equal sizes leave the slope open
    if determinant > 1e-12 * aa * bb:
        lines.append(((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant))

    def error(line: tuple[float, float]) -> float:
        return float((sum((line[0] * x + line[1] * y - 1) ** 2 for x, y in rows) / len(rows)) ** 0.5)

    alpha, beta = min((line for line in lines if min(line) >= 0), key=error)
    return Fit(level, algorithm, alpha, beta, error((alpha, beta)), tuple(points))


def _from_dict(raw: Any) -> Profile:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format", "none") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"format: expected {FORMAT}, as this version of lioncub writes it, got {got}")
    names = [field.name for field in dataclasses.fields(Profile)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise ValueError(f"fields: expected {', '.join(names)}, got none of {', '.join(missing)}")
    try:
        return Profile(
            world_size=int(raw["world_size"]),
            hosts=tuple(map(str, raw["hosts"])),
            nodes=tuple(tuple(map(int, ranks)) for ranks in raw["nodes"]),
            backend=str(raw["backend"]),
            date=str(raw["date"]),
            versions={str(name): str(version) for name, version in raw["versions"].items()},
            fits=tuple(_fit_from_dict(fit) for fit in raw["fits"]),
        )
    except KeyError as error:
        raise ValueError(f"fits: expected the field {error.args[0]}, got none") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"fields: expected those of a profile, got others: {error}") from error


def _fit_from_dict(raw: Any) -> Fit:
    points = tuple(Point(int(p["n_bytes"]), int(p["bytes_sent"]), float(p["seconds"])) for p in raw["points"])
    alpha, beta, error = (float(raw[name]) for name in ("alpha_s", "beta_s_per_byte", "error"))
    return Fit(str(raw["level"]), str(raw["algorithm"]), alpha, beta, error, points)
