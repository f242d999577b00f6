"""The tests marked ``gpu``; in a dry run, one that Triton's interpreter can run. The log has each failure."""

from __future__ import annotations

import importlib.util

import pytest

from gpu.driver import ROOT
from gpu.workbench import Workbench

_ALWAYS = ("-q", "--tb", "short", "-rfE", "--durations", "5", "-p", "no:cacheprovider", "--rootdir", str(ROOT))


def run(bench: Workbench) -> None:
    """One row, by pytest in this process, or in four more where pytest-xdist is installed."""
    chosen = ["-k", "reference_s_bits and pack and interpreter"] if bench.is_dry else ["-m", "gpu"]
    if not bench.is_dry and importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", "4"]
    bench.attempt("tests/test_gpu.py", lambda: _run([*chosen, *_ALWAYS, str(ROOT / "tests" / "test_gpu.py")]))


def _run(arguments: list[str]) -> None:
    code = pytest.main(arguments)
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest: expected exit code 0, got {int(code)}")
