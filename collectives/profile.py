"""A profile: the measured votes of one group, the links that were fitted to them, and the file that keeps both."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from lioncub.collectives.cost import ALGORITHMS, Costs, Link
from lioncub.collectives.groups import Topology

T = TypeVar("T")

FORMAT = 2
LEVELS = ("whole", "intra", "inter")
# a profile of a thousand ranks has some tens of thousands
_MOST_BYTES = 2**24
_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a text", int: "a number"}


@dataclass(frozen=True)
class Point:
    """A measured vote of ``n_bytes`` of one bit per code: median seconds of the slowest rank.

    ``level`` is "whole" (all ranks), "intra" (those of each node by themselves, all nodes at once) or "inter" (those
    with the same place on every node, all places at once).
    """

    level: str
    algorithm: str
    n_bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The measured votes of one group, and the links that were fitted to them.

    ``nodes`` are the group's ranks by node, ``hosts`` a host name for each node, ``versions`` those of lioncub, torch
    and python. ``error`` is the root mean square of relative errors of predictions over points of level "whole".
    """

    world_size: int
    hosts: tuple[str, ...]
    nodes: tuple[tuple[int, ...], ...]
    backend: str
    date: str
    versions: dict[str, str]
    inter: Link
    intra: Link
    error: float
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        """Raise ValueError where fields contradict each other."""
        topology = self.topology
        if topology.workers != self.world_size or len(self.hosts) != topology.n_nodes:
            raise ValueError(f"nodes: expected {self.world_size} ranks on {len(self.hosts)} hosts, got {self.nodes}")
        for point in self.points:
            if point.level not in LEVELS or point.algorithm not in ALGORITHMS:
                raise ValueError(f"points: expected a known level and algorithm, got {point.level}, {point.algorithm}")
            if not (point.n_bytes > 0 and 0 < point.seconds < float("inf")):
                raise ValueError(f"points: expected finite numbers > 0, got {point}")

    @property
    def topology(self) -> Topology:
        """The group's nodes. Raises ValueError where ``nodes`` are none."""
        return Topology(self.nodes)

    @property
    def about(self) -> str:
        """The group and the date, e.g. ``4 nodes of 1 worker over gloo on 2026-01-01``."""
        return f"{self.topology.describe()} over {self.backend} on {self.date}"

    def costs(self, topology: Topology, backend: str) -> Costs:
        """Return the cost model of a group.

        Raises ValueError where the group's world size, nodes or backend are not those that were measured.
        """
        facts = (
            ("world size", self.world_size, topology.workers),
            ("nodes", self.topology.describe(), topology.describe()),
            ("ranks of the nodes", self.nodes, topology.nodes),
            ("backend", self.backend, backend),
        )
        for name, measured, got in facts:
            if measured != got:
                raise ValueError(f"profile: expected this group's {name}, {got}, got a profile of {measured}")
        return Costs(topology, self.inter, self.intra, f"measured on {self.about}", self.error)

    def predicted(self, point: Point) -> float:
        """Return the cost model's seconds of a point of all ranks."""
        return Costs(self.topology, self.inter, self.intra).seconds(point.algorithm, point.n_bytes)

    def to_json(self) -> str:
        """Return the profile as indented JSON text."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Profile:
        """Read a profile that `lioncub probe` wrote.

        Raises ValueError, naming the file, where it cannot be read or is not a profile of this format.
        """
        try:
            size = Path(path).stat().st_size
            if size > _MOST_BYTES:
                raise ValueError(f"expected a file of at most {_MOST_BYTES:,} bytes, got {size:,}")
            return _from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"profile {path}: expected JSON, got something else: {error}") from error
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ValueError(f"profile {path}: cannot be read: {reason}") from error
        except ValueError as error:
            raise ValueError(f"profile {path}: {error}") from error


def _from_dict(raw: Any) -> Profile:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format", "none") if isinstance(raw, dict) else type(raw).__name__
        raise ValueError(f"format: expected {FORMAT}, as this version of lioncub writes it, got {got}")
    names = [field.name for field in dataclasses.fields(Profile)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise ValueError(f"fields: expected {', '.join(names)}, got none of {', '.join(missing)}")
    links = {name: _link_of(name, raw[name]) for name in ("inter", "intra")}
    versions = _typed("versions", raw["versions"], dict)
    return Profile(
        world_size=_count("world_size", raw["world_size"]),
        hosts=tuple(_text("hosts", host) for host in _typed("hosts", raw["hosts"], list)),
        nodes=tuple(
            tuple(_count("nodes", rank) for rank in _typed("nodes", ranks, list))
            for ranks in _typed("nodes", raw["nodes"], list)
        ),
        backend=_text("backend", raw["backend"]),
        date=_text("date", raw["date"]),
        versions={_text("versions", name): _text("versions", version) for name, version in versions.items()},
        error=_number("error", raw["error"]),
        points=tuple(map(_point_of, _typed("points", raw["points"], list))),
        **links,
    )


def _link_of(name: str, raw: Any) -> Link:
    fields = _with_fields(name, raw, ("latency_s", "bytes_per_s"))
    return Link(*(_number(f"{name}.{field}", value) for field, value in fields.items()))


def _point_of(raw: Any) -> Point:
    fields = _with_fields("points", raw, ("level", "algorithm", "n_bytes", "seconds"))
    return Point(
        _text("points.level", fields["level"]),
        _text("points.algorithm", fields["algorithm"]),
        _count("points.n_bytes", fields["n_bytes"]),
        _number("points.seconds", fields["seconds"]),
    )


def _with_fields(name: str, raw: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return these fields of an object, in this order."""
    found = _typed(name, raw, dict)
    for field in fields:
        if field not in found:
            raise ValueError(f"{name}: expected the field {field}, got none")
    return {field: found[field] for field in fields}


def _typed(name: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name}: expected {_NAMES[kind]}, got {reprlib.repr(value)}")
    return value


def _text(name: str, value: Any) -> str:
    """Return a text that a terminal shows as it is."""
    text = _typed(name, value, str)
    if not text.isprintable():
        raise ValueError(f"{name}: expected printable text, got {reprlib.repr(text)}")
    return text


def _count(name: str, value: Any) -> int:
    count = _typed(name, value, int)
    if count < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {count}")
    return count


def _number(name: str, value: Any) -> float:
    # float raises for an integer past its range
    number = float(value) if isinstance(value, float) or abs(_typed(name, value, int)) < 2**64 else math.inf
    if math.isnan(number):
        raise ValueError(f"{name}: expected a number, got {number}")
    return number
