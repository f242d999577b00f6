"""Tile shapes on the real chip: elements and warps of a program, for the kernels of a step and for votes.

Launches are changed on their way to Triton, so that nothing needs to be known of the kernels but that ``BLOCK_SIZE``
is what a program works on. Lists keep their blocks, which their tables are made for; only their warps are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from speed.cases import CASES, Case
from speed.data import Data
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gpu.workbench import Workbench

_SHAPES = ((512, 2), (1024, 2), (1024, 4), (1024, 8), (2048, 4), (2048, 8), (4096, 8), (4096, 16))
_LIST_WARPS = (2, 4, 8, 16)
_OPS = ("majority_vote:8_voters",)
_LISTS = ("foreach_lion_step_", "foreach_lion_encode", "foreach_lion_apply_")


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

    launcher.run = run
    try:
        yield launched
    finally:
        launcher.run = original


def run(bench: Workbench) -> None:
    """A row for each shape, kernel and dtypes."""
    n = 4096 if bench.is_dry else 2**26
    named = {case.name: case for case in CASES}
    shapes = _SHAPES[2:3] if bench.is_dry else _SHAPES
    trials: list[tuple[str, int | None, int]] = [(name, block, warps) for name in _OPS for block, warps in shapes]
    trials += [(name, None, warps) for name in _LISTS for warps in (_LIST_WARPS[:1] if bench.is_dry else _LIST_WARPS)]
    for kind, dtype in (("fp32", torch.float32), ("mixed", torch.bfloat16)):
        data = Data(n, dtype, str(bench.device), parts=2 if bench.is_dry else 64)
        for name, block, warps in trials:
            if kind == "fp32" or name != "majority_vote:8_voters":
                label = f"{name}/{kind}, {block or 'its own'} x {warps} warps"
                bench.attempt(label, partial(_measure, bench, named[name], data, block, warps))


def _measure(bench: Workbench, case: Case, data: Data, block: int | None, warps: int) -> dict[str, Any]:
    call = case.make(data, "triton")
    with shaped(block, warps, is_interpreted=bench.is_dry) as launched:
        timing = bench.clock.device_seconds([call.run], rounds=4)
    (shape,) = set(launched)
    return {
        "block": shape[0],
        "warps": shape[1],
        "gigabytes_per_second": call.bytes_moved / timing.seconds / 1e9,
        "spread": timing.spread,
    }
