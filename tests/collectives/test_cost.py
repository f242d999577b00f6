"""The cost model: bytes by formulas written once more, times of links, the choice, sizes of buckets, explanations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from lioncub.collectives.codes import VOTES, CodeFormat
from lioncub.collectives.cost import (
    ALGORITHMS,
    Costs,
    Link,
    Phase,
    best_bucket_bytes,
    bytes_by_level,
    bytes_sent,
    candidates,
    choose,
    chunk_bytes,
    default_costs,
    dense_phases,
    node_bytes,
    phases,
    ring_all_reduce_bytes,
    rounds_pay,
)
from lioncub.collectives.groups import Topology
from lioncub.stats import HINT, Explanation, explain

MESSAGES = (0, 8, 16, 512, 1000, 4096, 1_000_000)
UNEVEN = Topology(((0, 1, 2), (3,)))
FAST = Link(10e-6, 50e9)


def chunk(n_bytes: int, workers: int) -> int:
    return 16 * math.ceil(n_bytes / 16 / workers)


@pytest.mark.parametrize("n", range(1, 10))
@pytest.mark.parametrize("message", MESSAGES)
def test_flat_bytes(n: int, message: int) -> None:
    c, field = chunk(message, n), {1: 1, 2: 2, 3: 2}.get(n, 4)
    expected = {
        "all_gather": (n - 1) * message,
        "reduce_scatter": (n - 1) * (c + 16 + c),
        "all_reduce": math.ceil(2 * (n - 1) * message * field / n),
    }
    assert chunk_bytes(message, n) == c
    for name, count in expected.items():
        assert bytes_by_level(name, message, n) == {"flat": count}, name
        assert bytes_sent(name, message, Topology.even(1, n)) == count, name


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (2, 4), (4, 2), (3, 3), (2, 7), (5, 8), (64, 8)])
@pytest.mark.parametrize("message", MESSAGES)
def test_two_level_bytes(nodes: int, local: int, message: int) -> None:
    c, shape = chunk(message, nodes * local), Topology.even(nodes, local)
    planes = math.ceil(math.log2(local + 1))
    expected = {
        "intra": (local - 1) * nodes * c + (local - 1) * nodes * (16 + c),
        "inter": (nodes - 1) * planes * c + (nodes - 1) * (16 + c),
    }
    assert bytes_by_level("hierarchical", message, shape) == expected
    assert bytes_sent("hierarchical", message, shape) == sum(expected.values())


def test_wide_fields() -> None:
    # 15 votes fit into 4 bits, 16 do not; 256 need 16
    assert bytes_by_level("all_reduce", 1600, 15) == {"flat": 2 * 14 * 1600 * 4 // 15 + 1}
    assert bytes_by_level("all_reduce", 1600, 16) == {"flat": 2 * 15 * 1600 * 8 // 16}
    assert bytes_by_level("all_reduce", 1600, 256) == {"flat": 2 * 255 * 1600 * 16 // 256}


def test_hierarchical_sends_less_over_the_slow_link() -> None:
    shape = Topology.even(2, 4)
    crossing = {
        name: sum(node_bytes(phase, shape) for phase in phases(name, 1 << 20, shape))
        for name in ("reduce_scatter", "hierarchical")
    }
    c = (1 << 20) // 8
    # every pair of workers on two nodes exchanges a chunk; one ring crosses
    assert crossing["reduce_scatter"] == 16 * c + 7 * (16 + c)
    assert crossing["hierarchical"] == 4 * (3 * c + 16 + c)
    assert crossing["hierarchical"] < 0.8 * crossing["reduce_scatter"]


def test_bytes_between_nodes() -> None:
    shape = Topology.even(2, 3)
    assert node_bytes(Phase("intra", "exchange", 700), shape) == 0
    assert node_bytes(Phase("inter", "ring", 700), shape) == 2100
    assert node_bytes(Phase("flat", "ring", 700), shape) == 700
    assert node_bytes(Phase("flat", "sum", 700), shape) == 700
    # 5 messages of 100 bytes from each of 3 workers, 3 of them to the other node
    assert node_bytes(Phase("flat", "exchange", 500), shape) == 900
    assert node_bytes(Phase("flat", "exchange", 300), UNEVEN) == 300
    assert node_bytes(Phase("flat", "ring", 700), Topology.even(1, 6)) == 0


def test_dense_all_reduce() -> None:
    assert ring_all_reduce_bytes(1050, 4) == 6300
    assert ring_all_reduce_bytes(1, 3, bytes_per_element=1) == 2
    assert dense_phases(1000, Topology.flat(4)) == ((Phase("flat", "sum", 1500),),)
    flat, two_level = dense_phases(1000, Topology.even(2, 4))
    assert flat == (Phase("flat", "sum", 1750),)
    assert two_level == (Phase("intra", "ring", 750), Phase("inter", "sum", 250), Phase("intra", "ring", 750))


def test_candidates() -> None:
    assert candidates(Topology.even(2, 4)) == ALGORITHMS
    flat = ("all_gather", "reduce_scatter", "all_reduce")
    for shape in (Topology.flat(4), Topology.even(1, 4), UNEVEN):
        assert candidates(shape) == flat
    # no field holds a sum of 65536 votes
    assert candidates(Topology.even(8192, 8)) == ("all_gather", "reduce_scatter", "hierarchical")


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        (Topology.flat(4), "4 nodes of 1 worker"),
        (Topology.even(1, 4), "1 node of 4 workers"),
        (UNEVEN, "2 nodes of 3, 1 workers"),
    ],
)
def test_hierarchical_is_refused_with_the_nodes(shape: Topology, got: str) -> None:
    expected = (
        f"algorithm: 'hierarchical' expected several nodes with equally many workers, more than one on each, got {got}"
    )
    for ask in (
        lambda: choose("hierarchical", 64, default_costs(shape, "gloo")),
        lambda: phases("hierarchical", 64, shape),
    ):
        with pytest.raises(ValueError, match="hierarchical") as caught:
            ask()
        assert str(caught.value) == expected
    assert shape.describe() == got


def test_candidates_of_formats() -> None:
    many = Topology.flat(300)
    assert candidates(many, CodeFormat(8, "ternary")) == ()
    assert candidates(many, CodeFormat(4, "ternary")) == ("all_gather", "reduce_scatter", "all_reduce")


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match=r"algorithm: expected one of \('auto', 'all_gather'.*got 'gossip'"):
        choose("gossip", 64, default_costs(Topology.flat(2), "gloo"))
    with pytest.raises(ValueError, match="got 'auto'"):
        bytes_sent("auto", 64, 2)


def test_times_of_links_by_hand() -> None:
    costs = Costs(Topology.flat(4), Link(1e-3, 1e6), FAST)
    # 3 messages of 1000 bytes after each other
    assert costs.seconds("all_gather", 1000) == pytest.approx(3e-3 + 3000e-6 / 0.94)
    there, back = 3 * 256 * 1e-6 / 0.92, 3 * (16 + 256) * 1e-6 / 0.94
    assert costs.seconds("reduce_scatter", 1000) == pytest.approx(6e-3 + there + back)
    assert costs.seconds("all_reduce", 1000) == pytest.approx(6e-3 + 6000e-6 / 0.99)
    assert costs.dense_seconds(4000) == pytest.approx(6e-3 + 6000e-6 / 0.99)
    one = Costs(Topology.flat(1), Link(1e-3, 1e6), FAST)
    assert [one.seconds(name, 1000) for name in candidates(one.topology)] == [0, 0, 0]


def test_times_of_two_levels_by_hand() -> None:
    costs = Costs(Topology.even(2, 4), Link(1e-3, 1e6), Link(1e-4, 1e8))
    inside = 2 * 3 * 1e-4 + 3 * 2 * 128 * 1e-8 / 0.92 + 3 * 2 * (16 + 128) * 1e-8 / 0.94
    between = 2 * 1e-3 + 4 * 3 * 128 * 1e-6 / 0.92 + 4 * (16 + 128) * 1e-6 / 0.94
    assert costs.seconds("hierarchical", 1000) == pytest.approx(inside + between)
    # one link per node carries what 4 workers send to 4 others
    there, back = 16 * 128 * 1e-6 / 0.92, 7 * (16 + 128) * 1e-6 / 0.94
    assert costs.seconds("reduce_scatter", 1000) == pytest.approx(14e-3 + there + back)
    # on one node nothing crosses
    local = Costs(Topology.even(1, 4), Link(1, 1), Link(1e-4, 1e8))
    assert local.seconds("all_gather", 1000) == pytest.approx(3e-4 + 3000e-8 / 0.94)


def test_choice_by_message_size() -> None:
    costs = default_costs(Topology.flat(4), "gloo")
    assert [choose("auto", n, costs) for n in (0, 512, 1 << 20)] == ["all_gather", "all_gather", "reduce_scatter"]
    two = default_costs(Topology.even(2, 4), "gloo")
    assert choose("auto", 1 << 20, two) == "hierarchical"
    assert choose("all_reduce", 8, two) == "all_reduce"
    # equal times: the first
    assert choose("auto", 8, Costs(Topology.flat(1), FAST, FAST)) == "all_gather"
    # two workers: one message each way is never beaten
    pair = default_costs(Topology.flat(2), "gloo")
    assert {choose("auto", 8 << i, pair) for i in range(22)} == {"all_gather"}


def test_defaults_say_that_they_are_assumed() -> None:
    gloo, nccl = default_costs(Topology.even(2, 4), "gloo"), default_costs(Topology.flat(4), "nccl")
    assert gloo.source.startswith("assumed for gloo, not measured: 1 Gb/s, 300 us per message between nodes; 10 Gb/s")
    assert nccl.source == "assumed for nccl, not measured: 10 Gb/s, 30 us per message between nodes"
    assert not gloo.is_measured


@pytest.mark.parametrize(
    ("latency", "speed", "message"),
    [
        (-1.0, 1.0, "latency_s: expected seconds >= 0, got -1.0"),
        (math.nan, 1.0, "latency_s: expected seconds >= 0, got nan"),
        (0.0, 0.0, "bytes_per_s: expected a bandwidth > 0, got 0.0"),
        (0.0, math.inf, "bytes_per_s: expected a bandwidth > 0, got inf"),
    ],
)
def test_impossible_links(latency: float, speed: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Link(latency, speed)


@dataclass(frozen=True)
class Line(Costs):
    """Costs of alpha + beta * bytes, whatever the algorithm."""

    alpha: float = 0.0
    beta: float = 0.0

    def seconds(self, algorithm: str, n_bytes: int, form: CodeFormat = VOTES) -> float:
        return self.alpha + self.beta * n_bytes


def line(alpha: float, beta: float) -> Line:
    return Line(Topology.flat(4), FAST, FAST, "measured on a test", 0.05, alpha, beta)


def best(costs: Costs, total: int, *, overlap: bool, largest: int = 1 << 24) -> int:
    return best_bucket_bytes([total], "all_gather", costs, overlap=overlap, largest=largest)


def test_buckets_are_as_large_as_possible_without_overlap() -> None:
    assert best(line(1e-3, 1e-9), 1_000_000, overlap=False) == 1_000_000
    assert best(line(1e-3, 1e-9), 1_000_001, overlap=False) == 1_000_008
    assert best(line(1e-3, 1e-9), 1 << 26, overlap=False) == 1 << 24
    assert best(line(1e-3, 1e-9), 1 << 26, overlap=False, largest=1003) == 1000
    assert best(line(1e-3, 1e-9), 0, overlap=False) == 8
    # an idle shaped link lets short votes through faster than any rate, one at a time
    assert best(line(-1e-3, 1e-9), 1_000_000, overlap=False) == 1_000_000


def test_buckets_balance_latency_and_the_last_vote_with_overlap() -> None:
    # sqrt(beta * B / alpha) buckets: 1 s on the wire and 1/64 s of latency make 8
    assert best(line(1 / 64, 1e-6), 1_000_000, overlap=True) == 125_000
    assert best(line(1 / 256, 1e-6), 1_000_000, overlap=True) == 62_504
    assert best(line(10.0, 1e-6), 1_000_000, overlap=True) == 1_000_000
    assert best(line(0.0, 1e-6), 1_000_000, overlap=True) == 31_256
    assert best(line(1.0, 0.0), 1 << 26, overlap=True) == 1 << 24


def test_bucket_size_is_a_multiple_of_8_for_all_and_within_the_limit() -> None:
    costs = default_costs(Topology.even(2, 4), "gloo")
    for sizes in ([0], [8], [4096, 24], [10_000_000, 1_000_000, 8], [1 << 28]):
        for overlap in (False, True):
            size = best_bucket_bytes(sizes, "auto", costs, overlap=overlap)
            assert size % 8 == 0
            assert 8 <= size <= 1 << 24
            assert size == best_bucket_bytes(sizes, "auto", costs, overlap=overlap)
    with pytest.raises(ValueError, match="hierarchical"):
        best_bucket_bytes([64], "hierarchical", default_costs(UNEVEN, "gloo"), overlap=False)


def explanation(costs: Costs | None, *buckets: tuple[int, int, str]) -> Explanation:
    """Explain buckets of (elements, bytes, algorithm); without costs, those of one rank."""
    sizes = [SimpleNamespace(elements=elements, n_bytes=n_bytes) for elements, n_bytes, _ in buckets]
    voters = [SimpleNamespace(n_bytes=n_bytes, algorithm=name, form=VOTES) for _, n_bytes, name in buckets]
    members, all_buckets = SimpleNamespace(costs=costs), SimpleNamespace(all=sizes)
    return explain(SimpleNamespace(buckets=all_buckets, members=members, voters=voters if costs else []))


def test_explanation() -> None:
    costs = Costs(Topology.even(2, 2), Link(1e-3, 1e6), Link(1e-4, 1e8), source="links of a test")
    told = explanation(costs, (8000, 1000, "hierarchical"), (60, 8, "all_gather"))
    assert told.hint == HINT
    first, second = told.rows
    assert [candidate.algorithm for candidate in first.candidates] == list(ALGORITHMS)
    for candidate in first.candidates:
        assert candidate.seconds == costs.seconds(candidate.algorithm, 1000)
        assert candidate.bytes_sent == bytes_sent(candidate.algorithm, 1000, costs.topology)
    assert first.choice == first.candidates[2]
    assert second.choice == second.candidates[0]
    assert told.bytes_sent == bytes_sent("hierarchical", 1000, costs.topology) + 3 * 8
    assert told.seconds == costs.seconds("hierarchical", 1000) + costs.seconds("all_gather", 8)

    lines = str(told).splitlines()
    assert lines[0].split() == [
        "bucket", "elements", "bytes", "all_gather", "ms", "reduce_scatter", "ms", "hierarchical", "ms", "all_reduce",
        "ms", "bytes", "sent",
    ]  # fmt: skip
    assert f"*{1e3 * costs.seconds('hierarchical', 1000):.3f}" in lines[1]
    assert f"*{1e3 * costs.seconds('all_gather', 8):.3f}" in lines[2]
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert lines[3].split() == ["all", "8,060", "1,008", f"{told.bytes_sent:,}"]
    assert lines[-2:] == ["links of a test", HINT]


def test_explanation_without_a_hint() -> None:
    measured = explanation(line(1e-3, 1e-9), (64, 8, "all_gather"))
    assert str(measured).splitlines()[-1] == "measured on a test; predictions are off by 5%"
    alone = explanation(None, (64, 8, ""), (9, 8, ""))
    assert (alone.seconds, alone.bytes_sent, alone.rows[0].choice) == (0, 0, None)
    assert str(alone).splitlines()[-1] == "one worker: nothing is sent"


def test_rounds_pay_where_they_are_long() -> None:
    # 4 workers: 6 rounds of 10 ms
    assert not rounds_pay(0.06, 4)
    assert rounds_pay(0.061, 4)
    assert not rounds_pay(0.061, 8)
