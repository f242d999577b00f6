"""One worker process: joins the group, holds one model, measures what it is asked to, one method after the other."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import resource
import socket
import sys
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from demo.gpt import GPT, parameter_count

from lioncub.collectives import Profile, Routes, Voter
from lioncub.collectives.header import Header
from lioncub.collectives.probing import probe
from netlab.clocks import StepTimes
from netlab.crew import describe
from netlab.lab import DEVICE
from netlab.matrix import CONTEXT, MODELS, VOCABULARY
from netlab.methods import Voting, Workbench

SEED = 1
MAX_PHASES = 4
GROUP_TIMEOUT = timedelta(seconds=300)
_STATISTICS = Path("/sys/class/net") / DEVICE / "statistics"


class Worker:
    """What a worker can be asked; every request is collective, and its answer goes to JSON."""

    def __init__(self, model_name: str) -> None:
        torch.set_num_threads(1)
        # every LionCub with overlap brings a process group, which lasts as long as the process
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
        torch.manual_seed(SEED)
        shape = MODELS[model_name]
        self._bench = Workbench(lambda: GPT(layers=shape.layers, heads=shape.heads, width=shape.width, context=CONTEXT))
        assert parameter_count(self._bench.model) == shape.parameters
        self._routes = Routes.find()
        own = torch.Generator().manual_seed(SEED + 1 + dist.get_rank())
        self._windows = torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=own)

    def warm_up(self, methods: list[str]) -> dict[str, Any]:
        """Three steps of each method: compiles kernels, builds DDP's buckets, gets PowerSGD past its plain steps."""
        for name in methods:
            self._bench.restore()
            method = self._bench.method(name)
            for _ in range(3):
                method.step(self._windows)
            del method
            gc.collect()
        return {}

    def probe(self, seconds: float, path: str) -> dict[str, Any]:
        """Measure the algorithms on this group, and let the first worker write the profile to ``path``."""
        profile = probe(self._routes, seconds=seconds)
        if dist.get_rank() == 0:
            Path(path).write_text(profile.to_json())
        dist.barrier()
        return {}

    def measure(self, method: str, untimed: int, steps: int, alone: int, profile: str | None) -> dict[str, Any]:
        """Times of ``steps`` steps, bytes of the interface per step, and of ``alone`` exchanges by themselves."""
        self._bench.restore()
        runner = self._bench.method(method, profile)
        for _ in range(untimed):
            runner.step(self._windows)
        dist.barrier()
        sent, received = _interface_bytes()
        times: list[StepTimes] = []
        for _ in range(steps):
            dist.barrier()
            times.append(runner.step(self._windows))
        dist.barrier()
        sent_after, received_after = _interface_bytes()
        answer: dict[str, Any] = {
            "steps": [dataclasses.astuple(step) for step in times],
            "sent": (sent_after - sent) / steps,
            "received": (received_after - received) / steps,
        }
        if isinstance(runner, Voting):
            answer |= self._exchanges(runner, alone, profile)
        del runner
        gc.collect()
        return answer

    def _exchanges(self, runner: Voting, alone: int, profile: str | None) -> dict[str, Any]:
        """What a LionCub sends, by which ways, how long it takes by itself, and what the profile expects."""
        stats = runner.stats()
        in_steps = []
        for _ in range(alone):
            dist.barrier()
            in_steps.append(runner.step_alone())
        costs = None if profile is None else Profile.load(profile).costs(self._routes.topology, "gloo")
        voters = [
            Voter(bucket.elements // 8, routes=self._routes, algorithm=bucket.algorithm, costs=costs, tag=tag)
            for tag, bucket in enumerate(stats.buckets)
        ]
        predicted = None
        if costs is not None and alone:
            predicted = sum(costs.seconds(voter.algorithm, voter.n_bytes, voter.header_bytes) for voter in voters)
        return {
            "bytes_sent": stats.bytes_sent_per_step,
            "routes": [bucket.algorithm for bucket in stats.buckets],
            "alone_in_step": in_steps,
            # the first one pays for memory that training, which repeats its sizes, has
            "alone": [_exchange(voters) for _ in range(alone + 1)][1:] if alone else [],
            "alone_bytes": sum(voter.bytes_sent for voter in voters),
            "predicted": predicted,
        }

    def barriers(self, count: int) -> dict[str, Any]:
        """Bytes that one barrier sends and receives, to be taken off the steps'."""
        dist.barrier()
        sent, received = _interface_bytes()
        for _ in range(count):
            dist.barrier()
        sent_after, received_after = _interface_bytes()
        return {"sent": (sent_after - sent) / count, "received": (received_after - received) / count}

    def digest(self, method: str, steps: int) -> dict[str, Any]:
        """A hash of all parameters after ``steps`` steps of ``method`` from the first ones, each on another window."""
        self._bench.restore()
        runner = self._bench.method(method)
        own = torch.Generator().manual_seed(SEED + 1000 + dist.get_rank())
        for _ in range(steps):
            runner.step(torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=own))
        del runner
        gc.collect()
        seen = hashlib.blake2b(digest_size=16)
        for param in self._bench.model.parameters():
            seen.update(param.detach().numpy().tobytes())
        return {"digest": seen.hexdigest(), "steps": steps}

    def memory(self) -> dict[str, Any]:
        """The most memory that this process has taken so far."""
        return {"peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def _interface_bytes() -> tuple[int, int]:
    return int((_STATISTICS / "tx_bytes").read_text()), int((_STATISTICS / "rx_bytes").read_text())


def _exchange(voters: list[Voter]) -> float:
    """Seconds of a vote on messages like an optimizer's, all in flight at once, with nothing to encode or to apply."""
    packed = [torch.zeros(voter.n_bytes, dtype=torch.uint8) for voter in voters]
    # as an optimizer does before it encodes
    for voter, message in zip(voters, packed, strict=True):
        voter.expect(message.device)
    dist.barrier()
    begin = perf_counter()
    pending = [voter.start(message, Header()) for voter, message in zip(voters, packed, strict=True)]
    # the second phases start in the order of the first ones, on all workers alike
    for _ in range(MAX_PHASES):
        for exchange in pending:
            exchange.advance()
    for exchange in pending:
        exchange.result()
    return perf_counter() - begin


def main(channel_number: int, model_name: str) -> None:
    """Serve requests, one JSON line each, until the other end closes. Ends the process."""
    channel = socket.socket(fileno=channel_number)
    lines = channel.makefile("r")
    try:
        worker = Worker(model_name)
        for line in lines:
            request = json.loads(line)
            answer = getattr(worker, request.pop("do"))(**request)
            channel.sendall((json.dumps(answer) + "\n").encode())
    except Exception as error:
        failure = dataclasses.asdict(describe(error, int(os.environ["RANK"])))
        channel.sendall((json.dumps({"failure": failure}) + "\n").encode())
        sys.stderr.write(failure["traceback"])
        sys.stderr.flush()
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(1)
    os._exit(0)
