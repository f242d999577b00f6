"""Time per element that a GPU's memory allows, and its units for the instructions: arithmetic on data sheets.

All rates are of threads: a warp of 32, or a wave of 64, counts as so many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# a unit's share of each pipe's instructions: instructions of one thread per clock and processor
Port = Mapping[str, float]


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bytes per second, processors (SM or CU), clock in Hz, and the processors' ports.

    Instructions of the pipes of one port wait for one another, ports work side by side. ``issue`` is the rate at which
    a processor issues instructions of any kind; None where each port is issued to by itself.
    """

    name: str
    bandwidth: float
    processors: int
    clock: float
    issue: float | None
    ports: tuple[Port, ...]
    source: str


# an SM has 4 schedulers, each of which issues one instruction of a warp of 32 per clock
_SM_ISSUE = 4 * 32.0
# 16 lanes in each of an SM's 4 parts, and the units that the 4 share
_SM_PORTS: tuple[Port, ...] = ({"alu": 64.0}, {"imad": 64.0}, {"xu": 16.0}, {"lsu": 32.0})
_A100_PORTS: tuple[Port, ...] = (*_SM_PORTS, {"fma": 64.0, "imad": 64.0}, {"fp64": 32.0})
# half of the lanes for fp32 multiply integers too
_H100_PORTS: tuple[Port, ...] = (*_SM_PORTS, {"fma": 128.0, "imad": 128.0}, {"fp64": 64.0})
# 4 SIMDs of 16 lanes take 4 clocks for a wave of 64; meanwhile each other unit is offered one instruction of each SIMD
_CU_PORTS: tuple[Port, ...] = ({"valu": 64.0, "quarter": 16.0}, {"salu": 64.0, "smem": 64.0}, {"vmem": 64.0})
_CU_PORTS += ({"lds": 64.0}, {"branch": 64.0})

A100 = Gpu(
    "A100",
    2.039e12,
    108,
    1.41e9,
    _SM_ISSUE,
    _A100_PORTS,
    "NVIDIA A100 80GB SXM data sheet; A100 architecture whitepaper",
)
# the clock is what 67 TFLOPS of fp32 take on 132 SMs
H100 = Gpu(
    "H100", 3.35e12, 132, 1.98e9, _SM_ISSUE, _H100_PORTS, "NVIDIA H100 SXM data sheet; H100 architecture whitepaper"
)
# the clock is what 75 TFLOPS of fp32 take on 148 SMs
B200 = Gpu(
    "B200",
    8.0e12,
    148,
    1.98e9,
    _SM_ISSUE,
    _H100_PORTS,
    "NVIDIA HGX B200 data sheet, per GPU; SMs as the CUDA driver reports",
)
MI300X = Gpu("MI300X", 5.3e12, 304, 2.1e9, None, _CU_PORTS, "AMD Instinct MI300X data sheet")
MI355X = Gpu("MI355X", 8.0e12, 256, 2.4e9, None, _CU_PORTS, "AMD Instinct MI355X data sheet")

GPUS = {"sm_80": A100, "sm_90": H100, "sm_100": B200, "gfx942": MI300X, "gfx950": MI355X}


def memory_seconds(gpu: Gpu, bytes_per_element: float) -> float:
    """Seconds per element at the memory's bandwidth."""
    return bytes_per_element / gpu.bandwidth


def issue_seconds(gpu: Gpu, per_element: Mapping[str, float]) -> tuple[float, str]:
    """Seconds per element of the slowest port, and its pipes; ``per_element`` are a thread's instructions by pipe.

    "issue" is the schedulers' own limit. Latency, bank conflicts and full queues are not modelled.
    """
    clocks = {"+".join(port): sum(per_element.get(pipe, 0) / rate for pipe, rate in port.items()) for port in gpu.ports}
    if gpu.issue is not None:
        clocks["issue"] = sum(per_element.values()) / gpu.issue
    port = max(clocks, key=lambda name: clocks[name])
    return clocks[port] / (gpu.processors * gpu.clock), port
