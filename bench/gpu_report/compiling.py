"""Compiles the kernels of a call, as they are launched, for a GPU that need not be there."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from speed import ops
from speed.cases import CASES, Case, packed
from speed.data import DTYPES, PACKED, Data
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from gpu_report.code import Code, read_amdgcn, read_sass
from lioncub.kernels import triton_gpu

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# dtypes of parameters with gradients, and of the momentum
KINDS = {name: (dtype, dtype) for name, dtype in DTYPES.items()}
KINDS |= {"mixed": (torch.bfloat16, torch.float32), PACKED: (torch.float32, torch.float32)}
# whole tiles, at aligned addresses
_N = 2**16
_WIDEST = 128
_HALF_LEVELS = {"bits": 16, "step": 1, "offset": 3000, "divisor": 1000}
# flags and widths that the benchmarks do not time
_FURTHER = (
    Case(ops.lion_apply_, "16_bits", _HALF_LEVELS),
    Case(ops.quantize, "linf", {"norm": "linf", "scaled": False}),
    Case(ops.quantize, "blocks", {"block": 64, "scaled": False}),
    packed(ops.add_codes, "in_16_bits", bits=1, field_bits=16),
    *(packed(ops.spread_codes, f"in_{bits}_bits", field_bits=bits) for bits in (2, 8, 16)),
    *(packed(ops.majority_of_fields, f"of_{bits}_bits", field_bits=bits) for bits in (2, 8, 16)),
    packed(ops.ternary_of_fields, "of_16_bits", field_bits=16),
)
REPORTED = {case.name: case for case in (*CASES, *_FURTHER) if "triton" in case.impls}


class Launch(NamedTuple):
    """A kernel with its arguments, its compiled code and the number of all threads."""

    kernel: Any
    arguments: tuple[Any, ...]
    compiled: Any
    threads: int


class _Driver:
    """The part of a GPU's driver that Triton needs to compile; each target is another device."""

    def __init__(self, name: str) -> None:
        self._target, self._device = TARGETS[name], list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        """Return what to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """Return a number: what is compiled is cached by it."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0


@contextmanager
def compiling_for(name: str) -> Iterator[list[Launch]]:
    """Compile for a target instead of launching; gives the launches so far. Tensors may be on the CPU."""
    launches: list[Launch] = []
    target, original = TARGETS[name], JITFunction.run

    def run(kernel: Any, *arguments: Any, grid: tuple[int], warmup: bool = False, **options: Any) -> Any:
        # for tensors on the CPU, launchers count in warps of 32 threads
        threads = 32 * options.pop("num_warps")
        options["num_warps"] = threads // target.warp_size
        compiled = original(kernel, *arguments, grid=grid, warmup=True, **options)
        launches.append(Launch(kernel, arguments, compiled, threads * grid[0]))
        return compiled

    triton.runtime.driver.set_active(_Driver(name))
    with patch.object(triton_gpu, "INTERPRETED", True), patch.object(JITFunction, "run", run):
        yield launches


def kinds_of(case: Case) -> list[str]:
    """Return the kinds of data that a case is compiled for; "mixed" where momentum can have another dtype."""
    own = list(case.dtypes)
    return [*own, "mixed"] if "bf16" in own and case.op.removeprefix("foreach_").startswith("lion_") else own


def launches_of(case: Case, kind: str, target: str) -> tuple[list[Launch], Sequence[Tensor], Sequence[Tensor]]:
    """Compile a case; gives its launches in order, and the tensors that it reads and writes."""
    dtype, momentum_dtype = KINDS[kind]
    call = case.make(Data(_N, dtype, momentum_dtype=momentum_dtype), "triton")
    with compiling_for(target) as launches:
        call.run()
    return launches, call.reads, call.writes


def widest_share(tensors: Sequence[Tensor], threads: int) -> int:
    """Return the bits of the widest access that a thread's share of a row of some tensor allows, 0 for no tensors."""
    shares = (8 * tensor.shape[-1] * tensor.element_size() // threads for tensor in tensors)
    return max((min(max(share, 8), _WIDEST) for share in shares), default=0)


def read_code(compiled: Any) -> Code:
    """Read the machine code of a compiled kernel."""
    if "cubin" in compiled.asm:
        return read_sass(_disassemble(compiled.asm["cubin"]), compiled.asm["ptx"])
    return read_amdgcn(compiled.asm["amdgcn"])


def _disassemble(cubin: bytes) -> str:
    """Return SASS and resources of a cubin, by the tool in triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
