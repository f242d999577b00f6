"""Every tensor that the library creates names its dtype and its device, whatever the defaults of the process are."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import on_ranks
from gpu_checks import OPS
from nets import give_gradients, two_groups
from optimizers import Lion, LionCub
from samples import assert_same_bits, sample

from lioncub import MomentumSync, Quantized, SignVote, TernaryVote
from lioncub.collectives import WorkersDisagreeError, average_, vote
from lioncub.kernels import pack_signs
from lioncub.simulate import Workers

ROOT = Path(__file__).parents[1]
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


@on_ranks(2)
def test_collectives_do_not_follow_the_defaults(rank: int, world_size: int) -> None:
    packed = pack_signs(sample(2000, torch.float32, rank))

    def sums(dtype: torch.dtype, device: str | None) -> list[bytes]:
        values = sample(301, torch.float32, rank, finite=True)
        with _defaults(dtype, device):
            results = [vote(packed, algorithm=name) for name in ("all_gather", "reduce_scatter", "all_reduce")]
            average_(values)
            average_(values, dtype="int8")
            with pytest.raises(WorkersDisagreeError):
                vote(packed[: 8 + 8 * rank])
        return [bytes(result.numpy()) for result in (*results, values)]

    expected = sums(torch.float32, None)
    assert sums(torch.float16, None) == sums(torch.float64, "meta") == expected


SIMULATED: dict[str, dict[str, Any]] = {
    "default": {},
    "quantized": {
        "compression": Quantized(bits=4, block=64, stochastic=True, share_scales_every=1),
        "momentum_sync": MomentumSync(every=2, dtype="int8"),
        "drift_every": 1,
    },
    "auto": {"momentum_sync": MomentumSync(select="auto", budget=8.0), "drift_every": 1, "algorithm": "all_reduce"},
    "masters": {"master_weights": True, "compression": TernaryVote(), "algorithm": "reduce_scatter"},
    "stochastic": {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "compression": SignVote()},
}
ALONE: dict[str, tuple[type, dict[str, Any]]] = {
    "Lion": (Lion, {"param_rounding": "stochastic"}),
    "capturable": (LionCub, {"capturable": True, "master_weights": True}),
}


def _train_simulated(options: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    with Workers(2) as workers:
        made = [two_groups() for _ in range(2)]
        opts = workers.run(lambda rank, group: LionCub(made[rank][1], lr=0.1, process_group=group, **options))
        for step in range(3):
            for rank, (params, _) in enumerate(made):
                give_gradients(params, seed=10 * step + rank)
            workers.run(lambda rank, _: opts[rank].step())
        return made[0][0], opts[0]


def _train_alone(optimizer: Any, options: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    params, groups = two_groups()
    opt = optimizer(groups, lr=0.1, **options)
    for step in range(3):
        give_gradients(params, seed=step)
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return params, opt


@pytest.mark.parametrize("run", [*SIMULATED, *ALONE])
def test_optimizers_do_not_follow_the_defaults(run: str) -> None:
    def end() -> list[torch.Tensor]:
        params, opt = _train_simulated(SIMULATED[run]) if run in SIMULATED else _train_alone(*ALONE[run])
        return [t.detach() for p in params for t in (p, *opt.state[p].values())]

    expected = end()
    for dtype, device in ((torch.bfloat16, None), (torch.float64, "meta")):
        with _defaults(dtype, device):
            found = end()
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(a, b, f"{run}, defaults {dtype} and {device}, tensor {i}")
