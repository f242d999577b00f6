"""The disk cache of the Numba kernels: a second process compiles nothing, changed sources compile anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

SCRIPT = """
import sys, torch
from lioncub.kernels.numba_cpu import compiling, lion
if len(sys.argv) > 1:
    compiling._SOURCES = sys.argv[1]
from lioncub.kernels.scalars import Mix
x, g, m = (torch.ones(8) for _ in range(3))
lion.lion_step_([x], [g], [m], 0.5, 1.0, Mix(1.0, 0.0), Mix(1.0, 0.0))
assert x.tolist() == [0.5] * 8
stats = lion._step_kernel.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def _hits_and_misses(cache: Path, *arguments: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(count) for count in done.stdout.split()]


def test_second_process_loads_from_disk(tmp_path: Path) -> None:
    assert _hits_and_misses(tmp_path) == [0, 1]
    assert list(tmp_path.rglob("lion._step_kernel-*.nbi"))
    assert _hits_and_misses(tmp_path) == [1, 0]


def test_a_change_in_any_source_file_recompiles(tmp_path: Path) -> None:
    assert _hits_and_misses(tmp_path) == [0, 1]
    assert _hits_and_misses(tmp_path, "digest of other sources") == [0, 1]
