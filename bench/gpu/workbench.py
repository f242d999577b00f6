"""The tools of a stage: its device, its clock, its time limit, and the file of its rows."""

from __future__ import annotations

import gc
import importlib.util
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu.report import Rows
from gpu.timing import Clock

T = TypeVar("T")


class Workbench:
    """One stage in its own process; rows that fail are recorded, and the stage goes on."""

    def __init__(self, stage: str, out: Path, device: str, seconds: float, only: str = "") -> None:
        self.stage, self.out, self.device = stage, out, torch.device(device)
        self.seconds, self._only = seconds, only
        self._deadline = time.monotonic() + seconds
        self.clock = Clock(self.device)
        self.is_dry = self.clock.is_dry
        self.rows = Rows(out / "gpu.jsonl")
        self.failed = 0

    def real(self, full: T, dry: T) -> T:
        """Return ``full`` on a GPU and ``dry`` in a dry run."""
        return dry if self.is_dry else full

    def add(self, name: str, **figures: Any) -> None:
        """Record a row, and print it to the log."""
        self.failed += "error" in figures
        self.rows.add(self.stage, name, **figures)
        cells = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        print(name, *cells, flush=True)

    def attempt(self, name: str, measure: Callable[[], Mapping[str, Any] | None], *, needs: str = "") -> None:
        """Record the figures of ``measure``, none where it is a check; ``needs`` is a package or "a GPU"."""
        if re.search(self._only, name) is None:
            return None
        absent = self.is_dry if needs == "a GPU" else bool(needs) and importlib.util.find_spec(needs) is None
        if absent:
            return self.add(name, absent=needs)
        if time.monotonic() > self._deadline:
            return self.add(name, skipped="out of time")
        try:
            figures = measure() or {}
        except Exception as error:
            traceback.print_exc()
            self.add(name, error=f"{type(error).__name__}: {error}"[:500])
        else:
            self.add(name, **figures)
        if not self.is_dry:
            # one model or optimizer is alive at a time
            gc.collect()
            # raises, and so ends the stage, where the device faulted: nothing runs on it any more
            self.clock.synchronize()
            torch.cuda.empty_cache()
        return None
