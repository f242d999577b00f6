"""The measurement as a job for workers: its settings, and each worker's part."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lioncub.collectives.probing import probe
from lioncub.collectives.routes import Routes
from lioncub.training.config import UserError

REPORT_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much of the measurement is done, 0 to 1, and what is being measured."""

    fraction: float
    what: str


@dataclasses.dataclass(frozen=True)
class ProbeJob:
    """Settings of one measurement; times in seconds. Rank 0 reports `Progress`, and the `Profile` at the end.

    Raises:
        UserError: a value is out of range; the message names the flag, what was expected and what came.
    """

    workers: int = 4
    out: str = "profile.json"
    plot: str | None = None
    budget: float = 15.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check every field; the first bad one raises."""
        if self.workers < 2:
            raise UserError(f"--workers: expected an integer >= 2, got {self.workers}")
        for name in ("budget", "timeout"):
            # written so that nan fails too
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name}: expected a finite number of seconds > 0, got {getattr(self, name)}")

    def run(self, report: Callable[[Any], None]) -> None:
        """Measure the default group."""
        leads, last = dist.get_rank() == 0, 0.0

        def on_progress(fraction: float, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if leads and (now - last >= REPORT_SECONDS or fraction == 1):
                last = now
                report(Progress(fraction, what))

        profile = probe(Routes.find(), seconds=self.budget, on_progress=on_progress)
        if leads:
            report(profile)
