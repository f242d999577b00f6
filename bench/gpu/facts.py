"""The machine: GPU, versions, tools, and where the package comes from."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
import triton
from reporting.records import machine_facts

import lioncub
from gpu.driver import CARRIED
from gpu.workbench import Workbench

_TOOLS = ("ip", "tc", "gcc", "ncu", "compute-sanitizer")
_QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm"


def run(bench: Workbench) -> None:
    """A row for each fact."""
    carried = CARRIED in Path(lioncub.__file__).parents
    facts = {**machine_facts(), "triton": triton.__version__, "kernel": platform.release()}
    facts |= {"usable cores": str(len(os.sched_getaffinity(0))), "lioncub": "carried" if carried else "installed"}
    facts |= {tool: "found" if shutil.which(tool) else "absent" for tool in _TOOLS}
    for name, value in facts.items():
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
