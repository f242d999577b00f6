"""Tile shapes on the real chip: elements and warps of a program; and what ncu looks at.

Launches are changed on their way to Triton, so that nothing needs to be known of the kernels but that a program works
on ``BLOCK_SIZE`` elements. Lists keep their blocks, which their tables are made for; only their warps are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
from speed.cases import CASES, Case
from speed.data import Data
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gpu.workbench import Workbench

_VOTE = "majority_vote:8_voters"
_LISTS = ("foreach_lion_step_", "foreach_lion_encode", "foreach_lion_apply_")
_PROFILED = (_VOTE, *_LISTS, "lion_encode", "lion_encode_", "lion_apply_:momentum", "lion_step_")
_SHAPES = ((1024, 4), (512, 2), (1024, 2), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
_LIST_WARPS = (2, 4, 8, 16)
_NAMED = {case.name: case for case in CASES}


@contextmanager
def shaped(block: int | None, warps: int, *, is_interpreted: bool) -> Iterator[list[tuple[int, int]]]:
    """Launch with other tiles; gives the block sizes and warps of the launches so far."""
    launched: list[tuple[int, int]] = []
    launcher: Any = InterpretedFunction if is_interpreted else JITFunction
    original = launcher.run

    def run(kernel: Any, *args: Any, grid: Any, **options: Any) -> Any:
        place, arguments = kernel.arg_names.index("BLOCK_SIZE"), list(args)
        if block is not None:
            # programs too many are masked
            grid = (triton.cdiv(grid[0] * arguments[place], block),)
            arguments[place] = block
        launched.append((arguments[place], warps))
        return original(kernel, *arguments, grid=grid, **{**options, "num_warps": warps})

    with patch.object(launcher, "run", run):
        yield launched


def _data(bench: Workbench, dtype: torch.dtype) -> Data:
    return Data(bench.real(2**26, 4096), dtype, str(bench.device), parts=bench.real(64, 2))


def run(bench: Workbench) -> None:
    """A row for each shape, kernel and dtypes."""
    shapes, warps = bench.real(_SHAPES, _SHAPES[:1]), bench.real(_LIST_WARPS, _LIST_WARPS[:1])
    lists = [(name, None, count) for name in _LISTS for count in warps]
    trials = {"fp32": [*((_VOTE, *shape) for shape in shapes), *lists], "mixed": lists}
    for kind, dtype in (("fp32", torch.float32), ("mixed", torch.bfloat16)):
        data = _data(bench, dtype)
        for name, block, count in trials[kind]:
            label = f"{name}/{kind}, {block or 'its own'} x {count} warps"
            bench.attempt(label, partial(_measure, bench, _NAMED[name], data, block, count))


def _measure(bench: Workbench, case: Case, data: Data, block: int | None, warps: int) -> dict[str, Any]:
    call = case.make(data, "triton")
    with shaped(block, warps, is_interpreted=bench.is_dry) as launched:
        timing = bench.clock.device_seconds([call.run], rounds=4)
    (shape,) = set(launched)
    rate = call.bytes_moved / timing.seconds / 1e9
    return {"block": shape[0], "warps": shape[1], "gigabytes_per_second": rate, "spread": timing.spread}


def launch_once(bench: Workbench) -> None:
    """Launch each main kernel once, under ncu."""
    for dtype in (torch.float32, torch.bfloat16):
        data = _data(bench, dtype)
        for name in _PROFILED:
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            bench.attempt(label, partial(_launch, _NAMED[name], data))


def _launch(case: Case, data: Data) -> None:
    case.make(data, "triton").run()
