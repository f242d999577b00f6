"""All kernels compile for all GPUs as claimed, and no hyperparameter, step or number of workers compiles one anew.

Interpreted functions cannot be compiled, so this file is also a script: it runs itself in a process without
TRITON_INTERPRET, and prints what it finds as JSON. `make gpu-report` compiles every dtype for every GPU.
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

from gpu_report.compiling import REPORTED, TARGETS, kinds_of, launches_of
from gpu_report.report import broken_claims

BENCH = Path(__file__).parents[1] / "bench"
# every kernel for every GPU; further dtypes of what has any are for the report
COMPILED = {dtype: tuple(TARGETS) for dtype in ("fp32", "packed")}
# of tensors, and therefore constant in a training run
SIZES = ("n_elements", "n_words", "n_bytes", "n_packed", "row_stride", "elements_per_scale", "most_scales")


@pytest.mark.parametrize("target", TARGETS)
def test_all_kernels_compile_as_claimed(target: str) -> None:
    kinds = [kind for kind, targets in COMPILED.items() if target in targets]
    findings = found_by(str(BENCH / "gpu_report"), "--json", "--targets", target, "--kinds", *kinds)
    assert {claim: broken for claim, broken in broken_claims(findings).items() if broken} == {}
    assert len(findings) > 25, "of several cases that launch the same code only the first is listed"


def found_by(*arguments: str) -> Any:
    """What a script prints as JSON, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_hyperparameters_never_recompile() -> None:
    keys = found_by(__file__)
    assert len(keys) >= 15
    for kernel, (one, other) in keys.items():
        assert one == other, kernel


def compare_specializations() -> dict[str, list[list[str]]]:
    """Per kernel, what triton would compile for each of two sets of run-time values and places of flags."""
    from unittest.mock import patch

    import torch
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from lioncub.kernels.triton_gpu.launch import FLAGS

    backend, tensor = make_backend(TARGETS["sm_90"]), torch.zeros(64)
    keys: dict[str, list[list[str]]] = {}

    def specialize(kernel: Any, *arguments: Any, **options: Any) -> Any:
        key = create_function_from_signature(kernel.signature, kernel.params, backend)
        keys[kernel.__name__] = []
        # 0, 1 and multiples of 16 are what triton would specialize integers for
        for number, rate, flags in ((16, 0.1, tensor), (1, 1.0, tensor[1:])):
            values = []
            for name, value in zip(kernel.arg_names, arguments, strict=True):
                if name in FLAGS:
                    value = flags
                elif isinstance(value, float):
                    value = rate
                elif isinstance(value, int) and not name.isupper() and name not in SIZES:
                    value = number
                values.append(value)
            keys[kernel.__name__].append([str(part) for part in key(*values)[1]])
        return None

    for case in REPORTED.values():
        for kind in set(kinds_of(case)) & {"fp32", "packed"}:
            with patch.object(JITFunction, "run", specialize):
                launches_of(case, kind, "sm_90")
    return keys


if __name__ == "__main__":
    json.dump(compare_specializations(), sys.stdout)
