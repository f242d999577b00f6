"""Benchmarks import their neighbours by name, which pytest's importlib mode does not arrange; one thread runs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from speed.machine import keep_freed_memory
from speed.workbench import Workbench


@pytest.fixture(scope="session")
def benches() -> Iterator[dict[str, Workbench]]:
    """A workbench for each device."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {device: Workbench(device) for device in ("cpu", "cuda")}
    torch.set_num_threads(before)
