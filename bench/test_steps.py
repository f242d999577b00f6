"""Speed of optimizers' steps: `speed.steps`, one thread. LionCub has one worker, and so nothing to exchange."""

from __future__ import annotations

import time
from typing import Any

import pytest
from speed.steps import STEPS, Step, gpt2_shapes, make_step
from speed.workbench import Workbench

pytestmark = pytest.mark.benchmark(timer=time.thread_time)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step(benchmark: Any, benches: dict[str, Workbench], step: Step) -> None:
    call = make_step(step, gpt2_shapes())
    benches["cpu"].measure(benchmark, call, budget=3.0, kind="step" if step.is_ours else "peer", name=step.name)
