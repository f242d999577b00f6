"""The disk cache of the Numba kernels: a second process compiles nothing, changed sources and no cache compile anew."""

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
from lioncub.kernels import lion_step_
x, g, m = (torch.ones(8) for _ in range(3))
lion_step_(x, g, m, lr=0.5, beta1=1.0, beta2=1.0, weight_decay=0.0, impl="cpu")
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


UNCACHED = """
import sys, warnings
from pathlib import Path
from numba.core import caching
folder, is_full = Path(sys.argv[1]), sys.argv[2] == "full"
home = caching.UserWideCacheLocator
# for an administrator no folder is read-only, so a file takes the place of the one in the home folder
home.get_cache_path = lambda self: str(folder / "cache") if is_full else str(folder / "file" / "cache")
caching.FunctionCache._impl_class._locator_classes = [home]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from lioncub import kernels
    from lioncub.kernels import numba_cpu
    if is_full:
        (folder / "cache").rmdir()
        (folder / "cache").write_text("")
    for n in (70, 71):
        assert kernels.unpack_signs(kernels.pack_signs(torch.ones(n), impl="cpu"), n, impl="cpu").tolist() == [1.0] * n
ours = [str(w.message) for w in caught if "lioncub" in str(w.message)]
print(len(ours), ours[0])
"""


@pytest.mark.parametrize(
    ("kind", "why"),
    [("read-only", "neither the folder of lioncub nor the home folder"), ("full", "NotADirectoryError")],
)
def test_where_no_folder_can_be_written_kernels_compile_with_one_warning(tmp_path: Path, kind: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", UNCACHED, str(tmp_path), kind],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.split(" ", 1)
    assert count == "1"
    assert "cannot keep its compiled CPU kernels" in message
    assert why in message
    assert "NUMBA_CACHE_DIR" in message
