"""The documentation is true: its examples run, its numbers are the code's, its links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import struct
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from gloo_workers import results_of
from programs import printed_by
from torch import Tensor, nn

import lioncub
from lioncub import BySize, LionCub
from lioncub.arguments import Hyperparameters
from lioncub.collectives import HANDSHAKE_BYTES, CodeFormat, Topology, bytes_by_level, bytes_sent
from lioncub.collectives.agreement import WIRE_VERSION
from lioncub.collectives.average import average_bytes
from lioncub.collectives.codes import VOTES
from lioncub.collectives.cost import COUNT_BYTES, aligned, candidates
from lioncub.control import FAILED, STALE, UNVERIFIED, Control
from lioncub.kernels import packed_bytes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EXAMPLES = sorted((DOCS / "examples").glob("*.py"))
ALGORITHMS = candidates(Topology.even(1, 2))
LEVELS = BySize().small.form


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
        text = page.read_text()
        listed = [name.rpartition(".")[2] for name in re.findall(rf"^::: {module.__name__}\.(\S+)$", text, re.M)]
        for members in re.findall(rf"^::: {module.__name__}\n(?: .*\n)*? +members: \[(.*?)\]", text, re.M | re.S):
            listed += [name.strip() for name in members.split(",")]
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


def possible_bytes(*messages: tuple[tuple[int, ...], CodeFormat], scales: int = 0) -> set[int]:
    """Bytes that one of two ranks can send in a step, by whatever algorithms: messages of (sizes, form), and scales."""
    control = 8 * (7 + 5 + 1)
    votes = [{bytes_sent(name, padded(sizes), 2, form) for name in ALGORITHMS} for sizes, form in messages]
    return {sum(combination) + average_bytes(scales, 2) + control for combination in product(*votes)}


def padded(sizes: tuple[int, ...]) -> int:
    """Bytes of a message about parameters of these sizes, one bit per code."""
    return aligned(sum(map(packed_bytes, sizes)))


def test_the_readme_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "train.py"
    script.write_text(code)
    printed = printed_by(script, 2, tmp_path)
    loss = re.search(r"^([\d.]+) Stats\(steps=100, skipped_steps=0, bytes_sent_per_step=(\d+)", printed, re.MULTILINE)
    assert loss, printed
    assert float(loss[1]) < 2.0, "it must have learnt something: chance is ln 10 = 2.3"
    assert int(loss[2]) in possible_bytes(((8192, 1280), VOTES), ((128, 10), LEVELS))


STEP = r"step (\d+): loss ([\d.]+), (\d+) bytes sent per step"


def test_the_training_example_runs(tmp_path: Path) -> None:
    lines = re.findall(STEP, printed_by(DOCS / "examples" / "train.py", 2, tmp_path))
    assert [int(step) for step, *_ in lines] == [20, 40, 60, 80, 100]
    assert float(lines[-1][1]) < 0.7 * float(lines[0][1]), "it must have learnt something"
    assert {int(sent) for *_, sent in lines} <= possible_bytes(((4096,), VOTES), ((256, 256, 1), LEVELS))


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="needs torch 2.13")
def test_the_compiled_example_runs(tmp_path: Path) -> None:
    # machine code, which takes a minute, is made of steps in tests/lioncub/test_compiled.py
    lines = re.findall(STEP, printed_by(DOCS / "examples" / "compiled.py", 2, tmp_path, backend="aot_eager"))
    assert [int(step) for step, *_ in lines] == [20, 40, 60, 80, 100]
    assert float(lines[-1][1]) < 0.7 * float(lines[0][1]), "it must have learnt something"
    # a captured step does not know its number, so scales are averaged in each
    assert {int(sent) for *_, sent in lines} <= possible_bytes(((1024, 64, 256, 4), LEVELS), scales=4)


# with the number of their blocks
PAGES_WITH_PIECES = {
    "index.md": 1,
    "quickstart.md": 3,
    "training.md": 11,
    "compression.md": 2,
    "choosing.md": 1,
    "composing.md": 1,
}


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
        "lioncub": lioncub,
        "LionCub": LionCub,
        "model": model,
        "opt": LionCub(model.named_parameters(), lr=1e-3),
        "device": torch.device("cpu"),
        "rank": rank,
        "loss_of": loss_of,
        "batches": range(2 + rank),
    }
    torch.manual_seed(1 + rank)
    for block in [code for page in PAGES_WITH_PIECES for code in _blocks(page)]:
        opt = names["opt"]
        opt.zero_grad()
        names["loss"] = loss_of(names.get("ddp_model", model))
        names["loss"].backward()
        opt.step()
        exec(block, names)
        names["opt"].check_replicas()
    return sorted(path.name for path in Path(folder).glob("*.pt"))


def test_the_pieces_of_the_pages_run(tmp_path: Path) -> None:
    assert {page: len(_blocks(page)) for page in PAGES_WITH_PIECES} == PAGES_WITH_PIECES
    files = results_of(run_the_pieces, 2, str(tmp_path))
    assert all("checkpoint-0.pt" in names or "checkpoint-1.pt" in names for names in files)
    written = {path.name for path in tmp_path.glob("*.pt")}
    assert written == {"checkpoint-0.pt", "checkpoint-1.pt", "checkpoint.pt"}


class Blocks(nn.Module):
    """Blocks to shard one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        self.head = nn.Linear(40, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = nn.functional.gelu(block(x))
        return self.head(x)


def run_the_pieces_about_shards(rank: int, world_size: int, folder: str) -> list[str]:
    """Every block of the page in order, on two nodes of two ranks; before each but the first a step."""
    os.chdir(folder)
    torch.manual_seed(0)
    model = Blocks()
    names: dict[str, Any] = {
        "LionCub": LionCub,
        "model": model,
        "device": torch.device("cpu"),
        "nodes": 2,
        "ranks_per_node": 2,
    }
    torch.manual_seed(1 + rank)

    def bits() -> list[bytes]:
        opt = names["opt"]
        tensors = [t for p in model.parameters() for t in (p.detach(), opt.state[p]["exp_avg"])]
        return [tensor.full_tensor().numpy().tobytes() for tensor in tensors]

    saved: list[bytes] = []
    for block in _blocks("sharding.md"):
        if "opt" in names:
            opt = names["opt"]
            opt.zero_grad()
            model(torch.randn(8, 40)).square().sum().backward()
            opt.step()
        exec(block, names)
        if "sync_momentum" in block:
            saved = bits()
        if "dcp.load" in block:
            assert bits() == saved, "what is loaded must be what was saved"
    assert saved
    assert names["opt"].stats().steps > 1
    return sorted(path.parent.name for path in Path(folder).glob("*/.metadata"))


def test_the_pieces_about_shards_run(tmp_path: Path) -> None:
    assert len(_blocks("sharding.md")) == 5
    for names in results_of(run_the_pieces_about_shards, 4, str(tmp_path)):
        assert set(names) <= {"checkpoint", "checkpoint-replica0", "checkpoint-replica1"}
    written = sorted(path.parent.name for path in tmp_path.glob("*/.metadata"))
    assert written == ["checkpoint", "checkpoint-replica0", "checkpoint-replica1"]


def _worked_examples() -> list[tuple[str, int, int, str, str]]:
    """(algorithm, workers, message bytes, formula, bytes) of every row of the tables of byte counts."""
    rows = []
    text = (DOCS / "wire-format.md").read_text()
    for example in re.findall(r"^Example: .*?(?=^Example: |\Z)", text, re.MULTILINE | re.DOTALL):
        workers, message = (int(re.search(p, example)[1]) for p in (r"(\d+) ranks", r"B = (\d+)"))
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
        levels = bytes_by_level("hierarchical", message, Topology.even(2, workers // 2))
        assert int(total) == levels[level]
    else:
        assert int(total) == bytes_sent(name, message, workers)


def test_there_are_two_worked_examples() -> None:
    assert len(_worked_examples()) == 10


def test_the_first_example_of_byte_counts() -> None:
    text = (DOCS / "wire-format.md").read_text()
    assert "chunks of 32" in text
    assert f"In all it sends {bytes_sent('reduce_scatter', 128, 4)} bytes" in " ".join(text.split())


def test_the_control_message_is_laid_out_as_documented() -> None:
    device = torch.device("cpu")
    names = [f"parameter {i}" for i in range(64)]
    control = Control(names, [0], None, device, capturable=False)
    rates = [Hyperparameters(0.5, 0.25, 0.75, 2.0, True)]
    present = [True] + [False] * 62 + [True]
    nonfinite = torch.tensor([0, 1, 0] + [0] * 61, dtype=torch.int32)
    found = control.message(
        7, rates, flags=5, overflow=1, nonfinite=nonfinite, present=present, layout=9, microseconds=11
    )
    floats = struct.unpack("<5q", struct.pack("<5d", 0.5, 0.25, 0.75, 2.0, 1.0))
    assert found.tolist() == [WIRE_VERSION, 7, 9, *floats, 5, 1, 11, 2, 1, 1]
    text = (DOCS / "wire-format.md").read_text()
    rows = re.findall(r"^\| (\d+(?: \+ 5[gG])?)(?: to 7 \+ 5g| and on)? \| (.+) \|$", text, re.MULTILINE)
    places = [row for row, _ in rows]
    assert places == ["0", "1", "2", "3 + 5g", *(f"{i} + 5G" for i in range(3, 8))]
    assert rows[0][1] == f"wire version: {WIRE_VERSION}"
    assert re.findall(r"(\d) = ", rows[4][1]) == [str(flag) for flag in (FAILED, STALE, UNVERIFIED)]
    assert HANDSHAKE_BYTES == COUNT_BYTES == 16
