"""The vote as a collective, over real Gloo processes, against a plain all-reduce of unpacked codes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from counting import Counting
from gloo_workers import on_ranks, results_of, same_on_all
from samples import fields_of

from lioncub.collectives import (
    ALGORITHMS,
    HANDSHAKE_BYTES,
    CodeFormat,
    ProcessGroups,
    Topology,
    Voter,
    average_,
    bytes_by_level,
    bytes_sent,
    vote,
    vote_async,
)
from lioncub.collectives.algorithms import Exchange
from lioncub.collectives.average import average_phases, rank_order_mean
from lioncub.collectives.transport import SINGLE_AVERAGE, EagerAllToAll, PairwiseAllToAll, Transport
from lioncub.kernels import pack_signs, packed_bytes

CPU = torch.device("cpu")
FLAT = [name for name in ALGORITHMS if name != "hierarchical"]
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1009, 70001)
FORMATS = [
    *(CodeFormat(bits, "ternary") for bits in (1, 2, 4, 8)),
    *(CodeFormat(bits, "majority") for bits in (2, 8)),
    *(CodeFormat(bits, "sum") for bits in (1, 2, 8)),
]


def signs_of(rank: int, n: int, parity: int = 0) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(1000 * rank + n))
    values[::5] = values[::5].round()
    return pack_signs(values, parity=parity)


def codes_of(rank: int, n: int, form: CodeFormat) -> torch.Tensor:
    """As an optimizer packs them: whole words of 64 codes, padded with zeros."""
    generator = torch.Generator().manual_seed(100 * rank + n)
    padded = torch.zeros(8 * packed_bytes(n), dtype=torch.uint8)
    padded[:n] = torch.randint(0, form.largest + 1, (n,), generator=generator, dtype=torch.uint8)
    per_byte = 8 // form.bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * form.bits
    return (padded.view(-1, per_byte) << shifts).sum(dim=1, dtype=torch.uint8)


def majorities(rank: int, world_size: int, algorithm: str, groups: ProcessGroups | None = None) -> list[bytes]:
    answers = []
    for parity, n in enumerate(SIZES):
        packed = signs_of(rank, n, parity)
        total = fields_of(packed, 1)[:n].to(torch.int64)
        dist.all_reduce(total)
        tie = (torch.arange(n) + parity) % 2
        expected = torch.where(2 * total == world_size, tie, (2 * total > world_size).long())
        voted = vote(packed, algorithm=algorithm, parity=parity, groups=groups)
        assert voted.shape == (packed_bytes(n),)
        wrong = (fields_of(voted, 1)[:n] != expected).nonzero()
        assert not len(wrong), f"{algorithm}, n={n}: element {int(wrong[0])} differs"
        assert not fields_of(voted, 1)[n:].any(), f"{algorithm}, n={n}: pad bits are set"
        answers.append(voted.numpy().tobytes())
    return answers


def check_format(
    result: torch.Tensor, form: CodeFormat, n: int, expected: torch.Tensor, workers: int, what: object
) -> None:
    width = form.result_bits(workers)
    assert len(result) == packed_bytes(n) * width
    found = fields_of(result, width)[:n]
    if form.result == "ternary":
        assert torch.equal(found - 1, expected.sign()), what
    elif form.result == "majority":
        tie = 2 * (torch.arange(n, dtype=torch.int32) % 2) - 1
        assert torch.equal(2 * found - 1, torch.where(expected == 0, tie, expected.sign())), what
    else:
        step, offset = form.value(workers)
        assert torch.equal(step * found - offset, expected), what


@on_ranks(1, 2, 3, 4, 5)
def test_votes_are_those_on_unpacked_codes(rank: int, world_size: int) -> None:
    found = [majorities(rank, world_size, algorithm) for algorithm in (*FLAT, "auto")]
    assert found == [found[0]] * len(found)
    assert same_on_all(found[0])


def two_levels(world_size: int) -> dict[str, ProcessGroups | None]:
    """The groups of each algorithm that is possible."""
    flat: dict[str, ProcessGroups | None] = dict.fromkeys(FLAT)
    return flat | ({"hierarchical": ProcessGroups.build(None, Topology.even(2, 2))} if world_size == 4 else {})


@on_ranks(1, 2, 3, 4, 5)
def test_votes_in_every_format(rank: int, world_size: int) -> None:
    ways = two_levels(world_size)
    for form, n in itertools.product(FORMATS, (0, 1, 63, 64, 65, 1009)):
        packed = codes_of(rank, n, form)
        before = packed.clone()
        # the sum of signs or levels of all ranks, added as whole numbers
        step, offset = form.value(1)
        total = step * fields_of(packed, form.bits)[:n] - offset
        dist.all_reduce(total)
        found = set()
        for name, groups in ways.items():
            result = vote(packed, algorithm=name, form=form, groups=groups)
            check_format(result, form, n, total, world_size, (form, n, name))
            found.add(result.numpy().tobytes())
        assert len(found) == 1
        assert same_on_all(found)
        assert torch.equal(packed, before)


@on_ranks(2, 3, 4, 5)
def test_votes_are_sent_eagerly_or_in_pairs(rank: int, world_size: int) -> None:
    for n, eager in itertools.product(SIZES, (True, False)):
        packed = signs_of(rank, n)
        expected = vote(packed, algorithm="all_gather")
        voter = Voter(len(packed), groups=ProcessGroups.flat(), device=CPU, algorithm="reduce_scatter", eager=eager)
        for posts_first in (False, True):
            if posts_first:
                voter.expect()
            exchange = voter.start(packed, 0)
            assert isinstance(exchange._pending, EagerAllToAll if eager else PairwiseAllToAll)
            assert torch.equal(exchange.result().packed, expected), f"n={n}, eager: {eager}"


@on_ranks(1, 2, 3, 4, 5)
def test_bytes_are_those_that_are_predicted(rank: int, world_size: int) -> None:
    for name, groups in two_levels(world_size).items():
        topology = groups.topology if groups else Topology.flat(world_size)
        for form, n in itertools.product([CodeFormat(), *FORMATS], (64, 70001)):
            with Counting() as counting:
                vote(codes_of(rank, n, form), algorithm=name, form=form, groups=groups)
            sent = sum(counting.sent.values()) - HANDSHAKE_BYTES * (world_size - 1)
            assert sent == bytes_sent(name, packed_bytes(n), topology, form), (name, form, n)
    for topology in (Topology.even(1, world_size), Topology.flat(world_size)):
        voter = Voter(64, groups=ProcessGroups(None, topology), device=CPU, algorithm="reduce_scatter")
        assert voter._spec.eager


# the last but one interleaves the nodes' ranks
TWO_LEVELS = [
    ((0, 1), (2, 3)),
    ((0, 1, 2), (3, 4, 5)),
    ((0, 1), (2, 3), (4, 5)),
    ((0, 2), (1, 3)),
    ((0, 1, 2, 3), (4, 5, 6, 7)),
]
Nodes = tuple[tuple[int, ...], ...]


def in_two_levels(rank: int, world_size: int, nodes: Nodes) -> tuple[list[bytes], list[int], bool]:
    groups = ProcessGroups.build(None, Topology(nodes))
    answers = majorities(rank, world_size, "hierarchical", groups)
    with Counting() as counting:
        vote(signs_of(rank, 70001), algorithm="hierarchical", groups=groups)
    sent = [counting.sent[id(groups.intra)], counting.sent[id(groups.inter)]]
    return answers, sent, Voter(64, groups=groups, device=CPU, algorithm="reduce_scatter")._spec.eager


@pytest.mark.parametrize("nodes", TWO_LEVELS)
def test_a_hierarchical_vote_is_the_flat_majority(nodes: Nodes) -> None:
    topology = Topology(nodes)
    levels = bytes_by_level("hierarchical", packed_bytes(70001), topology)
    answers = results_of(in_two_levels, topology.workers, nodes)
    # messages to nodes of several ranks are sent in pairs
    assert answers == [(answers[0][0], [levels["intra"], levels["inter"]], False)] * topology.workers


@on_ranks(3)
def test_votes_and_averages_can_be_in_flight_together(rank: int, world_size: int) -> None:
    sizes, algorithms = (640, 65, 1009, 8), ("reduce_scatter", "all_gather", "auto", "reduce_scatter")
    packed = [signs_of(rank, n) for n in sizes]
    generators = [[torch.Generator().manual_seed(i * 100 + peer) for peer in range(world_size)] for i in range(2)]
    rows_of = [torch.stack([torch.randn(300, generator=g) for g in row]) for row in generators]
    transport = Transport(None, CPU)
    handles = [vote_async(p, algorithm=a, parity=3) for p, a in zip(packed, algorithms, strict=True)]
    averages: list[Exchange[torch.Tensor]] = []
    for i, rows in enumerate(rows_of):
        phases = average_phases(transport, 300, dtype="fp32", tag=SINGLE_AVERAGE + 1 + i, eager=bool(i))
        averages.append(Exchange(phases, 2))
        averages[-1].start(rows[rank])
    # another average, with a handshake, in the midst of them
    values = rows_of[0][rank].clone()
    average_(values)
    means = [exchange.result() for exchange in averages]
    got = [handle.wait() for handle in handles]
    assert torch.equal(values, rank_order_mean(rows_of[0]))
    assert all(torch.equal(mean, rank_order_mean(rows)) for mean, rows in zip(means, rows_of, strict=True))
    assert all(torch.equal(g, vote(p, parity=3)) for g, p in zip(got, packed, strict=True))


def test_bytes_of_formats_by_hand() -> None:
    # 64 Ki codes are 8 KiB of one bit each; chunks of 4 ranks 2 KiB, with 16 bytes of counts in front
    ternary, mean, byte = CodeFormat(2, "ternary"), CodeFormat(1, "sum"), CodeFormat(8, "ternary")
    assert bytes_by_level("all_gather", 8192, 4, byte) == {"flat": 3 * 8 * 8192}
    assert bytes_by_level("reduce_scatter", 8192, 4, ternary) == {"flat": 3 * (2 * 2048 + 16 + 2 * 2048)}
    # a sum of 4 signs, 0 to 4, takes 4 bits
    assert bytes_by_level("reduce_scatter", 8192, 4, mean) == {"flat": 3 * (2048 + 16 + 4 * 2048)}
    assert bytes_by_level("all_reduce", 8192, 4, ternary) == {"flat": 6 * 4 * 8192 // 4}
    # between nodes, sums of 2 codes of 0 to 2 in 4 bits; inside, both parts of 2 bits
    two_level = bytes_by_level("hierarchical", 8192, Topology.even(2, 2), ternary)
    assert two_level == {"intra": 2 * 2 * 2048 + 2 * (16 + 2 * 2048), "inter": 4 * 2048 + 16 + 2 * 2048}


def test_bytes_are_a_thirtysecond_of_fp32() -> None:
    d, workers = 2**24, 8
    fp32 = 2 * (workers - 1) / workers * 4 * d
    assert bytes_sent("reduce_scatter", packed_bytes(d), workers) / fp32 == pytest.approx(1 / 32, rel=1e-4)


def test_formats_that_no_field_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="300 workers of codes up to 254"):
        bytes_by_level("all_reduce", 64, 300, CodeFormat(8, "ternary"))
    with pytest.raises(ValueError, match="bits: expected one of"):
        CodeFormat(3, "sum")
    with pytest.raises(ValueError, match="result: expected one of"):
        CodeFormat(1, "mean")


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
