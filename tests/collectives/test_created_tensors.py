"""Every tensor that the library creates names its dtype and its device, whatever the defaults of the process are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from gloo_workers import results_of
from gpu_checks import OPS
from samples import assert_same_bits, sample

from lioncub.collectives import WorkersDisagreeError, average_, vote
from lioncub.kernels import pack_signs

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "collectives")
# what follows torch.set_default_dtype or torch.set_default_device; "like" and "new" ones follow their tensor
CONSTRUCTORS = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "empty", "empty_strided", "zeros", "ones", "full", "eye"),
    *("arange", "range", "linspace", "logspace", "rand", "randn", "randint", "randperm", "normal", "complex"),
}


def _unnamed(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in CONSTRUCTORS:
            missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
            if missing:
                yield f"{path.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr} without {sorted(missing)}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_constructor_names_dtype_and_device(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert [line for path in files for line in _unnamed(path)] == []


@contextmanager
def _defaults(dtype: torch.dtype, device: str | None = None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", sorted(OPS))
def test_kernels_do_not_follow_the_defaults(name: str, impl: str) -> None:
    for param_dtype in (torch.float32, torch.bfloat16):
        # 203 elements leave tails of every kind
        arguments = (203, param_dtype, torch.device("cpu"), impl)
        expected = OPS[name](*arguments)
        for default, device in ((torch.bfloat16, None), (torch.float16, None), (torch.float64, "meta")):
            with _defaults(default, device):
                found = OPS[name](*arguments)
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert_same_bits(a, b, f"{name} by {impl}, {param_dtype}, defaults {default} and {device}, result {i}")


def _sums(rank: int, world_size: int, dtype: torch.dtype, device: str | None) -> list[bytes]:
    packed, values = pack_signs(sample(2000, torch.float32, rank)), sample(301, torch.float32, rank, finite=True)
    with _defaults(dtype, device):
        results = [vote(packed, algorithm=name) for name in ("all_gather", "reduce_scatter", "all_reduce")]
        average_(values)
        average_(values, dtype="int8")
        with pytest.raises(WorkersDisagreeError):
            vote(packed[: 8 + 8 * rank])
    return [bytes(result.numpy()) for result in (*results, values)]


def test_collectives_do_not_follow_the_defaults() -> None:
    expected = results_of(_sums, 2, torch.float32, None)
    for dtype, device in ((torch.float16, None), (torch.float64, "meta")):
        assert results_of(_sums, 2, dtype, device) == expected
