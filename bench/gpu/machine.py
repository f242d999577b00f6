"""Facts of the machine, and the tests that need a GPU."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from reporting.records import ROOT, machine_facts

import lioncub
from gpu.driver import CARRIED
from gpu.workbench import Workbench

_TOOLS = ("ip", "tc", "gcc", "ncu", "compute-sanitizer")
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm"
_TESTS = str(ROOT / "tests" / "test_gpu.py")
_PYTEST = ("-q", "--tb", "short", "-rfE", "--durations", "5", "-p", "no:cacheprovider", "--rootdir", str(ROOT))


def facts(bench: Workbench) -> None:
    """Record GPU, versions, tools, and where the package comes from, a row for each."""
    carried = CARRIED in Path(lioncub.__file__).parents
    found = {**machine_facts(), "kernel": platform.release(), "lioncub": "carried" if carried else "installed"}
    found |= {tool: "found" if shutil.which(tool) else "absent" for tool in _TOOLS}
    for name, value in found.items():
        bench.add(name, value=value)
    bench.attempt("device", lambda: _device(bench.device), needs="a GPU")
    bench.attempt("nvidia-smi", _smi, needs="a GPU")


def _device(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    counts = f"{properties.multi_processor_count} SMs, {properties.L2_cache_size >> 20} MiB of L2"
    return {"value": f"{counts}, sm_{properties.major}{properties.minor}"}


def _smi() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    return {"value": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}


def test(bench: Workbench) -> None:
    """Run the tests marked ``gpu``, in a dry run one that Triton's interpreter can run. The log has each failure."""
    chosen = ["-k", "reference_s_bits and pack and interpreter"] if bench.is_dry else ["-m", "gpu"]
    if not bench.is_dry and importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", "4"]
    bench.attempt("tests/test_gpu.py", lambda: _run_tests([*chosen, *_PYTEST, _TESTS]))


def _run_tests(arguments: list[str]) -> None:
    code = pytest.main(arguments)
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest: expected exit code 0, got {int(code)}")
