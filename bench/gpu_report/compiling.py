"""Compiles a variant for a GPU that need not be there, and reads the machine code."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report.code import Code, read_amdgcn, read_sass
from gpu_report.variants import Variant

# multiples of 16 in a launch of whole tiles
SIZES = ("n_elements", "n_words", "n_bytes", "n_packed", "row_stride")
# other run-time numbers that are not integers
FLOATS = ("beta", "lr", "rate", "decay", "gain")


@dataclass(frozen=True)
class Target:
    """What to compile for: "cuda" with 80, 90 or 100, or "hip" with an architecture's name."""

    backend: str
    arch: str

    @property
    def name(self) -> str:
        """Return its name in the report, such as "sm_90" or "gfx942"."""
        return f"sm_{self.arch}" if self.backend == "cuda" else self.arch

    @property
    def warp_size(self) -> int:
        """Return the number of threads that execute an instruction together."""
        return 32 if self.backend == "cuda" else 64


TARGETS = {
    target.name: target
    for target in (
        *(Target("cuda", arch) for arch in ("80", "90", "100")),
        Target("hip", "gfx942"),
        Target("hip", "gfx950"),
    )
}


def compile_variant(variant: Variant, target: Target) -> Code:
    """Compile a variant and read its code."""
    compiled = build(variant, target)
    if target.backend == "cuda":
        return read_sass(disassemble(compiled.asm["cubin"]), compiled.asm["ptx"])
    return read_amdgcn(compiled.asm["amdgcn"])


def build(variant: Variant, target: Target) -> Any:
    """Compile for data at aligned addresses and whole tiles, as the launchers ask for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = type_of(name, variant)
        if name.endswith("_ptr") or name in SIZES:
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {name: variant.constants[name] for name in kernel.arg_names if name.isupper()}
    gpu = GPUTarget(target.backend, int(target.arch) if target.backend == "cuda" else target.arch, target.warp_size)
    options = {"num_warps": variant.threads // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)


def type_of(name: str, variant: Variant) -> str:
    """Return triton's name of the type of a kernel's argument."""
    if name.isupper():
        return "constexpr"
    if name.endswith("_ptr"):
        return "*" + variant.pointers[name]
    return "fp32" if name.startswith(FLOATS) else "i32"


def disassemble(cubin: bytes) -> str:
    """Return SASS and resources of a cubin, by the tool in triton's wheel."""
    import triton

    tool: Any = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
