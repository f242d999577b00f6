"""What carries every message, over real Gloo processes and simulated ranks, and on which device messages are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of

from lioncub.collectives import transport
from lioncub.collectives.transport import EagerAllToAll, PairwiseAllToAll, Transport
from lioncub.simulate import Workers

CPU = torch.device("cpu")


def carried(rank: int, size: int, group: dist.ProcessGroup | None) -> list[str]:
    """Check every collective by both kinds of channel; the kinds that carried the exchanges."""
    carrier, kinds, tag = Transport(group, CPU), [], 0
    assert (carrier.size, carrier.rank) == (size, rank)
    for n_bytes in (0, 1, 17, 4096):
        rows = torch.arange(size * n_bytes, dtype=torch.int64).view(size, n_bytes)
        everyone = [(rows + 7 * peer).to(torch.uint8) for peer in range(size)]
        mine, expected = everyone[rank], torch.stack([theirs[rank] for theirs in everyone])
        assert torch.equal(carrier.exchange(mine, tag).wait(), expected)
        first = torch.stack([theirs[0] for theirs in everyone])
        assert torch.equal(carrier.gather(mine[0]).wait(), first)
        for eager in (False, True):
            exchange, gather = (carrier.channel(n_bytes, tag + i, eager=eager) for i in (1, 2))
            # both are in flight, and end in another order than they began
            pending, others = exchange.send(mine), gather.send(mine[0].contiguous())
            assert torch.equal(others.wait(), first)
            assert torch.equal(pending.wait(), expected)
            kinds.append(type(pending).__name__)
            tag += 3
    total = carrier.all_reduce(torch.tensor([1, 10 * rank], dtype=torch.int32)).wait()
    assert total.tolist() == [size, 10 * sum(range(size))]
    return kinds


def carried_for_real(rank: int, world_size: int) -> list[str]:
    return carried(rank, world_size, None)


def test_every_collective_on_every_transport() -> None:
    for size in (1, 3):
        pairs = [PairwiseAllToAll.__name__, EagerAllToAll.__name__] * 4
        assert results_of(carried_for_real, size) == [pairs] * size
        with Workers(size) as workers:
            assert workers.run(lambda rank, group, size=size: carried(rank, size, group)) == [["_Started"] * 8] * size


def test_simulated_messages_are_on_the_cpu() -> None:
    with Workers(2) as workers:
        group = workers.groups[0]
        assert transport.device_of(group, torch.device("cuda", 1)) == CPU
        assert transport.backend_of(group, "cpu") == "virtual"
        assert not Transport(group, CPU).has_point_to_point


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
