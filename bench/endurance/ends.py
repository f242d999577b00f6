"""Ends of one process at a random moment of a run: the others end in time, and none has other parameters."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from endurance.ranks import TIMEOUT, ranks
from lioncub import Comm, LionCub
from lioncub.replicas import hash_bits

WAYS = ("kill", "stop", "terminate", "interrupt", "raise")
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}
_SIZE, _STEPS = 3, 100_000


def end_trials(seed: int, trials: int) -> tuple[Counter[str], list[str]]:
    """Run trials; return counts and what went wrong."""
    counts, wrong, chance = Counter[str](), list[str](), random.Random(seed)
    for trial in range(trials):
        way, victim, delay = chance.choice(WAYS), chance.randrange(_SIZE), chance.uniform(0.0, 0.5)
        options = {"overlap": chance.random() < 0.5, "algorithm": chance.choice(("all_gather", "reduce_scatter"))}
        text = _trial(way, victim, delay, options, counts)
        counts["trials"] += 1
        if text:
            wrong.append(f"trial {trial}: {way} of rank {victim} after {delay:.2f} s, {options}: {text}")
    return counts, wrong


def _trial(way: str, victim: int, delay: float, options: dict[str, Any], counts: Counter[str]) -> str:
    with ranks(_work, _SIZE, way, victim, delay, options) as started:
        if any(one.answer(60.0) != "ready" for one in started):
            return "a rank did not begin"
        time.sleep(delay)
        if way in _SIGNALS:
            os.kill(started[victim].process.pid, _SIGNALS[way])
        # a receive waits for the timeout, and so may the close
        deadline = time.monotonic() + 2 * TIMEOUT + 5
        others = [one.answer(deadline - time.monotonic()) for i, one in enumerate(started) if i != victim]
    if not all(isinstance(found, dict) for found in others):
        return f"expected that all others end in time, got {others}"
    first, second = others
    common = first["hashes"].keys() & second["hashes"].keys()
    if not common or any(first["hashes"][step] != second["hashes"][step] for step in common):
        return f"replicas differ: {others}"
    counts["a step ahead"] += int(first["step"] != second["step"])
    counts["named"] += sum(f"rank {victim} " in found["said"] for found in others)
    return "" if abs(first["step"] - second["step"]) <= 1 else f"steps differ by more than one: {others}"


def _work(
    rank: int, size: int, say: Callable[[Any], None], way: str, victim: int, delay: float, options: dict[str, Any]
) -> Any:
    torch.manual_seed(0)
    params = [torch.randn(n).requires_grad_() for n in (3000, 65, 200)]
    comm = Comm(algorithm=options["algorithm"])
    opt = LionCub(params, lr=1e-3, overlap=options["overlap"], comm=comm)
    own, hashes = torch.Generator().manual_seed(rank), dict[int, int]()
    say("ready")
    began, said = time.monotonic(), ""
    for step in range(_STEPS):
        hashes = {number: found for number, found in hashes.items() if number > step - 3}
        hashes[step] = sum(int(hash_bits(param)) for param in params)
        try:
            opt.zero_grad()
            sum((param * torch.randn(param.shape, generator=own)).sum() for param in params).backward()
            if way == "raise" and rank == victim and time.monotonic() > began + delay:
                raise ArithmeticError("an error between backward and step")
            opt.step()
        except Exception as error:
            said = str(error)
            break
    taken = opt.stats().steps
    hashes[taken] = sum(int(hash_bits(param)) for param in params)
    return {"step": taken, "hashes": hashes, "said": said}
