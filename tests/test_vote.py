"""The vote as a collective, over real Gloo processes, against a plain all-reduce of unpacked votes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist
from gloo_workers import Raised, outcomes_of, results_of

from lioncub.collectives import (
    ALGORITHMS,
    HANDSHAKE_BYTES,
    Link,
    WorkersDisagreeError,
    algorithms,
    bytes_sent,
    choose,
    predicted_seconds,
    transport,
    vote,
    vote_async,
)
from lioncub.collectives.header import (
    STATUS_DISAGREE,
    STATUS_NONFINITE,
    STATUS_OK,
    Header,
    combined_status,
    decode_headers,
    encode_header,
    header_bytes,
)
from lioncub.kernels import pack_signs, packed_bytes

SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1009, 70001)


def _values(rank: int, n: int) -> torch.Tensor:
    values = torch.randn(n, generator=torch.Generator().manual_seed(1000 * rank + n))
    values[::5] = values[::5].round()
    return values


def _bits(packed: torch.Tensor, n: int) -> torch.Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).reshape(-1)[:n]


def vote_like_all_reduce(rank: int, world_size: int, algorithm: str) -> list[bytes]:
    answers = []
    for parity, n in enumerate(SIZES):
        packed = pack_signs(_values(rank, n), parity=parity)
        total = _bits(packed, n).to(torch.int64)
        dist.all_reduce(total)
        tie = (torch.arange(n) + parity) % 2
        expected = torch.where(2 * total == world_size, tie, (2 * total > world_size).long())
        voted = vote(packed, algorithm=algorithm, parity=parity)
        assert voted.shape == (packed_bytes(n),)
        wrong = (_bits(voted, n) != expected).nonzero()
        assert not len(wrong), f"n={n}: element {int(wrong[0])} differs"
        assert not _bits(voted, 8 * len(voted))[n:].any(), f"n={n}: pad bits are set"
        answers.append(voted.numpy().tobytes())
    return answers


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "auto"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_vote_is_the_majority_of_unpacked_votes(world_size: int, algorithm: str) -> None:
    answers = results_of(vote_like_all_reduce, world_size, algorithm)
    assert all(answer == answers[0] for answer in answers)


def async_votes_in_flight(rank: int, world_size: int) -> bool:
    sizes, algorithms = (640, 65, 1009, 8), ("reduce_scatter", "all_gather", "auto", "reduce_scatter")
    packed = [pack_signs(_values(rank, n)) for n in sizes]
    handles = [vote_async(p, algorithm=a, parity=3) for p, a in zip(packed, algorithms, strict=True)]
    got = [handle.wait() for handle in handles]
    return all(torch.equal(g, vote(p, parity=3)) for g, p in zip(got, packed, strict=True))


def test_async_votes_can_be_in_flight_together() -> None:
    assert results_of(async_votes_in_flight, 3) == [True] * 3


def count_bytes(rank: int, world_size: int, algorithm: str, n: int) -> int:
    """Bytes that were handed to torch.distributed for other workers."""
    sent = 0
    all_gather, all_to_all = transport._all_gather, dist.all_to_all_single

    def counting_all_gather(output, message, **options):
        nonlocal sent
        sent += message.numel() * message.element_size() * (world_size - 1)
        return all_gather(output, message, **options)

    def counting_all_to_all(output, messages, **options):
        nonlocal sent
        sent += messages.numel() * messages.element_size() * (world_size - 1) // world_size
        return all_to_all(output, messages, **options)

    transport._all_gather, dist.all_to_all_single = counting_all_gather, counting_all_to_all
    vote(pack_signs(_values(rank, n)), algorithm=algorithm)
    return sent


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("world_size", "n"), [(1, 100), (2, 1009), (3, 70001), (4, 64), (5, 1009)])
def test_bytes_sent_are_those_predicted(algorithm: str, world_size: int, n: int) -> None:
    predicted = bytes_sent(algorithm, packed_bytes(n), world_size, header_bytes(0))
    handshake = HANDSHAKE_BYTES * (world_size - 1)
    assert results_of(count_bytes, world_size, algorithm, n) == [predicted + handshake] * world_size


def test_bytes_are_a_thirtysecond_of_fp32() -> None:
    d, workers = 2**24, 8
    fp32 = 2 * (workers - 1) / workers * 4 * d
    assert bytes_sent("reduce_scatter", packed_bytes(d), workers) / fp32 == pytest.approx(1 / 32, rel=1e-4)


def test_auto_takes_the_faster_algorithm() -> None:
    link = Link(latency_s=1e-3, bytes_per_s=1e8)
    assert choose("auto", 1000, 4, link) == "all_gather"
    assert choose("auto", 10_000_000, 4, link) == "reduce_scatter"
    assert all(choose("auto", n, 2, link) == "all_gather" for n in (8, 10**9))
    assert predicted_seconds("all_gather", 10**6, 4, link) == pytest.approx(3 * (1e-3 + 1e-2))
    assert predicted_seconds("reduce_scatter", 10**6, 4, link) == pytest.approx(6e-3 + 6 * 250_000 / 1e8, rel=1e-3)


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


@pytest.mark.parametrize(("field", "value"), [("latency_s", -1.0), ("bytes_per_s", 0.0)])
def test_impossible_links_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Link(**{field: value})


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match="algorithm: expected one of"):
        choose("ring", 8, 2, Link())


def hear_another_status(rank: int, world_size: int) -> str:
    original = algorithms.combined_status
    if rank == 1:
        algorithms.combined_status = lambda headers: original(headers) + 1
    with pytest.raises(WorkersDisagreeError) as caught:
        vote(pack_signs(_values(rank, 64)), algorithm="reduce_scatter")
    return str(caught.value)


def test_replies_that_differ_are_noticed_by_all() -> None:
    message = "workers disagree on the wire version and status of a vote: ranks 0, 2: [1, 0]; rank 1: [1, 1]"
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
    assert int(combined_status(raw)) == status


def test_headers_come_back_as_they_were() -> None:
    present = tuple(i % 3 == 0 or i == 63 for i in range(70))
    header = Header(step=5, layout=-(2**63), hyperparameters=2**63 - 1, flags=5, has_gradient=present)
    raw = encode_header(header, torch.device("cpu"), torch.tensor([0] * 66 + [7] + [0] * 2 + [1], dtype=torch.int32))
    assert raw.numel() == header_bytes(70)
    assert decode_headers(raw[None], 70) == [dataclasses.replace(header, nonfinite=67)]
