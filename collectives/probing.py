"""Measures a group: what each way of voting takes for small and large messages, on real votes."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lioncub.collectives.cost import rounds_pay
from lioncub.collectives.handshake import agreement
from lioncub.collectives.header import Header
from lioncub.collectives.profile import Point, Profile, fit_line
from lioncub.collectives.routes import Routes
from lioncub.collectives.traffic import candidates
from lioncub.collectives.transport import backend_of, check_carried, gather_objects, rank_of
from lioncub.collectives.vote import Voter
from lioncub.kernels import resolve_impl

MESSAGE_BYTES = (512, 2048, 8192, 32768, 131072, 524288, 2097152, 4194304)
# a ladder ends at the first vote that takes longer
SLOW_SECONDS = 1.0
# a message is voted on again and again for so long in each pass, but not more often than that
TURN_SECONDS, TURN_VOTES = 0.02, 5
LARGEST_PASSES = 20
# two points make a line; the third shows whether it is one
FEWEST_SIZES = 3
OnProgress = Callable[[float, str], None]


@dataclass
class _Ladder:
    """One algorithm on one level, and the times of its votes by message size."""

    level: str
    algorithm: str
    routes: Routes
    voters: dict[int, Voter] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)
    is_finished: bool = False

    def expected_seconds(self, n_bytes: int) -> float:
        """Time of a vote by that of the size below it, the same on all workers; 0 for the smallest."""
        smaller = max((size for size in self.times if size < n_bytes), default=None)
        return 0.0 if smaller is None else statistics.median(self.times[smaller]) * n_bytes / smaller


def probe(
    routes: Routes,
    *,
    seconds: float = 15.0,
    on_progress: OnProgress | None = None,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Profile:
    """Measure every algorithm on the group of ``routes`` and, where it has two levels, on each; a collective call.

    1. Every worker waits for all others, votes on a message, and notes the time from start to result; the time of a
    vote is the slowest worker's. 2. The first pass goes through all sizes, small ones first, and all algorithms. 3.
    Further passes repeat it while they fit into ``seconds``, so that a disturbance spoils few votes of each kind. 4.
    Medians are fitted. All workers take part in the same votes, since they decide by the same slowest times.

    Args:
        routes: the group.
        seconds: about how long it may take; the first pass is always completed for the smallest messages.
        on_progress: called on every worker with the fraction that is done and what is being measured.
        device: where messages are, e.g. "cuda:0"; the backend must be able to send from there.
        impl: implementation of the voting kernels.

    Returns:
        The profile, equal on all workers. Raises ValueError for a group of one worker.
    """
    if routes.workers < 2:
        raise ValueError(f"routes: expected a group of at least 2 workers, got {routes.workers}")
    with agreement(routes.group) as facts:
        if isinstance(seconds, bool) or not isinstance(seconds, float | int):
            raise TypeError(f"seconds: expected a number, got {type(seconds).__name__}")
        check_carried("device", torch.empty(0, dtype=torch.uint8, device=device), routes.group)
        resolve_impl(impl, torch.device(device))
        facts |= {"the nodes": routes.topology.nodes, "seconds": seconds, "the device type": torch.device(device).type}
    run = _Run(routes, seconds, on_progress, torch.device(device), impl)
    run.warm_up()
    run.first_pass()
    run.further_passes()
    return run.profile()


class _Run:
    def __init__(
        self, routes: Routes, seconds: float, on_progress: OnProgress | None, device: torch.device, impl: str
    ) -> None:
        self.routes, self.budget, self.device, self.impl = routes, seconds, device, impl
        self.on_progress = on_progress or (lambda fraction, what: None)
        self.started = time.perf_counter()
        self.ladders = [_Ladder("whole", name, routes) for name in candidates(routes.topology)]
        if routes.topology.is_two_level:
            for level, group in (("intra", routes.intra), ("inter", routes.inter)):
                alone = Routes.flat(group)
                self.ladders += [_Ladder(level, name, alone) for name in candidates(alone.topology)]
        self.elapsed = 0.0
        # this worker's own noise, so that no two agree by construction
        generator = torch.Generator().manual_seed(rank_of(None))
        n_bytes = MESSAGE_BYTES[-1]
        noise = torch.randint(256, (n_bytes,), dtype=torch.uint8, device="cpu", generator=generator)
        self.noise = noise.to(self.device)

    def warm_up(self) -> None:
        """Connections, compiled kernels: not measured."""
        for ladder in self.ladders:
            self._vote(ladder, MESSAGE_BYTES[0])
            self.started, self.elapsed = time.perf_counter(), 0.0

    def first_pass(self) -> None:
        """Every size of every ladder once, as far up as time allows."""
        for count, n_bytes in enumerate(MESSAGE_BYTES):
            for ladder in self.ladders:
                if ladder.is_finished or (count >= FEWEST_SIZES and self.elapsed > self.budget):
                    continue
                ladder.times[n_bytes] = self._turn(ladder, n_bytes, 1)
                ladder.is_finished = ladder.times[n_bytes][0] > SLOW_SECONDS

    def further_passes(self) -> None:
        """Repeat what the first pass measured, as often as the time allows."""
        lasted = self.elapsed
        for _ in range(LARGEST_PASSES - 1):
            if self.elapsed + lasted > self.budget:
                break
            began = self.elapsed
            for ladder in self.ladders:
                for n_bytes, times in ladder.times.items():
                    votes = min(TURN_VOTES, 1 + int(TURN_SECONDS / statistics.median(times)))
                    times += self._turn(ladder, n_bytes, votes)
            lasted = self.elapsed - began
        self.on_progress(1.0, "done")

    def _turn(self, ladder: _Ladder, n_bytes: int, votes: int) -> list[float]:
        """Seconds of votes on one size, one after the other."""
        # the first vote pays for memory that training, which repeats its sizes, has; in a slow one that is little
        first = self._vote(ladder, n_bytes)
        return [first] if first > SLOW_SECONDS / 4 else [self._vote(ladder, n_bytes) for _ in range(votes)]

    def _vote(self, ladder: _Ladder, n_bytes: int) -> float:
        """The slowest worker's seconds for one vote."""
        fraction = min(0.99, self.elapsed / self.budget) if self.budget > 0 else 0.99
        self.on_progress(fraction, f"{ladder.level} {ladder.algorithm} {n_bytes} bytes")
        if n_bytes not in ladder.voters:
            ladder.voters[n_bytes] = Voter(
                n_bytes,
                routes=ladder.routes,
                algorithm=ladder.algorithm,
                impl=self.impl,
                at_once=not rounds_pay(ladder.expected_seconds(n_bytes), ladder.routes.workers),
            )
        voter, packed = ladder.voters[n_bytes], self.noise[:n_bytes]
        # as an optimizer does before it encodes
        voter.expect(self.device)
        self._agree(0.0)
        began = time.perf_counter()
        voter.start(packed, Header()).result()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self._agree(time.perf_counter() - began)

    def _agree(self, seconds: float) -> float:
        """Wait for all workers; the largest of their numbers, and of the times since the start."""
        largest = torch.tensor([seconds, time.perf_counter() - self.started], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.routes.group)
        taken, self.elapsed = largest.tolist()
        return float(taken)

    def profile(self) -> Profile:
        """Medians, fitted; host names and the date are gathered."""
        topology = self.routes.topology
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        stated = gather_objects((socket.gethostname(), now), self.routes.group, self.device)
        fits = []
        for ladder in self.ladders:
            medians = {n_bytes: statistics.median(times) for n_bytes, times in ladder.times.items()}
            points = [Point(n, ladder.voters[n].bytes_sent, seconds) for n, seconds in medians.items()]
            fits.append(fit_line(ladder.level, ladder.algorithm, points))
        versions = {name: importlib.metadata.version(name) for name in ("lioncub", "torch")}
        return Profile(
            world_size=topology.workers,
            hosts=tuple(stated[ranks[0]][0] for ranks in topology.nodes),
            nodes=topology.nodes,
            backend=backend_of(self.routes.group, self.device.type),
            date=stated[0][1],
            versions={**versions, "python": platform.python_version()},
            fits=tuple(fits),
        )
