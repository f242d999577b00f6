"""Speed of other ways to do what the kernels do: `speed.peers`, one thread, fp32, 16 Mi elements."""

from __future__ import annotations

import time
from typing import Any

import pytest
from speed.data import SIZES, Data
from speed.peers import PEERS, Peer
from speed.workbench import Workbench

pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.fixture(scope="module")
def data() -> Data:
    return Data(SIZES["16Mi"])


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peer(benchmark: Any, benches: dict[str, Workbench], data: Data, peer: Peer) -> None:
    benches["cpu"].measure(benchmark, peer.make(data), kind="peer", name=peer.name)
