"""Votes on codes of every format, by every algorithm, against plain sums of unpacked codes, over real processes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from counting import Counting
from gloo_workers import Raised, outcomes_of, results_of
from samples import fields_of

from lioncub.collectives import ALGORITHMS, HANDSHAKE_BYTES, Codes, Routes, Topology, traffic, vote
from lioncub.collectives.traffic import candidates
from lioncub.kernels import packed_bytes

FORMATS = [
    Codes(1, "ternary"),
    Codes(2, "ternary"),
    Codes(4, "ternary"),
    Codes(8, "ternary"),
    Codes(2, "majority"),
    Codes(8, "majority"),
    Codes(1, "sum"),
    Codes(2, "sum"),
    Codes(8, "sum"),
]
SIZES = (0, 1, 63, 64, 65, 1009)


def packed_codes(rank: int, n: int, codes: Codes) -> torch.Tensor:
    """As an optimizer packs them: whole words of 64 codes, padded with zeros."""
    generator = torch.Generator().manual_seed(100 * rank + n)
    values = torch.randint(0, codes.largest + 1, (n,), generator=generator, dtype=torch.uint8)
    padded = torch.zeros(8 * packed_bytes(n), dtype=torch.uint8)
    padded[:n] = values
    per_byte = 8 // codes.bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * codes.bits
    return (padded.view(-1, per_byte) << shifts).sum(dim=1, dtype=torch.uint8)


def sums_of_everyone(packed: torch.Tensor, n: int, codes: Codes) -> torch.Tensor:
    """int32[n]: the sum of signs or levels of all workers, added by a plain all-reduce of whole numbers."""
    step, offset = codes.value(1)
    total = step * fields_of(packed, codes.bits)[:n] - offset
    dist.all_reduce(total)
    return total


def votes_of_every_format(rank: int, world_size: int) -> list[bytes]:
    routes = [None]
    if world_size == 4:
        routes.append(Routes.build(None, Topology(((0, 1), (2, 3)))))
    answers = []
    for codes, n in itertools.product(FORMATS, SIZES):
        packed = packed_codes(rank, n, codes)
        before = packed.clone()
        expected = sums_of_everyone(packed, n, codes)
        width = codes.result_bits(world_size)
        found = []
        for name in ALGORITHMS:
            way = routes[-1] if name == "hierarchical" else None
            if name == "hierarchical" and way is None:
                continue
            result = vote(packed, algorithm=name, codes=codes, routes=way)
            assert len(result) == packed_bytes(n) * width
            if codes.result == "ternary":
                got = fields_of(result, 2)[:n] - 1
                assert torch.equal(got, expected.sign()), (codes, n, name)
            elif codes.result == "majority":
                got = 2 * fields_of(result, 1)[:n] - 1
                parity = 2 * (torch.arange(n, dtype=torch.int32) % 2) - 1
                assert torch.equal(got, torch.where(expected == 0, parity, expected.sign())), (codes, n, name)
            else:
                step, offset = codes.value(world_size)
                got = step * fields_of(result, width)[:n] - offset
                assert torch.equal(got, expected), (codes, n, name)
            found.append(result.numpy().tobytes())
        assert len(set(found)) == 1
        assert torch.equal(packed, before)
        answers.append(found[0])
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_algorithm_gives_the_sum_of_every_format(world_size: int) -> None:
    answers = results_of(votes_of_every_format, world_size)
    assert all(answer == answers[0] for answer in answers)


def bytes_of_every_format(rank: int, world_size: int) -> list[tuple[str, int, int]]:
    found = []
    routes = Routes.build(None, Topology(((0, 1), (2, 3))))
    counting = Counting()
    for codes, name in itertools.product(FORMATS, ALGORITHMS):
        packed = packed_codes(rank, 70001, codes)
        counting.sent.clear()
        vote(packed, algorithm=name, codes=codes, routes=routes if name == "hierarchical" else None)
        sent = sum(counting.sent.values()) - HANDSHAKE_BYTES * (world_size - 1)
        topology = routes.topology if name == "hierarchical" else Topology.flat(world_size)
        told = sum(traffic(name, packed_bytes(70001), topology, 48, codes=codes).values())
        found.append((f"{name} {codes}", sent, told))
    return found


def test_bytes_are_those_that_were_told() -> None:
    for answer in results_of(bytes_of_every_format, 4):
        for what, sent, told in answer:
            assert sent == told, what


def test_bytes_of_formats_by_hand() -> None:
    # 64 Ki codes are 8 KiB of one bit each; chunks of 4 workers 2 KiB
    ternary, mean, byte = Codes(2, "ternary"), Codes(1, "sum"), Codes(8, "ternary")
    assert traffic("all_gather", 8192, 4, codes=byte) == {"flat": 3 * 8 * 8192}
    assert traffic("reduce_scatter", 8192, 4, codes=ternary) == {"flat": 3 * (2 * 2048 + 32 + 2 * 2048)}
    # a sum of 4 signs, 0 to 4, stands in 4 bits
    assert traffic("reduce_scatter", 8192, 4, codes=mean) == {"flat": 3 * (2048 + 32 + 4 * 2048)}
    assert traffic("all_reduce", 8192, 4, codes=ternary) == {"flat": 6 * 4 * 8192 // 4}
    # between nodes, sums of 2 codes of 0 to 2 in 4 bits; inside, both parts of 2 bits
    two_level = traffic("hierarchical", 8192, Topology.even(2, 2), codes=ternary)
    assert two_level == {"intra": 2 * 2 * 2048 + 2 * (32 + 2 * 2048), "inter": 4 * 2048 + 32 + 2 * 2048}


def test_formats_that_no_field_holds_are_refused() -> None:
    many = Topology.flat(300)
    assert candidates(many, Codes(8, "ternary")) == ()
    assert candidates(many, Codes(4, "ternary")) == ("all_gather", "reduce_scatter", "all_reduce")
    with pytest.raises(ValueError, match="300 workers of codes up to 254"):
        traffic("all_reduce", 64, 300, codes=Codes(8, "ternary"))
    with pytest.raises(ValueError, match="bits: expected one of"):
        Codes(3, "sum")
    with pytest.raises(ValueError, match="result: expected one of"):
        Codes(1, "mean")


def vote_in_different_formats(rank: int, world_size: int) -> None:
    packed = torch.zeros(64, dtype=torch.uint8)
    vote(packed, codes=Codes(2, "ternary") if rank else Codes(1, "ternary"))


def test_workers_with_different_formats_all_raise() -> None:
    for answer in outcomes_of(vote_in_different_formats, 2):
        assert isinstance(answer, Raised)
        assert answer.kind == "WorkersDisagreeError"
        assert "the format of codes" in answer.message
