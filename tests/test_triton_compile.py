"""What makes Triton compile a kernel anew: structure, and no hyperparameter, step or number of workers.

What kernels are compiled to is tested in test_gpu_report.py. Interpreted functions cannot be compiled, so this file is
also a script: it runs itself in a process without TRITON_INTERPRET, and prints what it finds as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_report.compiling import SIZES, type_of
from gpu_report.variants import all_variants

SPECIALIZED = ("encode", "apply", "step", "vote", "quantize", "count", "sum counts", "vote on 4-bit fields")
SPECIALIZED += ("unpack 4-bit fields", "apply 2-bit codes", "add 2-bit codes in 4", "signs of 4-bit fields")


def test_hyperparameters_never_recompile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    keys = json.loads(done.stdout)
    assert set(keys) == set(SPECIALIZED)
    for label, (one, other) in keys.items():
        assert one == other, label


def compare_specializations() -> dict[str, Any]:
    """Per kernel, what triton would compile for each of two sets of run-time values."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    tensor = torch.zeros(64)
    variants = {variant.label: variant for variant in all_variants() if variant.dtype in ("fp32", "codes")}
    keys: dict[str, list[list[str]]] = {}
    for label in SPECIALIZED:
        variant = variants[label]
        specialize = create_function_from_signature(variant.kernel.signature, variant.kernel.params, backend)
        keys[label] = []
        # 0, 1 and multiples of 16 are what triton would specialize integers for
        for number, rate in ((16, 0.1), (1, 1.0)):
            structure = dict.fromkeys(SIZES, 64) | dict(variant.constants)
            arguments = []
            for name in variant.kernel.arg_names:
                value = rate if type_of(name, variant) == "fp32" else structure.get(name, number)
                arguments.append(tensor if name.endswith("_ptr") else value)
            keys[label].append([str(part) for part in specialize(*arguments)[1]])
    return keys


if __name__ == "__main__":
    json.dump(compare_specializations(), sys.stdout)
