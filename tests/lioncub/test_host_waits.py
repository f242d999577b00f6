"""How often a step reads values of tensors, which on a GPU are waits; tensors on the CPU stand in for a GPU's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gloo_workers import on_ranks
from optimizers import LionCub
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lioncub import BySize, MomentumSync, Quantized, SignMean, SignVote, TernaryVote
from lioncub.control import Control, LateReport
from lioncub.simulate import Workers

ROOT = Path(__file__).parents[2]
# what gives a tensor's values to Python, and the ops by which torch itself looks at them
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "equal"}
READING_OPS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
# the CPU's own kernels may look at whatever they like, and numbers of the host are passed as its tensors
ALLOWED = tuple(ROOT / "kernels" / name for name in ("numba_cpu", "reference.py", "scalars.py"))


def reader() -> str | None:
    """The place in the library that reads a tensor, as file:function; None where it may."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__):
            if any(path.is_relative_to(place) for place in ALLOWED):
                return None
            if path.parts[len(ROOT.parts)] in ("lioncub", "collectives", "kernels"):
                return f"{path.relative_to(ROOT)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return None


class _Ops(TorchDispatchMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # by a mask, the size of the result depends on values
        masks = func._schema.name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (masks or func._schema.name in READING_OPS) and (place := reader()) is not None:
            self._reads.append(place)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in READS:
            return func(*args, **(kwargs or {}))
        if (place := reader()) is not None:
            self._reads.append(place)
        # else its ops would be counted again
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[list[str]]:
    reads: list[str] = []
    with _Ops(reads), _Functions(reads):
        yield reads


KINDS: dict[str, dict[str, Any]] = {
    "signs": {"compression": SignVote()},
    "by size": {"compression": BySize(max_numel=70)},
    "ternary": {"compression": TernaryVote()},
    "mean": {"compression": SignMean()},
    "levels": {"compression": Quantized(bits=4, stochastic=True, block=64, share_scales_every=2)},
    "momentum": {"momentum_sync": MomentumSync(every=2, schedule="staggered", dtype="int8")},
    "drift": {"drift_every": 1, "compression": SignVote()},
    "masters": {"master_weights": True, "compression": SignVote()},
    "rounded": {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "compression": SignVote()},
}


# on the CPU, where nothing is waited for, the host decides by itself
AS_ON_A_DEVICE = property(lambda self: False, lambda self, value: None)


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Control, "_is_read", AS_ON_A_DEVICE, raising=False)


def reads_of(group: Any, rank: int, steps: int = 4, **options: Any) -> list[list[str]]:
    """What each step after the first reads, which verifies new parameters; one parameter has no gradient anywhere."""
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    params = [nn.Parameter(torch.ones(n, dtype=dtype)) for n, dtype in zip((5, 70, 1000), dtypes, strict=True)]
    opt = LionCub(params, lr=0.01, process_group=group, bucket_mb=1e-4, **options)
    found = []
    for step in range(steps):
        for p in params[: 2 + (step % 2)]:
            p.grad = torch.full_like(p, 1.0 + rank)
        with counted() as reads:
            opt.step()
        found.append(reads)
    return found[1:]


def test_reads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "reader", lambda: "here")
    value = torch.ones(1)
    with counted() as reads:
        _ = value.tolist(), float(value), bool(value), value.item(), value.numpy(), torch.equal(value, value)
        _ = value[value > 0], value.cpu(), value.sum() + value.numel()
    assert reads == ["here"] * 8


DECISION = ["lioncub/control.py:read"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_reads_the_decision_and_nothing_else(kind: str) -> None:
    assert reads_of(None, 0, **KINDS[kind]) == [DECISION] * 3
    with Workers(2) as workers:
        found = workers.run(lambda rank, group: reads_of(group, rank, **KINDS[kind]))
    assert found == [[DECISION] * 3] * 2


def test_with_a_scaler_its_scale_on_the_cpu_is_read_too() -> None:
    p = nn.Parameter(torch.ones(9))
    opt = LionCub([p], lr=0.01)
    p.grad = torch.ones(9)
    opt.step()
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with counted() as reads:
        opt.step()
    assert len(reads) == 2
    assert reads[0].endswith("read_context")
    assert reads[1:] == DECISION


@pytest.mark.parametrize("kind", ["signs", "by size", "ternary", "mean", "levels", "masters", "rounded"])
def test_a_capturable_step_reads_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # on a GPU the last step's report is read from a copy on the host
    monkeypatch.setattr(LateReport, "raise_last", lambda self, control: None)
    assert reads_of(None, 0, capturable=True, **KINDS[kind]) == [[]] * 3


@on_ranks(2)
def test_capturable_steps_of_two_ranks_read_nothing(rank: int, world_size: int) -> None:
    averaged = {"momentum_sync": MomentumSync(), "compression": SignVote(), "algorithm": "all_gather"}
    with mock.patch.object(LateReport, "raise_last", return_value=None):
        for options in (KINDS["signs"], KINDS["levels"], averaged):
            assert reads_of(None, rank, capturable=True, **options) == [[]] * 3
