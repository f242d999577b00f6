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


def mesh_of_three() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh("cpu", torch.arange(3).view(3, 1), _init_backend=False)


# of every case: the kind of error, its text, seconds until it came
Answers = dict[str, tuple[str, str, float]]
# what all ranks but one call, what that one calls, and the start of that one's error; "" for an error of all
Case = tuple[Callable[[], Any], Callable[[], Any], str]
UNEVEN = Topology(((0, 1), (2,)))


def cases_of(call: Callable[..., Any], right: Any, **wrong: tuple[Any, str]) -> dict[str, Case]:
    """Cases of one argument, which is made on each rank; ``call`` takes it."""
    name = getattr(call, "__name__", "call")
    return {
        f"{name} {what}": (lambda: call(right()), lambda value=value: call(value()), error)  # type: ignore[misc]
        for what, (value, error) in wrong.items()
    }


def vote_with(options: dict[str, Any]) -> Any:
    return vote(options.pop("packed", BYTES), **options)


def average_with(options: dict[str, Any]) -> Any:
    return average_(options.pop("values", torch.zeros(100)), **options)


def groups_of(topology: Topology) -> Any:
    return ProcessGroups.build(None, topology)


def probe_for(seconds: Any) -> Any:
    return probe(ProcessGroups.flat(), seconds=seconds)


CASES: dict[str, Case] = {
    **cases_of(
        vote_with,
        dict,
        impl=(lambda: {"impl": "metal"}, "ValueError: impl: expected one of"),
        floats=(lambda: {"packed": BYTES.float()}, "TypeError: packed: expected a uint8"),
        list=(lambda: {"packed": [1, 2]}, "TypeError: packed: expected a uint8"),
        matrix=(lambda: {"packed": BYTES.view(8, 8)}, "ValueError: packed: expected a contig"),
        parts_of_words=(lambda: {"packed": BYTES[:9]}, "ValueError: packed: expected"),
        meta=(lambda: {"packed": BYTES.to("meta")}, "ValueError: packed: expected a tensor w"),
        name=(lambda: {"algorithm": "gossip"}, "ValueError: algorithm: expected"),
        half=(lambda: {"parity": 0.5}, "TypeError: parity: expected an integer"),
        more=(lambda: {"packed": torch.cat([BYTES, BYTES])}, ""),
    ),
    **cases_of(vote_with, lambda: {"algorithm": "all_gather"}, algorithm=(lambda: {"algorithm": "reduce_scatter"}, "")),
    **cases_of(vote_with, lambda: {"parity": 1}, parity=(lambda: {"parity": 4}, "")),
    **cases_of(
        vote_with,
        lambda: {"form": CodeFormat(1, "ternary")},
        format=(lambda: {"form": CodeFormat(2, "ternary")}, ""),
        no_format=(lambda: {"form": 2}, "TypeError: form: expected CodeFormat"),
    ),
    **cases_of(
        average_with,
        dict,
        more=(lambda: {"values": torch.zeros(1000)}, ""),
        dtype=(lambda: {"dtype": "bf16"}, ""),
        no_dtype=(lambda: {"dtype": "fp8"}, "ValueError: dtype: expected one of"),
        integers=(
            lambda: {"values": torch.zeros(100, dtype=torch.int32)},
            "ValueError: values: expected a contiguous float32",
        ),
    ),
    **cases_of(
        groups_of,
        lambda: UNEVEN,
        workers=(lambda: Topology.even(2, 2), "ValueError: topology: expected one of the group's 3 workers"),
        nodes=(lambda: Topology.flat(3), ""),
    ),
    **cases_of(ProcessGroups.of_mesh, mesh_of_three, string=(lambda: "mesh", "TypeError: mesh: expected a DeviceMesh")),
    **cases_of(probe_for, lambda: 0.0, string=(lambda: "1", "TypeError: seconds: expected a number")),
    **cases_of(
        lioncub.broadcast_module,
        lambda: nn.Linear(3, 2),
        shape=(lambda: nn.Linear(2, 3), ""),
        dtype=(lambda: nn.Linear(3, 2).half(), ""),
        less=(lambda: nn.Linear(3, 2, bias=False), ""),
        list=(lambda: [torch.zeros(2, 3), torch.zeros(2)], "TypeError: module: expected a torch.nn.Module"),
        meta=(Broken, "ValueError: weight: expected a dense tensor with data"),
    ),
    **cases_of(broadcast_tensors, lambda: [torch.zeros(3), torch.zeros(4)], fewer=(lambda: [torch.zeros(3)], "")),
    **cases_of(
        check_equal,
        lambda: [("a", torch.zeros(3))],
        meta=(lambda: [("a", META)], "RuntimeError: "),
        fewer=(list, ""),
    ),
}


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
    "vote_with more": ("the bytes of the message", "64", "128"),
    "vote_with algorithm": ("the algorithm", "all_gather", "reduce_scatter"),
    "vote_with parity": ("the parity", "1", "0"),
    "vote_with format": (
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
