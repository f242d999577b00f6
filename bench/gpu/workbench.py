"""What a stage works with: its device, its clock, its time, and where its rows go."""

from __future__ import annotations

import gc
import importlib.util
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu.rows import Rows
from gpu.timing import Clock


class Workbench:
    """One stage in its own process; rows that fail are recorded, and the stage goes on."""

    def __init__(self, stage: str, out: Path, device: str, seconds: float, only: str = "") -> None:
        self.stage, self.out, self.device = stage, out, torch.device(device)
        self.seconds, self._only = seconds, only
        self._deadline = time.monotonic() + seconds
        self.clock = Clock(self.device)
        self.is_dry = self.clock.is_dry
        self.rows = Rows(out / "gpu.json")
        self.failed = 0

    def add(self, name: str, **figures: Any) -> None:
        """Record a row, and say so in the log."""
        self.failed += "error" in figures
        self.rows.add(self.stage, name, **figures)
        print(
            name,
            *(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()),
            flush=True,
        )

    def attempt(
        self, name: str, measure: Callable[[], Mapping[str, Any] | None], *, needs: str = "", **labels: Any
    ) -> None:
        """Record the figures that ``measure`` gives, none where it is a check; ``needs`` is a package or "a GPU"."""
        if self._only not in name:
            return None
        absent = self.is_dry if needs == "a GPU" else bool(needs) and importlib.util.find_spec(needs) is None
        if absent:
            return self.add(name, **labels, absent=needs)
        if time.monotonic() > self._deadline:
            return self.add(name, **labels, skipped="out of time")
        try:
            figures = measure() or {}
        except Exception as error:
            traceback.print_exc()
            self.add(name, **labels, error=f"{type(error).__name__}: {error}"[:500])
        else:
            self.add(name, **labels, **figures)
        if not self.is_dry:
            # one model or optimizer is alive at a time
            gc.collect()
            # raises, and so ends the stage, where the device faulted: nothing runs on it any more
            self.clock.synchronize()
            torch.cuda.empty_cache()
        return None
