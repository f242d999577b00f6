"""What holds the house together: one-way imports, a reference that needs torch alone, a wheel of one package."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"kernels": 0, "collectives": 1, "lioncub": 2}


def _layer_of(module: str) -> int | None:
    parts = module.split(".")
    if parts[0] != "lioncub":
        return None
    return LAYERS[parts[1]] if len(parts) > 1 and parts[1] in LAYERS else LAYERS["lioncub"]


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(str(node.module))
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_import_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for module in _imports(path):
            assert module.split(".")[0] not in ("kernels", "collectives"), f"{path} imports the bare folder {module}"
            layer = _layer_of(module)
            assert layer is None or layer <= LAYERS[folder], f"{path} imports {module}, a layer above its own"


def test_backends_do_not_import_one_another() -> None:
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        own = path.parent.name
        for module in _imports(path):
            for backend, package in (("numba_cpu", "numba"), ("triton_gpu", "triton")):
                if own != backend:
                    assert backend not in module, f"{path} imports {module}"
                    assert module.split(".")[0] != package, f"{path} imports {module}"


@pytest.mark.parametrize("folder", LAYERS)
def test_docstrings_of_functions_begin_with_a_verb_or_a_formula(folder: str) -> None:
    nouns = {"The", "A", "An", "All", "Bytes", "Every", "Everyone", "How", "Its", "This", "What", "Where", "Who"}
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not any("property" in ast.dump(d) for d in node.decorator_list):
                words = (ast.get_docstring(node) or "").split()
                found += [f"{path}: {node.name}: {' '.join(words[:6])}"] if words and words[0] in nouns else []
    assert found == []


def test_all_grids_have_one_dimension() -> None:
    # only the first may have more than 65,535 programs
    sources = {path.name: path.read_text() for path in (ROOT / "kernels" / "triton_gpu").glob("*.py")}
    assert sources
    assert [name for name, text in sources.items() if "program_id(1)" in text or "program_id(2)" in text] == []


def test_only_integrations_import_stacks_and_nothing_imports_them() -> None:
    stacks = {"accelerate", "lightning", "pytorch_lightning", "torchft", "transformers"}
    for folder in LAYERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            modules = _imports(path)
            if path.parent.name != "integrations":
                assert not stacks & {module.split(".")[0] for module in modules}, path
                assert not [module for module in modules if module.startswith("lioncub.integrations")], path


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)


def test_the_reference_runs_where_triton_and_numba_are_blocked() -> None:
    done = _python(
        "import sys, warnings\n"
        "sys.modules['triton'] = sys.modules['numba'] = None\n"
        "import torch\n"
        "from lioncub import LionCub, kernels\n"
        "p = torch.zeros(70).requires_grad_(); p.grad = torch.ones(70)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    opt = LionCub([p], lr=0.5); opt.step(); opt.step()\n"
        "    kernels.quantize(torch.ones(9)); kernels.majority_vote(torch.zeros(3, 8, dtype=torch.uint8))\n"
        "assert p.tolist() == [-1.0] * 70\n"
        "ours = [str(w.message) for w in caught if 'lioncub' in str(w.message)]\n"
        "assert len(ours) == 1 and 'lioncub[cpu]' in ours[0], ours\n"
        "for impl in ('cpu', 'triton'):\n"
        "    try: kernels.pack_signs(torch.ones(9), impl=impl)\n"
        "    except ImportError as error: print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "impl: 'cpu' needs numba" in done.stdout
    assert "impl: 'triton' needs triton" in done.stdout


def test_importing_lioncub_imports_no_backend() -> None:
    done = _python(
        "import sys, lioncub, lioncub.kernels.reference\n"
        "import torch; lioncub.kernels.pack_signs(torch.ones(9), impl='reference')\n"
        "names = ('numba', 'torchft', 'lioncub.kernels.numba_cpu', 'lioncub.kernels.triton_gpu')\n"
        "print([m for m in names if m in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_triton_on_cpu_tensors_needs_the_interpreter() -> None:
    done = _python(
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        "import torch; from lioncub import kernels\n"
        "kernels.pack_signs(torch.ones(9), impl='triton')"
    )
    assert done.returncode != 0
    assert "ValueError: impl: 'triton' expected CUDA or HIP tensors" in done.stderr


def test_the_wheel_contains_only_lioncub(tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            str(tmp_path),
            str(ROOT),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lioncub"}
    packed = {name for name in names if name.endswith(".py")}
    for folder in LAYERS:
        prefix = "lioncub" if folder == "lioncub" else f"lioncub/{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(ROOT / folder).as_posix()}" in packed
    assert "lioncub/py.typed" in names
