"""The vote as a collective, over real Gloo processes, against a plain all-reduce of unpacked votes."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from counting import Counting
from gloo_workers import Raised, outcomes_of, results_of
from torch.distributed.device_mesh import DeviceMesh

from lioncub.collectives import (
    ALGORITHMS,
    HANDSHAKE_BYTES,
    Routes,
    Topology,
    Voter,
    WorkersDisagreeError,
    bytes_sent,
    exchange,
    traffic,
    vote,
    vote_async,
)
from lioncub.collectives import topology as topology_module
from lioncub.collectives.header import (
    STATUS_DISAGREE,
    STATUS_NONFINITE,
    STATUS_OK,
    Header,
    combined_status,
    decode_headers,
    encode_header,
    first_nonfinite,
    header_bytes,
    status_on_device,
)
from lioncub.collectives.routes import subgroups
from lioncub.kernels import pack_signs, packed_bytes

FLAT = [name for name in ALGORITHMS if name != "hierarchical"]

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1009, 70001)


def _values(rank: int, n: int) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(1000 * rank + n))
    values[::5] = values[::5].round()
    return values


def _bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)[:n]


def votes_like_all_reduce(rank: int, world_size: int, algorithm: str, nodes: tuple | None = None) -> list[bytes]:
    routes = None if nodes is None else Routes.build(None, Topology(nodes))
    answers = []
    for parity, n in enumerate(SIZES):
        packed = pack_signs(_values(rank, n), parity=parity)
        total = _bits(packed, n).to(torch.int64)
        dist.all_reduce(total)
        tie = (torch.arange(n) + parity) % 2
        expected = torch.where(2 * total == world_size, tie, (2 * total > world_size).long())
        voted = vote(packed, algorithm=algorithm, parity=parity, routes=routes)
        assert voted.shape == (packed_bytes(n),)
        wrong = (_bits(voted, n) != expected).nonzero()
        assert not len(wrong), f"n={n}: element {int(wrong[0])} differs"
        assert not _bits(voted, 8 * len(voted))[n:].any(), f"n={n}: pad bits are set"
        answers.append(voted.numpy().tobytes())
    return answers


def votes_by_every_algorithm(rank: int, world_size: int) -> list[list[bytes]]:
    return [votes_like_all_reduce(rank, world_size, algorithm) for algorithm in (*FLAT, "auto")]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_vote_is_the_majority_of_unpacked_votes(world_size: int) -> None:
    answers = results_of(votes_by_every_algorithm, world_size)
    assert all(by_algorithm == answers[0][0] for answer in answers for by_algorithm in answer)


def votes_at_once_and_in_rounds(rank: int, world_size: int) -> list[str]:
    ways = []
    for n, at_once in itertools.product(SIZES, (True, False)):
        packed = pack_signs(_values(rank, n))
        voter = Voter(len(packed), routes=Routes.flat(), algorithm="reduce_scatter", at_once=at_once)
        for _ in range(2):
            got = voter.start(packed, Header()).result().packed
            assert torch.equal(got, vote(packed, algorithm="all_gather")), f"n={n}, at once: {at_once}"
        voter.expect(packed.device)
        ways.append("at once" if voter._inbox else "in rounds")
        # what is expected has to come
        voter.start(packed, Header()).result()
    return ways


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_messages_travel_at_once_or_in_rounds(world_size: int) -> None:
    ways = ["at once", "in rounds"] * len(SIZES)
    assert results_of(votes_at_once_and_in_rounds, world_size) == [ways] * world_size


def way_on_nodes(rank: int, world_size: int, nodes: tuple) -> bool:
    voter = Voter(64, routes=Routes(None, Topology(nodes)), algorithm="reduce_scatter")
    voter.expect(torch.device("cpu"))
    voter.start(torch.zeros(64, dtype=torch.uint8), Header()).result()
    return voter._at_once


@pytest.mark.parametrize(
    ("nodes", "at_once"), [(((0, 1, 2, 3),), True), (((0,), (1,), (2,), (3,)), True), (((0, 1), (2, 3)), False)]
)
def test_messages_to_nodes_of_several_workers_travel_in_rounds(nodes: tuple, at_once: bool) -> None:
    assert results_of(way_on_nodes, 4, nodes) == [at_once] * 4


# the last but one interleaves the nodes' ranks
TWO_LEVELS = [
    ((0, 1), (2, 3)),
    ((0, 1, 2), (3, 4, 5)),
    ((0, 1), (2, 3), (4, 5)),
    ((0, 2), (1, 3)),
    ((0, 1, 2, 3), (4, 5, 6, 7)),
]


@pytest.mark.parametrize("nodes", TWO_LEVELS)
def test_hierarchical_vote_is_the_flat_majority(nodes: tuple[tuple[int, ...], ...]) -> None:
    answers = results_of(votes_like_all_reduce, sum(map(len, nodes)), "hierarchical", nodes)
    assert all(answer == answers[0] for answer in answers)


def headers_by_rank(rank: int, world_size: int, nodes: tuple) -> list[int]:
    routes = Routes.build(None, Topology(nodes))
    voter = Voter(64, routes=routes, algorithm="hierarchical")
    tally = voter.start(torch.zeros(64, dtype=torch.uint8), Header(layout=rank)).result()
    return [header.layout for header in decode_headers(tally.headers, 0)]


@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((0, 5), (1, 3), (2, 4))])
def test_headers_come_in_the_order_of_the_ranks(nodes: tuple[tuple[int, ...], ...]) -> None:
    ranks = list(range(sum(map(len, nodes))))
    assert results_of(headers_by_rank, len(ranks), nodes) == [ranks] * len(ranks)


def in_different_numbers_of_groups(rank: int, world_size: int) -> str:
    part = dist.new_group([0, 1], use_local_synchronization=True) if rank < 2 else None
    if rank == 0:
        dist.new_group([0], use_local_synchronization=True)
    if part is None:
        return ""
    with pytest.raises(WorkersDisagreeError) as caught:
        subgroups(part, [[0, 1]])
    return str(caught.value)


def test_groups_whose_names_would_differ_are_refused() -> None:
    said = "workers disagree on the number of process groups that this process is in: rank 0: 3; rank 1: 2"
    assert results_of(in_different_numbers_of_groups, 3) == [said, said, ""]


def refusals(rank: int, world_size: int) -> list[str]:
    said = []
    for nodes in (((0, 1, 2),), ((0,), (1, 2))):
        with pytest.raises(ValueError, match="hierarchical") as caught:
            vote(
                torch.zeros(8, dtype=torch.uint8), algorithm="hierarchical", routes=Routes.build(None, Topology(nodes))
            )
        said.append(str(caught.value))
    with pytest.raises(ValueError, match=r"topology: expected one of the group's 3 workers, got 4"):
        Routes.build(None, Topology.even(2, 2))
    return said


def test_hierarchical_is_refused_without_even_nodes() -> None:
    one_node, uneven = results_of(refusals, 3)[0]
    assert "1 node" in one_node
    assert "1, 2" in uneven


def votes_on_mesh(rank: int, world_size: int, ranks: list[list[int]]) -> tuple[bytes, bytes, tuple]:
    routes = Routes.of_mesh(DeviceMesh("cpu", ranks))
    packed = pack_signs(_values(rank, 1009))
    voted = vote(packed, algorithm="hierarchical", routes=routes)
    return voted.numpy().tobytes(), vote(packed).numpy().tobytes(), routes.topology.nodes


@pytest.mark.parametrize("ranks", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3, 2], [1, 0]]])
def test_a_device_mesh_gives_the_nodes(ranks: list[list[int]]) -> None:
    for hierarchical, flat, nodes in results_of(votes_on_mesh, 4, ranks):
        assert hierarchical == flat
        assert nodes == tuple(sorted(tuple(sorted(row)) for row in ranks))


def nodes_found(rank: int, world_size: int, hosts: list[str], local: list[int]) -> tuple:
    topology_module.socket.gethostname = lambda: hosts[rank]
    os.environ["LOCAL_WORLD_SIZE"] = str(local[rank])
    return Routes.find().topology.nodes


@pytest.mark.parametrize(
    ("hosts", "local", "nodes"),
    [
        ("abab", [2, 2, 2, 2], ((0, 2), (1, 3))),
        ("aaaa", [2, 2, 2, 2], ((0, 1), (2, 3))),
        ("aaaa", [4, 4, 4, 4], ((0, 1, 2, 3),)),
        ("aaab", [3, 3, 3, 1], ((0, 1, 2), (3,))),
    ],
)
def test_nodes_are_found_by_host_and_local_world_size(hosts: str, local: list[int], nodes: tuple) -> None:
    assert results_of(nodes_found, 4, list(hosts), local) == [nodes] * 4


@pytest.mark.parametrize("nodes", [(), ((0, 2),), ((1, 0),), ((2, 3), (0, 1)), ((0,), ())])
def test_impossible_nodes_are_refused(nodes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="nodes: expected"):
        Topology(nodes)


def async_votes_in_flight(rank: int, world_size: int) -> bool:
    sizes, algorithms = (640, 65, 1009, 8), ("reduce_scatter", "all_gather", "auto", "reduce_scatter")
    packed = [pack_signs(_values(rank, n)) for n in sizes]
    handles = [vote_async(p, algorithm=a, parity=3) for p, a in zip(packed, algorithms, strict=True)]
    got = [handle.wait() for handle in handles]
    return all(torch.equal(g, vote(p, parity=3)) for g, p in zip(got, packed, strict=True))


def test_async_votes_can_be_in_flight_together() -> None:
    assert results_of(async_votes_in_flight, 3) == [True] * 3


def count_bytes(rank: int, world_size: int, algorithm: str, n: int, nodes: tuple | None) -> list[int]:
    routes = Routes.flat() if nodes is None else Routes.build(None, Topology(nodes))
    counting = Counting()
    vote(pack_signs(_values(rank, n)), algorithm=algorithm, routes=routes)
    whole = counting.sent.get(-1, 0) - HANDSHAKE_BYTES * (world_size - 1)
    if nodes is None:
        return [whole]
    return [counting.sent[id(routes.intra)], counting.sent[id(routes.inter)]]


def count_bytes_of_every_algorithm(rank: int, world_size: int, n: int) -> list[list[int]]:
    return [count_bytes(rank, world_size, algorithm, n, None) for algorithm in FLAT]


@pytest.mark.parametrize(("world_size", "n"), [(1, 100), (2, 1009), (3, 70001), (4, 64), (5, 1009)])
def test_bytes_sent_are_those_predicted(world_size: int, n: int) -> None:
    predicted = [[bytes_sent(name, packed_bytes(n), world_size, header_bytes(0))] for name in FLAT]
    assert results_of(count_bytes_of_every_algorithm, world_size, n) == [predicted] * world_size


@pytest.mark.parametrize("nodes", TWO_LEVELS[:3])
def test_bytes_of_each_level_are_those_predicted(nodes: tuple[tuple[int, ...], ...]) -> None:
    topology = Topology(nodes)
    levels = traffic("hierarchical", packed_bytes(70001), topology, header_bytes(0))
    got = results_of(count_bytes, topology.workers, "hierarchical", 70001, nodes)
    assert got == [[levels["intra"], levels["inter"]]] * topology.workers


def test_bytes_are_a_thirtysecond_of_fp32() -> None:
    d, workers = 2**24, 8
    fp32 = 2 * (workers - 1) / workers * 4 * d
    assert bytes_sent("reduce_scatter", packed_bytes(d), workers) / fp32 == pytest.approx(1 / 32, rel=1e-4)


def test_slow_links_carry_fewer_bytes_in_two_levels() -> None:
    b, hosts, local = 2**20, 2, 4
    workers = hosts * local
    # of a flat reduce_scatter, all chunks for the other host and, in a ring, all voted chunks cross the slow link
    flat = local * (workers - local) * b // workers + (workers - 1) * b // workers
    two_levels = local * traffic("hierarchical", b, Topology.even(hosts, local))["inter"]
    assert two_levels / flat < 0.8


def vote_with(rank: int, world_size: int, per_rank: list[dict]) -> bytes:
    options = dict(per_rank[rank])
    return vote(pack_signs(_values(rank, options.pop("n"))), **options).numpy().tobytes()


@pytest.mark.parametrize(
    ("per_rank", "message"),
    [
        (
            [{"n": 64}, {"n": 64}, {"n": 1000}],
            "workers disagree on the bytes of the message: ranks 0, 1: 8; rank 2: 128",
        ),
        (
            [{"n": 64, "algorithm": "all_gather"}, {"n": 64, "algorithm": "reduce_scatter"}],
            "workers disagree on the algorithm: rank 0: all_gather; rank 1: reduce_scatter",
        ),
        ([{"n": 64, "parity": 1}, {"n": 64, "parity": 4}], "workers disagree on the parity: rank 0: 1; rank 1: 0"),
    ],
)
def test_disagreement_is_the_same_error_on_all_workers(per_rank: list[dict], message: str) -> None:
    answers = outcomes_of(vote_with, len(per_rank), per_rank)
    assert [(a.kind, a.message) for a in answers if isinstance(a, Raised)] == [("WorkersDisagreeError", message)] * len(
        per_rank
    )


@pytest.mark.parametrize(
    ("packed", "options", "error", "message"),
    [
        (torch.zeros(8), {}, TypeError, "packed: expected a uint8 tensor, got torch.float32"),
        (torch.zeros(7, dtype=torch.uint8), {}, ValueError, "B a multiple of 8, got shape"),
        (torch.zeros(16, dtype=torch.uint8)[::2], {}, ValueError, "expected a contiguous tensor"),
    ],
)
def test_bad_messages_are_refused(packed: torch.Tensor, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        vote(packed, **options)


def hear_another_status(rank: int, world_size: int) -> str:
    original = exchange.combined_status
    if rank == 1:
        exchange.combined_status = lambda headers: original(headers) + 1
    with pytest.raises(WorkersDisagreeError) as caught:
        vote(pack_signs(_values(rank, 64)), algorithm="reduce_scatter")
    return str(caught.value)


def test_replies_that_differ_are_noticed_by_all() -> None:
    message = "workers disagree on the wire version and status of a vote: ranks 0, 2: [2, 0]; rank 1: [2, 1]"
    assert results_of(hear_another_status, 3) == [message] * 3


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([Header(step=3), Header(step=3)], STATUS_OK),
        ([Header(step=3), Header(step=3, nonfinite=2)], STATUS_NONFINITE),
        ([Header(step=3), Header(step=4, nonfinite=2)], STATUS_DISAGREE),
        ([Header(layout=1), Header(layout=2)], STATUS_DISAGREE),
        ([Header(hyperparameters=1), Header(hyperparameters=2)], STATUS_DISAGREE),
    ],
)
def test_combined_status(headers: list[Header], status: int) -> None:
    raw = torch.stack([encode_header(header, torch.device("cpu")) for header in headers])
    assert combined_status(raw) == status
    assert int(status_on_device(raw.view(torch.int64))) == status


@pytest.mark.parametrize(
    ("status", "first"), [([0], 0), ([1], 1), ([0, 0, 3, 1], 3), ([0] * 70 + [2], 71), ([-1, 5], 1)]
)
def test_first_nonfinite(status: list[int], first: int) -> None:
    values = torch.tensor(status, dtype=torch.int32)
    assert int(first_nonfinite(values)) == first
    (header,) = decode_headers(encode_header(Header(), values.device, values)[None], 0)
    assert header.nonfinite == first


def test_headers_come_back_as_they_were() -> None:
    present = tuple(i % 3 == 0 or i == 63 for i in range(70))
    header = Header(step=5, layout=-(2**63), hyperparameters=2**63 - 1, flags=5, has_gradient=present)
    raw = encode_header(header, torch.device("cpu"), torch.tensor([0] * 66 + [7] + [0] * 2 + [1], dtype=torch.int32))
    assert raw.numel() == header_bytes(70)
    assert decode_headers(raw[None], 70) == [dataclasses.replace(header, nonfinite=67)]
