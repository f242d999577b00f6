"""What a step is made of, in seconds, and the clock of DDP's communication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from demo.methods import AllReduceClock
from torch import Tensor


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


class HookClock(AllReduceClock):
    """Notes when each bucket of any DDP communication hook was ready and when its result had arrived."""

    def timed(self, hook: Hook, state: Any) -> Any:
        """``hook`` with its ``state``, timed."""

        def run(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
            self.started.append(perf_counter())
            return hook(state, bucket).then(self._finish)

        # DDP compares annotations with the types themselves, which postponed ones are not
        run.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}  # type: ignore[attr-defined]
        return run
