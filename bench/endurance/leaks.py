"""Many constructions: threads, descriptors and memory come back."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from endurance.ranks import answers_of
from lioncub import Comm, LionCub

# the first constructions load libraries and fill caches
_WARM = 20
# of memory that is no leak: the allocator's
_SLACK_MB = 32


def construct_often(times: int) -> tuple[Counter[str], list[str]]:
    """Build, step and close so often on two ranks; return counts and what grew."""
    found = answers_of(_work, 2, times, seconds=600.0)
    wrong = [f"rank {rank}: {one}" for rank, one in enumerate(found) if one != ""]
    return Counter({"constructions": times}), wrong


def _resources() -> tuple[int, int]:
    """Return threads and descriptors."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def _settled() -> tuple[int, int]:
    """Return resources when they have not changed for half a second: the backend frees some later."""
    found, since = _resources(), time.monotonic()
    while time.monotonic() < since + 0.5:
        time.sleep(0.05)
        now = _resources()
        if now != found:
            found, since = now, time.monotonic()
    return found


def _megabytes() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _work(rank: int, size: int, say: Callable[[Any], None], times: int) -> str:
    params = [torch.randn(n).requires_grad_() for n in (3000, 65)]
    before, megabytes = (0, 0), 0.0
    for i in range(times):
        if i == min(_WARM, times - 1):
            gc.collect()
            before, megabytes = _settled(), _megabytes()
        opt = LionCub(params, lr=1e-3, overlap=bool(i % 2), comm=Comm(algorithm="reduce_scatter"))
        for _ in range(2):
            opt.zero_grad()
            sum(param.square().sum() for param in params).backward()
            opt.step()
        opt.close()
        del opt
    gc.collect()
    after, grown = _settled(), _megabytes() - megabytes
    if after > before:
        return f"expected {before} threads and descriptors, got {after}"
    return "" if grown < _SLACK_MB else f"expected memory that stays, got {grown:.0f} MB more"
