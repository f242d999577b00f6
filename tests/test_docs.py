"""The documentation is true: its examples run, its numbers are the code's, its links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from gloo_workers import results_of
from torch import Tensor, nn

import lioncub
from lioncub import BySize, LionCub
from lioncub.collectives import HANDSHAKE_BYTES, Topology, bytes_sent, traffic
from lioncub.collectives.codes import VOTES
from lioncub.collectives.cost import RESULT_HEADER_BYTES
from lioncub.collectives.header import FAILED, FOUND_INF, STALE, UNVERIFIED, Header, encode_header, header_bytes
from lioncub.collectives.traffic import ALIGNMENT
from lioncub.kernels import packed_bytes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _blocks(page: str) -> list[str]:
    """The Python blocks of a page that are not included files."""
    found = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [code for code in found if not code.startswith("--8<--")]


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = [t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in t]
    missing = [t for t in targets if t and not (page.parent / t).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_every_example_is_included_in_a_page() -> None:
    included = [
        name for page in PAGES for name in re.findall(r"^--8<--\n(\S+)\n--8<--$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(included) == [f"examples/{path.name}" for path in EXAMPLES]


def test_the_reference_has_every_public_name() -> None:
    for module in (lioncub, lioncub.collectives, lioncub.kernels, lioncub.simulate):
        page = DOCS / "api" / f"{module.__name__.rpartition('.')[2]}.md"
        listed = [
            name.rpartition(".")[2] for name in re.findall(rf"^::: {module.__name__}\.(\S+)$", page.read_text(), re.M)
        ]
        # a module has a page of its own
        public = {name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)} - {
            "__version__"
        }
        assert sorted(listed) == sorted(public), page.name


def test_every_rule_that_the_code_names_exists() -> None:
    rules = re.findall(r"^(\d+)\. \*\*", (DOCS / "numerics.md").read_text(), re.MULTILINE)
    assert rules == [str(i) for i in range(1, 11)]
    named = set()
    for folder in ("kernels", "collectives", "lioncub"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"\brules? (\d+)", path.read_text()))
    assert named
    assert named <= set(rules)


def _under_torchrun(script: Path, folder: Path) -> str:
    """What two workers print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def by_default(*, large: tuple[int, ...], small: tuple[int, ...]) -> int:
    """Bytes that one of two workers sends in a step without averages of scales."""
    return sum(
        bytes_sent("all_gather", padded(sizes), 2, header_bytes(len(sizes)), codes=codes)
        for sizes, codes in ((large, VOTES), (small, BySize().small.codes))
    )


def padded(sizes: tuple[int, ...]) -> int:
    """Bytes of a message about parameters of these sizes, one bit per code."""
    return -(-sum(map(packed_bytes, sizes)) // ALIGNMENT) * ALIGNMENT


def test_the_readme_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code)
    printed = _under_torchrun(script, tmp_path)
    loss = re.search(r"^([\d.]+) Stats\(steps=100, skipped_steps=0, bytes_sent_per_step=(\d+)", printed, re.MULTILINE)
    assert loss, printed
    assert float(loss[1]) < 2.0, "it must have learnt something: chance is ln 10 = 2.3"
    assert int(loss[2]) == by_default(large=(8192, 1280), small=(128, 10))


def test_the_training_example_runs(tmp_path: Path) -> None:
    lines = re.findall(
        r"step (\d+): loss ([\d.]+), (\d+) bytes sent per step",
        _under_torchrun(DOCS / "examples" / "train.py", tmp_path),
    )
    assert [int(step) for step, *_ in lines] == [20, 40, 60, 80, 100]
    assert float(lines[-1][1]) < 0.7 * float(lines[0][1]), "it must have learnt something"
    assert {int(sent) for *_, sent in lines} == {by_default(large=(4096,), small=(256, 256, 1))}


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="needs torch 2.13")
def test_the_compiled_example_runs(tmp_path: Path) -> None:
    printed = _under_torchrun(DOCS / "examples" / "compiled.py", tmp_path)
    lines = re.findall(r"step (\d+): loss ([\d.]+), (\d+) bytes sent per step", printed)
    assert [int(step) for step, *_ in lines] == [20, 40, 60, 80, 100]
    assert float(lines[-1][1]) < 0.7 * float(lines[0][1]), "it must have learnt something"
    control = 8 * (3 + 5 + 2 + 1)
    assert {int(sent) for *_, sent in lines} == {sum(packed_bytes(n) for n in (1024, 64, 256, 4)) + control}


def run_the_pieces(rank: int, world_size: int, folder: str) -> list[str]:
    """Every block of the pages in order; before each, a step with the optimizer that the last one left behind."""
    os.chdir(folder)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))

    def loss_of(module: nn.Module) -> Tensor:
        return nn.functional.mse_loss(module(torch.randn(8, 16)), torch.ones(8, 1))

    names: dict[str, Any] = {
        "contextlib": contextlib,
        "torch": torch,
        "nn": nn,
        "dist": dist,
        "logging": logging,
        "lioncub": lioncub,
        "LionCub": LionCub,
        "model": model,
        "opt": LionCub(model.named_parameters(), lr=1e-3),
        "device": torch.device("cpu"),
        "rank": rank,
        "loss_of": loss_of,
    }
    torch.manual_seed(1 + rank)
    for block in [code for page in ("quickstart.md", "training.md", "compressing.md") for code in _blocks(page)]:
        opt = names["opt"]
        opt.zero_grad()
        names["loss"] = loss_of(names.get("ddp_model", model))
        names["loss"].backward()
        opt.step()
        exec(block, names)
        names["opt"].check_replicas()
    return sorted(path.name for path in Path(folder).glob("*.pt"))


def test_the_pieces_of_the_pages_run(tmp_path: Path) -> None:
    assert len(_blocks("quickstart.md")) == 4
    assert len(_blocks("training.md")) == 10
    assert len(_blocks("compressing.md")) == 1
    files = results_of(run_the_pieces, 2, str(tmp_path))
    assert all("checkpoint-0.pt" in names or "checkpoint-1.pt" in names for names in files)
    written = {path.name for path in tmp_path.glob("*.pt")}
    assert written == {"checkpoint-0.pt", "checkpoint-1.pt", "checkpoint.pt"}


def _worked_examples() -> list[tuple[str, int, int, str, str]]:
    """(algorithm, workers, message bytes, formula, bytes) of every row of the tables of byte counts."""
    rows = []
    text = (DOCS / "wire-format.md").read_text()
    for example in re.findall(r"^Example: .*?(?=^Which one|^Example: |\Z)", text, re.MULTILINE | re.DOTALL):
        workers, message = (int(re.search(p, example)[1]) for p in (r"(\d+) workers", r"B = (\d+)"))
        for name, formula, total in re.findall(r"^\| (.+?) \| ([\d *+()/]+) \| (\d+) \|$", example, re.MULTILINE):
            rows.append((name.replace("`", ""), workers, message, formula, total))
    return rows


@pytest.mark.parametrize(("name", "workers", "message", "formula", "total"), _worked_examples())
def test_worked_examples_of_byte_counts(name: str, workers: int, message: int, formula: str, total: str) -> None:
    assert eval(formula) == int(total)
    sizes = {144: (1000, 50), 1048576: (8388608,)}[message]
    assert message == padded(sizes)
    if name == "fp32 ring all-reduce":
        assert int(total) == 2 * (workers - 1) * sum(sizes) * 4 / workers
    elif name.startswith("hierarchical"):
        level = {"inside": "intra", "between": "inter"}[name.split()[-1]]
        levels = traffic("hierarchical", message, Topology.even(2, workers // 2), header_bytes(len(sizes)))
        assert int(total) == levels[level]
    else:
        assert int(total) == bytes_sent(name, message, workers, header_bytes(len(sizes)))


def test_there_are_two_worked_examples() -> None:
    assert len(_worked_examples()) == 10


def test_the_header_is_laid_out_as_documented() -> None:
    header = Header(2, 3, 4, 5, FOUND_INF + FAILED, (True,) + (False,) * 64 + (True,))
    raw = encode_header(header, torch.device("cpu")).numpy().tobytes()
    table = re.findall(r"^\| (\d+) \| 8 \| (.+) \|$", (DOCS / "wire-format.md").read_text(), re.MULTILINE)
    words = {int(offset): int.from_bytes(raw[int(offset) :][:8], "little") for offset, _ in table[:6]}
    assert words == {0: 2, 8: 2, 16: 3, 24: 4, 32: 5, 40: 3}
    assert int.from_bytes(raw[48:], "little") == 1 + (1 << 65)
    assert len(raw) == header_bytes(66) == 48 + 8 * 2
    assert len(table[6:]) * 8 == RESULT_HEADER_BYTES == 32
    assert HANDSHAKE_BYTES == 16
    assert (FOUND_INF, FAILED, UNVERIFIED, STALE) == (1, 2, 4, 8)
