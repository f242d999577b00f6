"""Profiles: what they store and predict; the probe over real Gloo workers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from gloo_workers import Raised, outcomes_of, results_of
from profiles import profile_of, straight

from lioncub.collectives.cost import EFFICIENCY, bytes_sent, candidates, choose
from lioncub.collectives.probing import FEWEST_SIZES, MESSAGE_BYTES, probe
from lioncub.collectives.profile import Point, Profile, ascending, fit_line, predicted_seconds
from lioncub.collectives.routes import Routes
from lioncub.collectives.topology import Topology
from lioncub.probe import write_plot


@pytest.mark.parametrize("shape", [Topology.flat(2), Topology.even(1, 3), Topology.even(2, 4)])
def test_round_trip_through_json(tmp_path: Path, shape: Topology) -> None:
    profile = profile_of(shape, straight)
    (tmp_path / "profile.json").write_text(profile.to_json())
    assert Profile.load(tmp_path / "profile.json") == profile
    assert json.loads(profile.to_json())["format"] == 1


def test_a_straight_line_is_found_and_predicted() -> None:
    profile = profile_of(Topology.even(2, 4), straight)
    for fit in profile.fits:
        alpha, beta = {"inter": (2e-3, 1e-7), "intra": (1e-3, 1e-9)}.get(fit.level, (3e-3, 1e-8))
        assert fit.alpha_s == pytest.approx(alpha * (1 + len(fit.algorithm) % 3), rel=1e-6)
        assert fit.beta_s_per_byte == pytest.approx(beta, rel=1e-6)
        assert fit.error < 1e-6
    costs = profile.costs(Topology.even(2, 4), "gloo")
    assert costs.is_measured
    assert costs.source == "measured on 2 nodes of 4 workers over gloo on 2026-01-01 00:00 UTC"
    for name in candidates(costs.topology):
        for n_bytes in (512, 3000, 70_000, 1 << 20, 1 << 24):
            sent = bytes_sent(name, n_bytes, costs.topology, 104)
            assert costs.seconds(name, n_bytes, 104) == pytest.approx(straight("whole", name, sent), rel=1e-6)


def test_points_count_more_than_the_line() -> None:
    points = [Point(n, n, t) for n, t in ((100, 1.0), (200, 1.0), (300, 5.0), (400, 4.0), (500, 9.0))]
    fit = fit_line("whole", "all_gather", points)
    # 300 and 400 bytes are averaged: more bytes cannot take less time
    assert [predicted_seconds(fit, n) for n in (0, 100, 150, 250, 300, 350, 450)] == [1, 1, 1, 2.75, 4.5, 4.5, 6.75]
    assert predicted_seconds(fit, 700) == pytest.approx(9 + 200 * fit.beta_s_per_byte)


def test_ascending() -> None:
    assert ascending([3, 1, 2, 4]) == [2, 2, 2, 4]
    assert ascending([1, 2, 2, 3]) == [1, 2, 2, 3]
    assert ascending([3, 2, 1]) == [2, 2, 2]
    assert ascending([]) == []


def squares(alpha: float, beta: float, points: list[Point]) -> float:
    return sum(((alpha + beta * p.bytes_sent) / p.seconds - 1) ** 2 for p in points)


@pytest.mark.parametrize("seed", range(8))
def test_no_line_nearby_fits_better(seed: int) -> None:
    rng = random.Random(seed)
    # every other one falls with the bytes, so that beta >= 0 binds
    slope = -1 if seed % 2 else 1
    points = [Point(n, n, (100 + slope * i * 12) * rng.uniform(0.8, 1.2)) for i, n in enumerate(MESSAGE_BYTES[:7])]
    fit = fit_line("whole", "all_gather", points)
    least = squares(fit.alpha_s, fit.beta_s_per_byte, points)
    assert fit.error == pytest.approx((least / len(points)) ** 0.5)
    assert min(fit.alpha_s, fit.beta_s_per_byte) >= 0
    for da, db in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1)):
        alpha, beta = fit.alpha_s * (1 + da / 100), max(fit.beta_s_per_byte + db * 1e-7, 0.0)
        assert squares(alpha, beta, points) >= least * (1 - 1e-9)


def test_a_line_through_one_point_or_through_the_origin() -> None:
    assert fit_line("whole", "all_gather", [Point(8, 8, 2.0)]).alpha_s in (0.0, 2.0)
    through = fit_line("whole", "all_gather", [Point(8, 8, 1.0), Point(16, 16, 3.0)])
    assert through.alpha_s == 0
    assert through.beta_s_per_byte > 0


def test_links_that_a_profile_implies() -> None:
    two_level = profile_of(Topology.even(2, 4), straight)
    # 1 message after another between 2 nodes; 4 workers share the link. 11 % 3 = 1: all_gather takes 2 alphas
    inter, intra = two_level.links()
    assert inter is not None
    assert intra is not None
    assert inter.latency_s == pytest.approx(2 * 2e-3)
    assert inter.bytes_per_s == pytest.approx(4 / (1e-7 * EFFICIENCY["ring"]))
    assert intra.latency_s == pytest.approx(2 * 1e-3 / 3)
    assert intra.bytes_per_s == pytest.approx(1 / (1e-9 * EFFICIENCY["ring"]))
    for shape in (Topology.flat(4), Topology.even(1, 4)):
        links = profile_of(shape, straight).links()
        (link,) = [link for link in links if link is not None]
        # all on one node: it says nothing of links between nodes
        assert links.index(link) == (shape.n_nodes == 1)
        assert link.latency_s == pytest.approx(2 * 3e-3 / 3)
        assert link.bytes_per_s == pytest.approx(1 / (1e-8 * EFFICIENCY["ring"]))
    with pytest.raises(ValueError, match=r"expected a measured bandwidth of an all_gather \(whole\), got none"):
        profile_of(Topology.flat(4), lambda *_: 1.0).links()


def test_choice_by_measurement() -> None:
    shape = Topology.even(2, 4)
    slow = {"all_gather": 1e-3, "reduce_scatter": 2e-3, "hierarchical": 3e-3, "all_reduce": 4e-3}
    # other than a model of links would say
    costs = profile_of(shape, lambda _, name, sent: slow[name] + (1e-12 if name == "all_reduce" else 1e-6) * sent)
    assert choose("auto", 512, costs.costs(shape, "gloo")) == "reduce_scatter"
    assert choose("auto", 1 << 20, costs.costs(shape, "gloo")) == "all_reduce"


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
        profile_of(Topology.even(2, 4), straight).costs(shape, backend)
    assert str(caught.value) == f"profile: expected this group's {message}"


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    raw = json.loads(profile_of(Topology.flat(2), straight).to_json())
    change(raw)
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got something else: "),
        ("[1]", "format: expected 1, as this version of lioncub writes it, got list"),
        ("{}", "format: expected 1, as this version of lioncub writes it, got none"),
        (edited(lambda p: p.update(format=2)), "format: expected 1, as this version of lioncub writes it, got 2"),
        (edited(lambda p: p.pop("nodes")), "got none of nodes"),
        (edited(lambda p: p["fits"][0].pop("alpha_s")), "fits: expected the field alpha_s, got none"),
        (edited(lambda p: p["fits"][0]["points"][0].pop("seconds")), "fits: expected the field seconds, got none"),
        (edited(lambda p: p.update(fits=3)), "fields: expected those of a profile, got others: "),
        (edited(lambda p: p.update(world_size=3)), "nodes: expected 3 ranks on 2 hosts, got ((0,), (1,))"),
        (edited(lambda p: p.update(hosts=["a"])), "nodes: expected 2 ranks on 1 hosts"),
        (edited(lambda p: p["fits"].pop(1)), "fits: expected one of every algorithm, got none of reduce_scatter"),
        (edited(lambda p: p["fits"][0].update(level="up")), "fits: expected a known level and algorithm, got up"),
        (edited(lambda p: p["fits"][0].update(alpha_s=-1)), "fits: expected finite numbers >= 0, got [-1.0, "),
        (edited(lambda p: p["fits"][0]["points"].reverse()), "points: expected ascending bytes_sent, got ["),
    ],
)
def test_files_that_are_no_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="profile") as caught:
        Profile.load(path)
    assert str(caught.value).startswith(f"profile {path}: ")
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile .*none.json: cannot be read: No such file or directory"):
        Profile.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"profile .*binary.json: cannot be read: not UTF-8 text"):
        Profile.load(tmp_path / "binary.json")


def probed(rank: int, world_size: int, local: int) -> tuple[Profile, list[float]]:
    seen: list[float] = []
    routes = Routes.build(None, Topology.even(world_size // local, local))
    profile = probe(routes, seconds=0.5, on_progress=lambda fraction, what: seen.append(fraction))
    # nothing is left under way
    dist.barrier()
    return profile, seen


@pytest.mark.parametrize(("world_size", "local"), [(2, 1), (4, 2)])
def test_probe(tmp_path: Path, world_size: int, local: int) -> None:
    answers = results_of(probed, world_size, local)
    profile, seen = answers[0]
    assert all(other == profile for other, _ in answers)
    # every worker took part in as many votes
    assert len({len(fractions) for _, fractions in answers}) == 1
    assert seen == sorted(seen)
    assert seen[-1] == 1
    shape = Topology.even(world_size // local, local)
    assert (profile.topology, profile.world_size, profile.backend) == (shape, world_size, "gloo")
    assert set(profile.versions) == {"lioncub", "torch", "python"}
    expected = [("whole", name) for name in candidates(shape)]
    if shape.is_two_level:
        expected += [(level, name) for level in ("intra", "inter") for name in candidates(Topology.flat(2))]
    assert [(fit.level, fit.algorithm) for fit in profile.fits] == expected
    for fit in profile.fits:
        group = shape if fit.level == "whole" else Topology.flat(2)
        assert len(fit.points) >= FEWEST_SIZES
        assert [point.n_bytes for point in fit.points] == list(MESSAGE_BYTES[: len(fit.points)])
        assert [p.bytes_sent for p in fit.points] == [
            bytes_sent(fit.algorithm, p.n_bytes, group, 48) for p in fit.points
        ]
        assert all(0 < point.seconds < 60 for point in fit.points)
    costs = profile.costs(shape, "gloo")
    for name in candidates(shape):
        times = [costs.seconds(name, 8 << i, 56) for i in range(24)]
        assert times == sorted(times)
        assert 0 < times[0] <= times[-1] < 3600

    (tmp_path / "profile.json").write_text(profile.to_json())
    assert Profile.load(tmp_path / "profile.json") == profile
    write_plot(profile, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def probed_alone(rank: int, world_size: int) -> None:
    probe(Routes.flat())


def test_one_worker_has_nothing_to_measure() -> None:
    (answer,) = outcomes_of(probed_alone, 1)
    assert isinstance(answer, Raised)
    assert (answer.kind, answer.message) == ("ValueError", "routes: expected a group of at least 2 workers, got 1")
