"""The two links of a group: fitted to times, stored as a profile, measured over real Gloo processes."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by, same_on_all
from profiles import INTER, INTRA, points_of, profile_of

from lioncub.collectives import Costs, Link, ProcessGroups, Profile, Topology
from lioncub.collectives import probe as probe_module
from lioncub.collectives.cost import candidates, default_costs
from lioncub.collectives.probe import (
    FEWEST_SIZES,
    MESSAGE_BYTES,
    QUICK_BYTES,
    fit_links,
    measure_costs,
    probe,
)
from lioncub.collectives.profile import Point


def assert_like(found: Link, expected: Link) -> None:
    assert found.latency_s == pytest.approx(expected.latency_s, rel=1e-6, abs=1e-12)
    assert found.bytes_per_s == pytest.approx(expected.bytes_per_s, rel=1e-6)


@pytest.mark.parametrize("latency", [2e-3, 0.0])
@pytest.mark.parametrize(
    ("shape", "finds"),
    [
        (Topology.flat(2), ("inter",)),
        (Topology.flat(5), ("inter",)),
        (Topology.even(1, 3), ("intra",)),
        (Topology.even(2, 4), ("inter", "intra")),
        (Topology.even(3, 2), ("inter", "intra")),
        (Topology(((0, 1, 2), (3,))), ("inter",)),
    ],
)
def test_links_are_recovered_from_exact_times(shape: Topology, finds: tuple[str, ...], latency: float) -> None:
    links = {"inter": Link(latency, 12.5e6), "intra": Link(latency / 20, 1e9)}
    default = default_costs(shape, "gloo")
    inter, intra, error = fit_links(shape, points_of(shape, **links), default)
    # a link that no message crossed is the assumed one
    for name, found in (("inter", inter), ("intra", intra)):
        assert_like(found, links[name] if name in finds else getattr(default, name))
    assert error < 1e-6


@pytest.mark.parametrize("seed", range(8))
def test_no_link_nearby_fits_better(seed: int) -> None:
    rng, shape = random.Random(seed), Topology.flat(4)
    # every other one falls with the bytes, so that the limit of the bandwidth binds
    times = [(100 + (12 if seed % 2 else -12) * i) * rng.uniform(0.8, 1.2) for i in range(len(MESSAGE_BYTES))]
    points = [Point("whole", "all_gather", n, t) for n, t in zip(MESSAGE_BYTES, times, strict=True)]

    def error(latency: float, per_byte: float) -> float:
        costs = Costs(shape, Link(latency, 1 / per_byte), INTRA)
        return sum((costs.seconds(p.algorithm, p.n_bytes) / p.seconds - 1) ** 2 for p in points) / len(points)

    inter, _, found = fit_links(shape, points, default_costs(shape, "gloo"))
    least = error(inter.latency_s, 1 / inter.bytes_per_s)
    assert found == pytest.approx(least**0.5)
    for a, b in itertools.product((-1, 0, 1), repeat=2):
        latency, per_byte = inter.latency_s * (1 + a / 100), max(1 / inter.bytes_per_s + b * 1e-8, 1e-15)
        assert error(latency, per_byte) >= least * (1 - 1e-9)


def test_one_size_leaves_the_slope_open() -> None:
    inter, _, error = fit_links(
        Topology.flat(2), [Point("whole", "all_gather", 8, 2.0)], Costs(Topology.flat(2), INTER, INTRA)
    )
    assert error < 1e-6
    assert inter.latency_s in (0.0, 2.0)


@pytest.mark.parametrize("shape", [Topology.flat(2), Topology.even(1, 3), Topology.even(2, 4)])
def test_a_profile_comes_back_from_json_and_predicts(tmp_path: Path, shape: Topology) -> None:
    profile = profile_of(shape)
    (tmp_path / "profile.json").write_text(profile.to_json())
    assert Profile.load(tmp_path / "profile.json") == profile
    assert json.loads(profile.to_json())["format"] == 2
    costs = profile.costs(shape, "gloo")
    assert costs == Costs(
        shape, INTER, INTRA, f"measured on {shape.describe()} over gloo on 2026-01-01 00:00 UTC", 0.01
    )
    assert costs.is_measured
    for point in profile.points:
        if point.level == "whole":
            assert profile.predicted(point) == costs.seconds(point.algorithm, point.n_bytes) == point.seconds


@pytest.mark.parametrize(
    ("shape", "backend", "message"),
    [
        (Topology.flat(8), "nccl", "nodes, 8 nodes of 1 worker, got a profile of 2 nodes of 4 workers"),
        (Topology.even(2, 2), "gloo", "world size, 4, got a profile of 8"),
        (Topology.even(2, 4), "nccl", "backend, nccl, got a profile of gloo"),
        (
            Topology(((0, 2, 4, 6), (1, 3, 5, 7))),
            "gloo",
            "ranks of the nodes, ((0, 2, 4, 6), (1, 3, 5, 7)), got a profile of ((0, 1, 2, 3), (4, 5, 6, 7))",
        ),
    ],
)
def test_a_profile_of_another_group_is_refused(shape: Topology, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match="profile") as caught:
        profile_of(Topology.even(2, 4)).costs(shape, backend)
    assert str(caught.value) == f"profile: expected this group's {message}"


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    raw = json.loads(profile_of(Topology.flat(2)).to_json())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got something else: "),
        ("[1]", "format: expected 2, as this version of lioncub writes it, got list"),
        ("{}", "format: expected 2, as this version of lioncub writes it, got none"),
        (edited(lambda p: p.update(format=1)), "format: expected 2, as this version of lioncub writes it, got 1"),
        (edited(lambda p: p.pop("nodes")), "got none of nodes"),
        (edited(lambda p: p["points"][0].pop("seconds")), "points: expected the field seconds, got none"),
        (edited(lambda p: p["inter"].pop("latency_s")), "inter: expected the field latency_s, got none"),
        (edited(lambda p: p["intra"].update(latency_s=-1)), "latency_s: expected seconds >= 0, got -1"),
        (edited(lambda p: p.update(points=3)), "points: expected a list, got 3"),
        (edited(lambda p: p.update(points=[7])), "points: expected an object, got 7"),
        (edited(lambda p: p.update(points={"7": 1})), "points: expected a list, got {'7': 1}"),
        (edited(lambda p: p.update(world_size=1e400)), "world_size: expected a number, got inf"),
        (edited(lambda p: p.update(world_size=True)), "world_size: expected a number, got True"),
        (edited(lambda p: p["points"][0].update(n_bytes=-8)), "points.n_bytes: expected a number >= 0, got -8"),
        (edited(lambda p: p["inter"].update(bytes_per_s=10**400)), "bytes_per_s: expected a bandwidth > 0, got inf"),
        (edited(lambda p: p.update(error=float("nan"))), "error: expected a number, got nan"),
        (edited(lambda p: p.update(hosts=["\x1b[2J", "b"])), "hosts: expected printable text, got "),
        (edited(lambda p: p.update(nodes=[[0], []])), "nodes: expected every rank from 0 up on exactly one node"),
        ("[" * 100_000, "expected JSON, got something else: maximum recursion depth"),
        (" " * (2**24 + 1), "expected a file of at most 16,777,216 bytes, got 16,777,217"),
        (edited(lambda p: p.update(world_size=3)), "nodes: expected 3 ranks on 2 hosts, got ((0,), (1,))"),
        (edited(lambda p: p.update(hosts=["a"])), "nodes: expected 2 ranks on 1 hosts"),
        (edited(lambda p: p["points"][0].update(level="up")), "points: expected a known level and algorithm, got up"),
        (edited(lambda p: p["points"][0].update(seconds=0)), "points: expected finite numbers > 0, got Point("),
    ],
)
def test_files_that_are_no_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="profile") as caught:
        Profile.load(path)
    assert str(caught.value).startswith(f"profile {path}: ")
    assert message in str(caught.value)


def test_any_value_in_any_place_is_a_profile_or_one_error(tmp_path: Path) -> None:
    path, found = tmp_path / "p.json", 0
    values: list[Any] = [None, -1, 2.5, 1e400, "", "7", "\x1b[1m", [], [[]], {}, {"7": 7}, True, 10**30]

    def places(raw: Any) -> list[tuple[Any, Any]]:
        items = list(raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ())
        return [(raw, key) for key, _ in items] + [place for _, value in items for place in places(value)]

    for i in range(len(places(json.loads(profile_of(Topology.flat(2)).to_json())))):
        for value in values:
            raw = json.loads(profile_of(Topology.flat(2)).to_json())
            holder, key = places(raw)[i]
            holder[key] = value
            path.write_text(json.dumps(raw))
            said = said_by(lambda: Profile.load(path))
            assert said == "no error" or said.startswith(f"ValueError: profile {path}: "), said
            found += said != "no error"
    assert found > 500


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile .*none.json: cannot be read: No such file or directory"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"profile .*binary.json: cannot be read: not UTF-8 text"):
        Profile.load(tmp_path / "binary.json")


@on_ranks(2, 4)
def test_probe(rank: int, world_size: int) -> None:
    local = world_size // 2
    shape = Topology.even(2, local)
    seen: list[float] = []
    groups = ProcessGroups.build(None, shape)
    profile = probe(groups, seconds=0.5, on_progress=lambda fraction, what: seen.append(fraction))
    # nothing is left in progress
    dist.barrier()
    assert same_on_all(profile)
    # every rank took part in as many votes
    assert same_on_all(len(seen))
    # the first votes of all, which connect the ranks, are not measured
    expected = [("whole", name) for name in candidates(shape)]
    if shape.is_two_level:
        expected += [(level, name) for level in ("intra", "inter") for name in candidates(Topology.flat(2))]
    assert seen[len(expected) :] == sorted(seen[len(expected) :])
    assert seen[-1] == 1
    assert (profile.topology, profile.world_size, profile.backend) == (shape, world_size, "gloo")
    assert set(profile.versions) == {"lioncub", "torch", "python"}
    by_vote: dict[tuple[str, str], list[Point]] = {}
    for point in profile.points:
        by_vote.setdefault((point.level, point.algorithm), []).append(point)
        assert 0 < point.seconds < 60
    assert list(by_vote) == expected
    for points in by_vote.values():
        assert len(points) >= FEWEST_SIZES
        assert [point.n_bytes for point in points] == list(MESSAGE_BYTES[: len(points)])
    fitted = fit_links(shape, profile.points, default_costs(shape, "gloo"))
    assert fitted == (profile.inter, profile.intra, profile.error)


class Clock:
    """Goes on by ``tick`` seconds whenever it is read."""

    def __init__(self, tick: float) -> None:
        self._tick, self.now = tick, 0.0

    def perf_counter(self) -> float:
        self.now += self._tick
        return self.now


@on_ranks(2, 4)
def test_costs_are_measured_in_half_a_second(rank: int, world_size: int) -> None:
    plain = probe_module._Run._vote
    for local in (1, 2) if world_size == 2 else (2,):
        shape = Topology.even(world_size // local, local)
        groups = ProcessGroups.build(None, shape)
        counts, kinds = [], 2 * (3 if shape.is_two_level else 1)
        # on a fast and a slow network
        for tick in (1e-3, 60e-3):
            clock, votes = Clock(tick), list[Any]()
            counted = mock.patch.object(
                probe_module._Run, "_vote", lambda run, *what, votes=votes: votes.append(what) or plain(run, *what)
            )
            with counted, mock.patch.object(probe_module, "time", clock):
                costs = measure_costs(groups, torch.device("cpu"))
            assert same_on_all((costs, clock.now, len(votes)))
            assert costs.topology == shape
            assert costs.is_measured
            assert costs.source.startswith("measured at construction: ")
            assert clock.now <= 0.5 or tick > 1e-3
            counts.append(len(votes))
        dist.barrier()
        # all sizes, the first vote of each not counted
        assert counts[0] >= kinds * 2 * len(QUICK_BYTES)
        # where a single vote takes so long, two sizes, after one vote that is not counted
        assert counts[1] == kinds * (1 + FEWEST_SIZES)


@on_ranks(1)
def test_one_rank_has_nothing_to_measure(rank: int, world_size: int) -> None:
    said = said_by(lambda: probe(ProcessGroups.flat()))
    assert said == "ValueError: groups: expected a group of at least 2 workers, got 1"
