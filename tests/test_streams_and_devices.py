"""What a GPU needs of the collectives, held without one: streams that wait, devices of messages, grids of launches."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lioncub import LionCub
from lioncub.collectives import exchange, transport
from lioncub.collectives.exchange import Phase

TRITON = Path(__file__).parents[1] / "kernels" / "triton_gpu"


class Work:
    """A collective under way, which notes the stream that waits for it."""

    def __init__(self, streams: list[str]) -> None:
        self._streams, self.waited = streams, list[str]()

    def wait(self) -> None:
        self.waited.append(self._streams[-1])


def test_every_stream_that_reads_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = ["main"]
    monkeypatch.setattr(exchange.torch.cuda, "current_stream", lambda device: streams[-1])
    phase, works = Phase(torch.device("cuda", 0)), [Work(streams), Work(streams)]
    phase.start(*(lambda work=work: work for work in works))
    for stream in ("courier", "courier", "main", "courier"):
        streams.append(stream)
        phase.wait()
    assert [work.waited for work in works] == [["courier", "main"]] * 2
    # the next phase is waited for anew
    later = Work(streams)
    phase.start(lambda: later)
    phase.wait()
    assert later.waited == ["courier"]
    assert works[0].waited == ["courier", "main"]


def test_on_a_cpu_the_host_waits_once() -> None:
    phase, work = Phase(torch.device("cpu")), Work(["host"])
    phase.start(lambda: work)
    phase.wait()
    phase.wait()
    assert work.waited == ["host"]


@pytest.mark.parametrize(
    ("carried", "bound", "given", "expected"),
    [
        (["cpu"], None, "cuda:1", "cpu"),
        (["cuda", "cpu"], 2, "cuda:1", "cpu"),
        (["cuda"], None, "cuda:1", "cuda:1"),
        (["cuda"], 2, "cuda:1", "cuda:1"),
        (["cuda"], 2, None, "cuda:2"),
        (["cuda"], 2, "cpu", "cuda:2"),
        (["cuda"], None, None, "cuda:3"),
    ],
)
def test_messages_of_a_group_without_cpu_are_where_the_data_is(
    monkeypatch: pytest.MonkeyPatch, carried: list[str], bound: int | None, given: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    group: Any = SimpleNamespace(
        _device_types=[torch.device(name) for name in carried],
        bound_device_id=None if bound is None else torch.device("cuda", bound),
    )
    device = None if given is None else torch.device(given)
    assert transport.device_of(group, device) == torch.device(expected)


def test_all_grids_have_one_dimension() -> None:
    # only the first may have more than 65,535 programs
    sources = {path.name: path.read_text() for path in TRITON.glob("*.py")}
    assert "scales.py" in sources
    assert [name for name, text in sources.items() if "program_id(1)" in text or "program_id(2)" in text] == []


def test_one_worker_s_tensors_share_a_bucket() -> None:
    params = [nn.Parameter(torch.zeros(1000, 1000)) for _ in range(20)]
    assert len(LionCub(params, lr=0.01).stats().buckets) == 1
