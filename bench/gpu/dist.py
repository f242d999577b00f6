"""Workers that share one GPU over Gloo with CUDA tensors train a GPT by each method, on links of 1 and 10 Gb/s.

A link is shaped between network namespaces where these can be made, else every TCP connection is paced to its share of
the rate (``pace.c``), else nothing is limited; rows name which. Workers and methods are those of the network lab.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from netlab.crew import Crew
from netlab.lab import Lab, LabError, rate_name, worker_environment

from gpu.driver import CARRIED
from gpu.workbench import Workbench

_RATES = (10**9, 10**10)
# of the time of a rate, beside the methods' own: to start, compile and end
_STARTING_SECONDS = 25.0
METHODS = {
    "lioncub": "LionCub",
    "lioncub_overlap": "LionCub, overlap",
    "lioncub_all_gather_overlap_synced": "LionCub, overlap, momentum synchronized",
    "ddp_bf16_adamw": "DDP bf16, AdamW fused",
    "ddp_fp32_adamw": "DDP fp32, AdamW fused",
}


class LocalHost:
    """Starts workers as a `Lab` does, without namespaces; connections are paced by the library in ``build/gpu``."""

    def __init__(self, workers: int, rate: int, *, is_paced: bool) -> None:
        self.workers = workers
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = str(unused.getsockname()[1])
        self._variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        if is_paced:
            self._variables |= {"LD_PRELOAD": str(CARRIED / "pace.so"), "PACE": str(rate // 8 // (workers - 1))}

    def start_worker(
        self, rank: int, command: Sequence[str], further: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start ``command`` as worker ``rank``."""
        variables = worker_environment(rank, self.workers, 1) | self._variables | dict(further or {})
        return subprocess.Popen(command, env={**os.environ, **variables}, **options)


def run(bench: Workbench) -> None:
    """Start the workers for each rate; a row for each method."""
    for rate in bench.real(_RATES, _RATES[:1]):
        bench.attempt(f"all workers, {rate_name(rate)}", partial(_train_all, bench, rate))


def _train_all(bench: Workbench, rate: int) -> dict[str, Any]:
    seconds = bench.real((bench.seconds / len(_RATES) - _STARTING_SECONDS) / len(METHODS), 1.0)
    with ExitStack() as stack:
        hosts, link = _hosts(bench, rate, stack)
        crew = stack.enter_context(Crew(hosts, bench.real("gpu", "tiny"), bench.out / "log.txt", {}, bench.device.type))
        for method, title in METHODS.items():
            name = f"{title}: {link}, {rate_name(rate)}"
            bench.attempt(name, partial(_train, crew, method, bench.real(3, 1), bench.real(1000, 2), seconds))
    return {"workers": hosts.workers}


def _hosts(bench: Workbench, rate: int, stack: ExitStack) -> tuple[Lab | LocalHost, str]:
    """Return where workers are started, and how its links are limited."""
    if bench.is_dry:
        return LocalHost(2, rate, is_paced=False), "unshaped"
    try:
        return stack.enter_context(Lab(4, rate)), "netns"
    except LabError as error:
        print(f"no network namespaces: {error}", flush=True)
    is_paced = (CARRIED / "pace.so").exists()
    return LocalHost(4, rate, is_paced=is_paced), "paced" if is_paced else "unshaped"


def _train(crew: Crew, method: str, untimed: int, steps: int, seconds: float) -> dict[str, Any]:
    """Time steps, which end with their slowest worker."""
    answers = crew.ask("measure", method=method, untimed=untimed, steps=steps, seconds=seconds)
    slowest = [max(step) for step in zip(*(answer["seconds"] for answer in answers), strict=True)]
    sent = max(answer["sent"] for answer in answers)
    return {"steps": len(slowest), "step_ms": 1e3 * median(slowest), "bytes_per_step": sent}
