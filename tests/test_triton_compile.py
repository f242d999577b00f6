"""All kernels compile for all GPUs, and only structure compiles one anew: no hyperparameter, step or number of workers.

The compiled code is tested in test_gpu_report.py. Interpreted functions cannot be compiled, so this file is also a
script: it runs itself in a process without TRITON_INTERPRET, and prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_report.compiling import SIZES, TARGETS, build, type_of
from gpu_report.variants import all_variants

SPECIALIZED = ("encode", "apply", "step", "vote", "quantize", "count", "sum counts", "vote on 4-bit fields")
SPECIALIZED += ("scale of tiles", "apply 2-bit codes", "add 2-bit codes in 4", "signs of 4-bit fields")

# every kernel for every GPU; further dtypes of what has any, for one of each vendor. `make triton-versions` compiles
# all of them for all, and with other versions
COMPILED = {dtype: tuple(TARGETS) for dtype in ("fp32", "codes")}
COMPILED |= {"bf16": ("sm_100", "gfx950"), "fp16": ("sm_80", "gfx942"), "mixed": ("sm_90", "gfx950")}


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_compile(target: str) -> None:
    dtypes = [dtype for dtype, targets in COMPILED.items() if target in targets]
    outcomes = found_by_script(target, *dtypes)
    assert set(outcomes) == {f"{v.label}, {v.dtype}" for v in all_variants() if v.dtype in dtypes}
    assert set(outcomes.values()) == {"compiled"}, outcomes


def found_by_script(*arguments: str) -> Any:
    """What this file prints as a script, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compile_all(target: str, dtypes: Sequence[str]) -> dict[str, str]:
    """By kernel, "compiled" or the error."""
    outcomes = {}
    for variant in all_variants():
        if variant.dtype in dtypes:
            try:
                build(variant, TARGETS[target])
                outcome = "compiled"
            except Exception as error:
                outcome = repr(error)
            outcomes[f"{variant.label}, {variant.dtype}"] = outcome
    return outcomes


def test_hyperparameters_never_recompile() -> None:
    keys = found_by_script()
    assert set(keys) == set(SPECIALIZED)
    for label, (one, other) in keys.items():
        assert one == other, label


def compare_specializations() -> dict[str, Any]:
    """Per kernel, what triton would compile for each of two sets of run-time values and places of flags."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from lioncub.kernels.triton_gpu.launch import FLAGS

    backend = make_backend(GPUTarget("cuda", 90, 32))
    tensor = torch.zeros(64)
    variants = {variant.label: variant for variant in all_variants() if variant.dtype in ("fp32", "codes")}
    keys: dict[str, list[list[str]]] = {}
    for label in SPECIALIZED:
        variant = variants[label]
        specialize = create_function_from_signature(variant.kernel.signature, variant.kernel.params, backend)
        keys[label] = []
        # 0, 1 and multiples of 16 are what triton would specialize integers for
        for number, rate, flags in ((16, 0.1, tensor), (1, 1.0, tensor[1:])):
            structure = dict.fromkeys(SIZES, 64) | dict(variant.constants)
            arguments = []
            for name in variant.kernel.arg_names:
                value = rate if type_of(name, variant) == "fp32" else structure.get(name, number)
                pointer = flags if name in FLAGS else tensor
                arguments.append(pointer if name.endswith("_ptr") else value)
            keys[label].append([str(part) for part in specialize(*arguments)[1]])
    return keys


if __name__ == "__main__":
    found = compile_all(sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else compare_specializations()
    json.dump(found, sys.stdout)
