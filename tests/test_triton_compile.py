"""What the Triton kernels compile to, read from the machine code without a GPU."""

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

# compiles each kernel named on the command line for one target; interpreted functions cannot be compiled, so this
# runs in a process of its own
_COMPILER = """
import json, os, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lioncub.kernels.triton_gpu import lion, packing, quantization, scales, vote

FLAGS = {"HAS_STATUS": True, "HAS_COUNTS": False, "IS_UPDATE": True, "STOCHASTIC": True, "BITS": 2, "SCALE_BLOCK": 0}
FLAGS |= {"NORM": "l1", "TILES": 16, "PLANES": 4}
FIXED = {"status_ptr": "i32", "packed_ptr": "u8", "scale_ptr": "fp32", "partial_ptr": "fp64", "counts_ptr": "i64"}
FLOATS = ("beta", "lr", "decay", "gain")


def compile_kernel(kernel, target, pointers, flags, threads):
    types = FIXED | pointers
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], constants[(i,)] = "constexpr", flags[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + types[name]
        else:
            signature[name] = "fp32" if name.startswith(FLOATS) else "i32"
        if name.endswith("_ptr") or name in ("n_elements", "n_words", "row_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def disassemble(compiled):
    if "amdgcn" in compiled.asm:
        return compiled.asm["amdgcn"]
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        options = ["-sass", "-res-usage"]
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


backend, arch, dtype = sys.argv[1:]
target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
data = {name: dtype for name in ("exp_avg_ptr", "grad_ptr", "param_ptr", "x_ptr")}
packs, writes, words = data | {"out_ptr": "u8"}, data | {"out_ptr": dtype}, {"packed_ptr": "i32", "out_ptr": "i32"}
wide = 256 if dtype == "fp32" else 128
tile, advancing = FLAGS | {"BLOCK_SIZE": 1024}, FLAGS | {"BLOCK_SIZE": 1024, "ADVANCE": True}
reading = advancing | {"ADVANCE": False}
jobs = {
    "encode": (lion._encode_update_kernel, packs, reading, 128),
    "encode_": (lion._encode_update_kernel, packs, advancing, 128),
    "apply": (lion._apply_votes_kernel, packs, reading, wide),
    "apply with momentum": (lion._apply_votes_kernel, packs, advancing, wide),
    "step": (lion._step_lion_kernel, packs, tile, wide),
    "pack": (packing._pack_signs_kernel, packs, tile, 128),
    "unpack": (packing._unpack_signs_kernel, writes, tile, wide),
    "quantize": (quantization._quantize_values_kernel, packs, tile, 128),
}
if dtype == "fp32":
    jobs |= {
        "dequantize": (quantization._dequantize_codes_kernel, writes, tile, 128),
        "vote": (vote._vote_majority_kernel, words, FLAGS | {"BLOCK_SIZE": 512}, 128),
        "scale of blocks": (scales._scale_blocks_kernel, packs, tile | {"SCALE_BLOCK": 64}, 128),
        "scale of chunks": (scales._reduce_chunks_kernel, packs, tile, 128),
        "scale from chunks": (scales._combine_chunks_kernel, packs, tile, 128),
    }
found = {}
for label, (kernel, pointers, flags, threads) in jobs.items():
    compiled = compile_kernel(kernel, target, pointers, flags, threads)
    ptx = compiled.asm.get("ptx", "")
    found[label] = {"shared": compiled.metadata.shared, "code": disassemble(compiled), "ptx": ptx}
json.dump(found, sys.stdout)
"""

TARGETS = [("cuda", "90"), ("hip", "gfx942")]
# these exchange values between threads: sums over a tile, or codes loaded by other threads than store them
SHARING = {"scale of blocks", "scale of chunks", "scale from chunks", "dequantize"}


@cache
def compiled(backend: str, arch: str, dtype: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", _COMPILER, backend, arch, dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("backend", "arch"), TARGETS)
class TestMachineCode:
    def test_no_register_spills(self, backend: str, arch: str, dtype: str) -> None:
        absent = ("STL", "LDL") if backend == "cuda" else ("scratch_store", "scratch_load")
        for label, kernel in compiled(backend, arch, dtype).items():
            assert not any(f"{name}" in kernel["code"] for name in absent), label

    def test_no_shared_memory_where_rows_stay_in_threads(self, backend: str, arch: str, dtype: str) -> None:
        shared = {label: kernel["shared"] for label, kernel in compiled(backend, arch, dtype).items()}
        assert {label for label, size in shared.items() if size} <= SHARING

    def test_loads_and_stores_128_bits(self, backend: str, arch: str, dtype: str) -> None:
        load, store = ("LDG.E.128", "STG.E.128") if backend == "cuda" else ("load_dwordx4", "store_dwordx4")
        kernels = compiled(backend, arch, dtype)
        for label in ("encode", "encode_", "apply", "apply with momentum", "step", "pack", "quantize"):
            assert load in kernels[label]["code"], label
        for label in ("encode_", "apply", "apply with momentum", "step", "unpack"):
            assert store in kernels[label]["code"], label

    def test_no_fused_multiply_add_nor_flush_to_zero(self, backend: str, arch: str, dtype: str) -> None:
        fused = ("FFMA",) if backend == "cuda" else ("v_fma_f32", "v_fmac_f32", "v_mad_f32", "v_pk_fma_f32")
        kernels = compiled(backend, arch, dtype)
        for label in ("encode", "encode_", "apply", "apply with momentum", "step"):
            assert not any(name in kernels[label]["code"] for name in fused), label
        assert not any(".ftz" in kernel["ptx"] for kernel in kernels.values())
