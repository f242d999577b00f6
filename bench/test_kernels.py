"""Every op of the kernels under pytest-benchmark, for those who follow it over commits.

``pytest bench/test_kernels.py -k "1Mi and fp32" --benchmark-autosave``, later the same with ``--benchmark-compare``.
`make bench` relates each op to a stream of the same bytes instead, which is steadier on shared machines.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from speed.cases import Cell, cells
from speed.data import Data

IMPL = "triton" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.name) for cell in cells(IMPL)])
def test_kernel(benchmark: Any, cell: Cell) -> None:
    call = cell.case.make(Data(*cell.data_key()), cell.impl)

    def run() -> None:
        call.run()
        if IMPL == "triton":
            torch.cuda.synchronize()

    run()
    benchmark.extra_info["bytes"] = call.bytes_moved
    benchmark(run)
