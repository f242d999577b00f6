"""A rank whose own call is wrong tells the others, over real Gloo processes: none waits for the timeout."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_workers import on_ranks, results_of
from torch import nn

import lioncub
from lioncub.collectives import CodeFormat, ProcessGroups, Topology, WorkersDisagreeError, average_, vote
from lioncub.collectives.probe import probe
from lioncub.replicas import broadcast_tensors, check_equal

BYTES = torch.zeros(64, dtype=torch.uint8)
META = torch.zeros(3, device="meta")


class Broken(nn.Module):
    """A module whose parameter has no data."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3, device="meta"))


# what all ranks but one call, what that one calls, and the start of that one's error; "" for an error of all
# of every case: the kind of error, its text, seconds until it came
Answers = dict[str, tuple[str, str, float]]
Case = tuple[Callable[[], Any], Callable[[], Any], str]
CASES: dict[str, Case] = {
    "vote by an implementation that there is none of": (
        lambda: vote(BYTES),
        lambda: vote(BYTES, impl="metal"),
        "ValueError: impl: expected one of",
    ),
    "vote on floats": (lambda: vote(BYTES), lambda: vote(BYTES.float()), "TypeError: packed: expected a uint8"),
    "vote on a list": (lambda: vote(BYTES), lambda: vote([1, 2]), "TypeError: packed: expected a uint8"),  # type: ignore[arg-type]
    "vote on a matrix": (lambda: vote(BYTES), lambda: vote(BYTES.view(8, 8)), "ValueError: packed: expected a contig"),
    "vote on bytes that are no words": (lambda: vote(BYTES), lambda: vote(BYTES[:9]), "ValueError: packed: expected"),
    "vote on nothing": (lambda: vote(BYTES), lambda: vote(BYTES.to("meta")), "ValueError: packed: expected a tensor w"),
    "vote by another name": (
        lambda: vote(BYTES),
        lambda: vote(BYTES, algorithm="gossip"),
        "ValueError: algorithm: expected",
    ),
    "vote with a parity of half": (
        lambda: vote(BYTES),
        lambda: vote(BYTES, parity=0.5),  # type: ignore[arg-type]
        "TypeError: parity: expected an integer",
    ),
    "vote on no format": (
        lambda: vote(BYTES, form=CodeFormat(2, "sum")),
        lambda: vote(BYTES, form=2),  # type: ignore[arg-type]
        "TypeError: form: expected CodeFormat",
    ),
    "vote on more": (lambda: vote(BYTES), lambda: vote(torch.cat([BYTES, BYTES])), ""),
    "vote by another algorithm": (
        lambda: vote(BYTES, algorithm="all_gather"),
        lambda: vote(BYTES, algorithm="reduce_scatter"),
        "",
    ),
    "vote with another parity": (lambda: vote(BYTES, parity=1), lambda: vote(BYTES, parity=4), ""),
    "vote in another format": (
        lambda: vote(BYTES, form=CodeFormat(1, "ternary")),
        lambda: vote(BYTES, form=CodeFormat(2, "ternary")),
        "",
    ),
    "average more": (lambda: average_(torch.zeros(100)), lambda: average_(torch.zeros(1000)), ""),
    "average otherwise": (lambda: average_(torch.zeros(100)), lambda: average_(torch.zeros(100), dtype="bf16"), ""),
    "average integers": (
        lambda: average_(torch.zeros(100)),
        lambda: average_(torch.zeros(100, dtype=torch.int32)),
        "ValueError: values: expected a contiguous float32",
    ),
    "average by no dtype": (
        lambda: average_(torch.zeros(100)),
        lambda: average_(torch.zeros(100), dtype="fp8"),
        "ValueError: dtype: expected one of",
    ),
    "groups of other workers": (
        lambda: ProcessGroups.build(None, Topology(((0, 1), (2,)))),
        lambda: ProcessGroups.build(None, Topology.even(2, 2)),
        "ValueError: topology: expected one of the group's 3 workers",
    ),
    "groups of other nodes": (
        lambda: ProcessGroups.build(None, Topology(((0, 1), (2,)))),
        lambda: ProcessGroups.build(None, Topology.flat(3)),
        "",
    ),
    "groups of a mesh that is none": (
        lambda: ProcessGroups.of_mesh(MESH()),
        lambda: ProcessGroups.of_mesh("mesh"),  # type: ignore[arg-type]
        "TypeError: mesh: expected a DeviceMesh",
    ),
    "probe for no time": (
        lambda: probe(ProcessGroups.flat(), seconds=0.0),
        lambda: probe(ProcessGroups.flat(), seconds="1"),  # type: ignore[arg-type]
        "TypeError: seconds: expected a number",
    ),
    "broadcast another module": (
        lambda: lioncub.broadcast_module(nn.Linear(3, 2)),
        lambda: lioncub.broadcast_module(nn.Linear(2, 3)),
        "",
    ),
    "broadcast a module in another dtype": (
        lambda: lioncub.broadcast_module(nn.Linear(3, 2)),
        lambda: lioncub.broadcast_module(nn.Linear(3, 2).half()),
        "",
    ),
    "broadcast a module with more": (
        lambda: lioncub.broadcast_module(nn.Linear(3, 2)),
        lambda: lioncub.broadcast_module(nn.Linear(3, 2, bias=False)),
        "",
    ),
    "broadcast no module": (
        lambda: lioncub.broadcast_module(nn.Linear(3, 2)),
        lambda: lioncub.broadcast_module([torch.zeros(2, 3), torch.zeros(2)]),  # type: ignore[arg-type]
        "TypeError: module: expected a torch.nn.Module",
    ),
    "broadcast what has no data": (
        lambda: lioncub.broadcast_module(nn.Linear(3, 2, bias=False)),
        lambda: lioncub.broadcast_module(Broken()),
        "ValueError: weight: expected a dense tensor with data",
    ),
    "broadcast fewer tensors": (
        lambda: broadcast_tensors([torch.zeros(3), torch.zeros(4)]),
        lambda: broadcast_tensors([torch.zeros(3)]),
        "",
    ),
    "compare what cannot be read": (
        lambda: check_equal([("a", torch.zeros(3))]),
        lambda: check_equal([("a", META)]),
        "RuntimeError: ",
    ),
    "compare fewer": (lambda: check_equal([("a", torch.zeros(3))]), lambda: check_equal([]), ""),
}


def MESH() -> Any:  # noqa: N802
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", torch.arange(3).view(3, 1), _init_backend=False)


def _call_wrongly(rank: int, world_size: int) -> Answers:
    said = {}
    for wrong, (name, (right, bad, _)) in enumerate(CASES.items()):
        began = time.monotonic()
        try:
            (bad if rank == wrong % world_size else right)()
            said[name] = ("nothing", "", 0.0)
        except Exception as error:
            said[name] = (type(error).__name__, str(error), time.monotonic() - began)
        # the group is as good as before
        values = torch.full((70,), float(rank))
        average_(values)
        assert values.tolist() == [(world_size - 1) / 2] * 70, name
    return said


@pytest.fixture(scope="module")
def answers() -> list[Answers]:
    return results_of(_call_wrongly, 3, timeout=60.0)


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_raise_where_one_call_is_wrong(name: str, answers: list[Answers]) -> None:
    own, culprit = CASES[name][2], list(CASES).index(name) % 3
    for rank, answer in enumerate(answers):
        kind, message, seconds = answer[name]
        # an order of magnitude below the timeout: raised by what was said, not by waiting
        assert seconds < 20
        if own and rank == culprit:
            assert f"{kind}: {message}".startswith(own)
            continue
        assert kind == WorkersDisagreeError.__name__, f"rank {rank}: {kind}: {message}"
        if own:
            assert f"because of an error on rank {culprit}: {own}" in message
        else:
            assert f"rank {culprit}" in message


# of cases in which all disagree: on what, the value of most ranks and that of one
TEXTS = {
    "vote on more": ("the bytes of the message", "64", "128"),
    "vote by another algorithm": ("the algorithm", "all_gather", "reduce_scatter"),
    "vote with another parity": ("the parity", "1", "0"),
    "vote in another format": (
        "the format of codes",
        "CodeFormat(bits=1, result='ternary')",
        "CodeFormat(bits=2, result='ternary')",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_error_names_the_ranks_and_their_values(name: str, answers: list[Answers]) -> None:
    what, usual, odd = TEXTS[name]
    culprit = list(CASES).index(name) % 3
    parts = [f"ranks {', '.join(str(rank) for rank in range(3) if rank != culprit)}: {usual}", f"rank {culprit}: {odd}"]
    # whoever holds the first rank comes first
    ordered = parts if culprit else parts[::-1]
    assert [answer[name][1] for answer in answers] == [f"workers disagree on {what}: {'; '.join(ordered)}"] * 3


@on_ranks(2)
def test_modules_of_other_shapes_stay_as_they_are(rank: int, world_size: int) -> None:
    module = nn.Linear(3 - rank, 2 + rank, bias=False)
    nn.init.constant_(module.weight, float(rank))
    with pytest.raises(
        WorkersDisagreeError, match=r"workers disagree on weight: rank 0: .* \(2, 3\); rank 1: .* \(3, 2\)"
    ):
        lioncub.broadcast_module(module)
    assert module.weight.flatten().tolist() == [float(rank)] * 6
