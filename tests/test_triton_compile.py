"""What the Triton kernels compile to, read from the machine code without a GPU, and what compiles them anew.

Interpreted functions cannot be compiled, so this file is also a script: it runs itself in a process without
TRITON_INTERPRET, and prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

Job = tuple[Any, dict[str, str], dict[str, object], int]

TARGETS = [("cuda", "90"), ("hip", "gfx942")]
ENCODERS = ("encode", "encode_", "pack", "quantize")
UPDATES = ("apply", "apply with momentum", "step", "apply 2-bit codes", "apply 16-bit codes")
UPDATES += ("apply 2-bit codes with momentum",)
# what is voted on, counted and spread has no float, so it is compiled once, with the fp32 kernels
WIDE_LOADS = ("vote", "count", "sum counts", *[f"vote on {bits}-bit fields" for bits in (2, 4, 8, 16)])
WIDE_LOADS += ("add 4-bit codes in 4",)
WIDE_STORES = ("vote", "count", "sum counts", "spread 1 to 2", "spread 1 to 4", "spread 1 to 8", "spread 4 to 8")
WIDE_STORES += tuple(f"unpack {bits}-bit fields" for bits in (1, 2, 4, 8, 16))
WIDE_STORES += ("add 1-bit codes in 16", "add 2-bit codes in 4", "add 4-bit codes in 4", "add 8-bit codes in 16")
SPECIALIZED = ("encode", "apply", "step", "vote", "quantize", "count", "sum counts", "vote on 4-bit fields")
SPECIALIZED += ("unpack 4-bit fields", "apply 2-bit codes", "add 2-bit codes in 4", "signs of 4-bit fields")
# multiples of 16 in a launch of whole tiles
SIZES = ("n_elements", "n_words", "n_bytes", "n_packed", "row_stride", "group_stride", "plane_stride")
# these exchange values between threads: sums over a tile, or codes that other threads load than store
SHARING = {"scale of blocks", "scale of chunks", "scale from chunks", "dequantize", "add 1-bit codes in 16"}
SHARING |= {"signs of 4-bit fields"}


@cache
def report(*arguments: str) -> dict[str, Any]:
    """What this file, run as a script with ``arguments``, prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("backend", "arch"), TARGETS)
class TestMachineCode:
    def test_no_register_spills(self, backend: str, arch: str, dtype: str) -> None:
        spills = ("STL", "LDL") if backend == "cuda" else ("scratch_store", "scratch_load")
        for label, kernel in report(backend, arch, dtype).items():
            assert not any(spill in kernel["code"] for spill in spills), label

    def test_no_shared_memory_where_rows_stay_in_threads(self, backend: str, arch: str, dtype: str) -> None:
        shared = {label for label, kernel in report(backend, arch, dtype).items() if kernel["shared"]}
        assert shared <= SHARING

    def test_loads_and_stores_128_bits(self, backend: str, arch: str, dtype: str) -> None:
        load, store = ("LDG.E.128", "STG.E.128") if backend == "cuda" else ("load_dwordx4", "store_dwordx4")
        kernels = report(backend, arch, dtype)
        assert [label for label in (*ENCODERS, *UPDATES) if load not in kernels[label]["code"]] == []
        assert [label for label in ("encode_", "unpack", *UPDATES) if store not in kernels[label]["code"]] == []
        if dtype == "fp32":
            assert [label for label in WIDE_LOADS if load not in kernels[label]["code"]] == []
            assert [label for label in WIDE_STORES if store not in kernels[label]["code"]] == []

    def test_no_fused_multiply_add_nor_flush_to_zero(self, backend: str, arch: str, dtype: str) -> None:
        fused = ("FFMA",) if backend == "cuda" else ("v_fma_f32", "v_fmac_f32", "v_mad_f32", "v_pk_fma_f32")
        kernels = report(backend, arch, dtype)
        for label in ("encode", "encode_", *UPDATES):
            assert not any(name in kernels[label]["code"] for name in fused), label
        assert [label for label, kernel in kernels.items() if ".ftz" in kernel["ptx"]] == []


def test_hyperparameters_never_recompile() -> None:
    keys = report("specializations")
    assert set(keys) == set(SPECIALIZED)
    for label, (one, other) in keys.items():
        assert one == other, label


def compile_kernels(backend: str, arch: str, dtype: str) -> dict[str, Any]:
    """Machine code and shared bytes of every kernel for a target, with data of ``dtype`` at aligned addresses."""
    from triton.backends.compiler import GPUTarget

    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    found = {}
    for label, job in _jobs(dtype).items():
        compiled = _compile(target, *job)
        ptx = compiled.asm.get("ptx", "")
        found[label] = {"shared": compiled.metadata.shared, "code": _disassemble(compiled), "ptx": ptx}
    return found


def compare_specializations() -> dict[str, Any]:
    """Per kernel, what triton would compile for each of two sets of run-time values."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    tensor = torch.zeros(64)
    jobs = _jobs("fp32")
    keys: dict[str, list[list[str]]] = {}
    for label in SPECIALIZED:
        kernel, _, flags, _ = jobs[label]
        specialize = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys[label] = []
        # 0, 1 and multiples of 16 are what triton would specialize integers for
        for number, rate in ((16, 0.1), (1, 1.0)):
            arguments = []
            for name in kernel.arg_names:
                structure = dict.fromkeys(SIZES, 64) | flags
                value = rate if _is_float(name) else structure.get(name, number)
                arguments.append(tensor if name.endswith("_ptr") else value)
            keys[label].append([str(part) for part in specialize(*arguments)[1]])
    return keys


def _jobs(dtype: str) -> dict[str, Job]:
    """(kernel, pointer types, constants, threads) of every kernel, by label."""
    from lioncub.kernels.triton_gpu import codes as coded
    from lioncub.kernels.triton_gpu import lion, packing, quantization, scales

    data = dict.fromkeys(("exp_avg_ptr", "grad_ptr", "param_ptr", "x_ptr"), dtype)
    data |= {"status_ptr": "i32", "packed_ptr": "u8", "scale_ptr": "fp32", "partial_ptr": "fp64"}
    codes, floats = data | {"out_ptr": "u8"}, data | {"out_ptr": dtype}
    flags: dict[str, object] = {"BLOCK_SIZE": 1024, "HAS_STATUS": True, "ADVANCE": False, "IS_UPDATE": True}
    flags |= {"STOCHASTIC": True, "BITS": 2, "SCALE_BLOCK": 0, "NORM": "l1", "TILES": 16}
    advance = flags | {"ADVANCE": True}
    wide = 256 if dtype == "fp32" else 128
    jobs: dict[str, Job] = {
        "encode": (lion._encode_update_kernel, codes, flags, 128),
        "encode_": (lion._encode_update_kernel, codes, advance, 128),
        "apply": (lion._apply_votes_kernel, codes, flags, wide),
        "apply with momentum": (lion._apply_votes_kernel, codes, advance, wide),
        "step": (lion._step_lion_kernel, codes, flags, wide),
        "pack": (packing._pack_signs_kernel, codes, flags, 128),
        "unpack": (packing._unpack_signs_kernel, floats, flags, wide),
        "quantize": (quantization._quantize_values_kernel, codes, flags, 128),
    }
    for bits in (2, 16):
        jobs[f"apply {bits}-bit codes"] = (coded._apply_codes_kernel, codes, flags | {"BITS": bits}, wide)
    jobs["apply 2-bit codes with momentum"] = (coded._apply_codes_kernel, codes, advance, wide)
    if dtype == "fp32":
        jobs |= {
            "dequantize": (quantization._dequantize_codes_kernel, floats, flags, 128),
            **_vote_jobs(),
            **_sum_jobs(),
            "scale of blocks": (scales._scale_blocks_kernel, codes, flags | {"SCALE_BLOCK": 64}, 128),
            "scale of chunks": (scales._reduce_chunks_kernel, codes, flags, 128),
            "scale from chunks": (scales._combine_chunks_kernel, codes, flags, 128),
        }
    return jobs


def _vote_jobs() -> dict[str, Job]:
    from lioncub.kernels.triton_gpu import counts, fields, vote

    words = dict.fromkeys(("packed_ptr", "planes_ptr", "fields_ptr", "out_ptr"), "i32") | {"counts_ptr": "i64"}
    flags: dict[str, object] = {"PLANES": 4, "GROUP_PLANES": 3, "HAS_COUNTS": False, "BLOCK_SIZE": 512}
    jobs: dict[str, Job] = {
        "vote": (vote._vote_majority_kernel, words, flags, 128),
        "count": (counts._count_votes_kernel, words, flags, 128),
        "sum counts": (counts._sum_counts_kernel, words, flags, 128),
    }
    spreading, unpacking, voting = words | {"packed_ptr": "u8"}, words | {"fields_ptr": "u8"}, words | {"out_ptr": "u8"}
    flags = flags | {"BLOCK_SIZE": 128}
    for bits, field_bits in ((1, 2), (1, 4), (1, 8), (1, 16), (4, 8)):
        widths = flags | {"BITS": bits, "FIELD_BITS": field_bits}
        jobs[f"spread {bits} to {field_bits}"] = (fields._spread_codes_kernel, spreading, widths, 128)
    for bits in (1, 2, 4, 8, 16):
        widths = flags | {"FIELD_BITS": bits}
        jobs[f"unpack {bits}-bit fields"] = (fields._unpack_fields_kernel, unpacking, widths, 128)
        jobs[f"vote on {bits}-bit fields"] = (fields._vote_fields_kernel, voting, widths, 128)
    return jobs


def _sum_jobs() -> dict[str, Job]:
    from lioncub.kernels.triton_gpu import sums

    signs = {"fields_ptr": "u8", "out_ptr": "u8", "counts_ptr": "i64"}
    flags: dict[str, object] = {"HAS_COUNTS": False, "BLOCK_SIZE": 128}
    jobs: dict[str, Job] = {}
    for bits, field_bits in ((1, 16), (2, 4), (4, 4), (8, 16)):
        words = {"packed_ptr": "i32" if bits == field_bits else "u8", "out_ptr": "i32"}
        widths = flags | {"BITS": bits, "FIELD_BITS": field_bits}
        jobs[f"add {bits}-bit codes in {field_bits}"] = (sums._add_codes_kernel, words, widths, 128)
    for bits in (4, 16):
        widths = flags | {"FIELD_BITS": bits, "BLOCK_SIZE": 1024}
        jobs[f"signs of {bits}-bit fields"] = (sums._sign_fields_kernel, signs, widths, 128)
    return jobs


def _compile(target: Any, kernel: Any, pointers: dict[str, str], flags: dict[str, object], threads: int) -> Any:
    import triton
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    attributes = {}
    for i, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers[name]
        else:
            signature[name] = "fp32" if _is_float(name) else "i32"
        if name.endswith("_ptr") or name in SIZES:
            attributes[(i,)] = [["tt.divisibility", 16]]
    constants = {name: flags[name] for name in kernel.arg_names if name.isupper()}
    options = {"num_warps": threads // target.warp_size, "enable_fp_fusion": False}
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


def _is_float(name: str) -> bool:
    return name.startswith(("beta", "lr", "rate", "decay", "gain"))


def _disassemble(compiled: Any) -> str:
    import triton

    if "amdgcn" in compiled.asm:
        return str(compiled.asm["amdgcn"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    wanted = sys.argv[1:]
    json.dump(compare_specializations() if wanted == ["specializations"] else compile_kernels(*wanted), sys.stdout)
