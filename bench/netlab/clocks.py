"""What a step is made of, in seconds, and the clock of DDP's communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.training.methods import covered_seconds


@dataclass(frozen=True)
class StepTimes:
    """One step of one worker: `step` is the sum of `forward`, `backward`, `exposed` and `optimizer`.

    `exposed` is the communication that nothing else is done meanwhile; `communication` all of it.
    """

    step: float
    forward: float
    backward: float
    exposed: float
    optimizer: float
    communication: float


Hook = Callable[[Any, dist.GradBucket], torch.futures.Future[Tensor]]  # type: ignore[name-defined]


class HookClock:
    """Notes when each bucket of a DDP communication hook was ready and when its result had arrived."""

    def __init__(self) -> None:
        self._started: list[float] = []
        self._finished: list[float] = []

    def timed(self, hook: Hook, state: Any) -> Any:
        """``hook`` with its ``state``, timed."""

        def run(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            self._started.append(perf_counter())
            return hook(state, bucket).then(self._finish)

        # DDP compares annotations with the types themselves, which postponed ones are not
        run.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # type: ignore[attr-defined]
        return run

    def _finish(self, future: torch.futures.Future[Tensor]) -> Tensor:
        self._finished.append(perf_counter())
        return future.value()

    def reset(self) -> None:
        """Forget the past step."""
        self._started.clear()
        self._finished.clear()

    @property
    def busy(self) -> float:
        """Seconds with at least one bucket under way."""
        seconds: float = covered_seconds(self._started, self._finished)
        return seconds

    @property
    def exposed(self) -> float:
        """Seconds from the last bucket's start: all gradients are there, the backward pass only waits."""
        return max(self._finished) - max(self._started)
