"""Measure a group: the two links of the cost model, fitted to the times of real votes, stored as a profile."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lioncub.collectives.agreement import agreement
from lioncub.collectives.cost import Costs, Link, candidates, default_costs, rounds_pay
from lioncub.collectives.groups import ProcessGroups, Topology
from lioncub.collectives.profile import Point, Profile
from lioncub.collectives.transport import backend_of, check_carried, gather_objects, losing, rank_of
from lioncub.collectives.vote import Voter
from lioncub.kernels import resolve_impl

MESSAGE_BYTES = (512, 4096, 32768, 262144, 2097152)
# what `measure_costs` tries: the larger ones while the time lasts
QUICK_BYTES = (1024, 32768, 524288)
# two sizes make a line
FEWEST_SIZES = 2
MOST_PASSES = 20
OnProgress = Callable[[float, str], None]


def probe(
    groups: ProcessGroups,
    *,
    seconds: float = 15.0,
    on_progress: OnProgress | None = None,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> Profile:
    """Measure every algorithm on a group and, where it has two levels, on each; a collective.

    1. Every rank waits for all others, votes on a message, and notes the time from start to result; the time of a vote
    is the slowest rank's. 2. The first pass goes through all sizes, small ones first, and all algorithms. 3. Further
    passes repeat it while they fit into ``seconds``, so that a disturbance spoils few votes of each kind. 4. The links
    are fitted to the medians. All ranks take part in the same votes, since they decide by the same slowest times.

    Args:
        groups: the process groups.
        seconds: about how long it may take; the first pass is always completed for the smallest messages.
        on_progress: called on every rank with the fraction that is done and the vote that is measured.
        device: where messages are, e.g. "cuda:0"; the backend must be able to send from there.
        impl: implementation of the voting kernels.

    Returns:
        The profile, equal on all ranks. Raises ValueError for a group of one rank.
    """
    if groups.workers < 2:
        raise ValueError(f"groups: expected a group of at least 2 workers, got {groups.workers}")
    device = torch.device(device)
    with agreement(groups.group) as fingerprint:
        if isinstance(seconds, bool) or not isinstance(seconds, float | int):
            raise TypeError(f"seconds: expected a number, got {type(seconds).__name__}")
        check_carried("device", torch.empty(0, dtype=torch.uint8, device=device), groups.group)
        resolve_impl(impl, device)
        fingerprint |= {"the nodes": groups.topology.nodes, "seconds": seconds, "the device type": device.type}
    run = _Run(groups, seconds, on_progress, device, impl, MESSAGE_BYTES, candidates(groups.topology))
    run.measure()
    topology, points = groups.topology, run.points()
    inter, intra, error = fit_links(topology, points, default_costs(topology, "gloo"))
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    stated = gather_objects((socket.gethostname(), now), groups.group, device)
    versions = {name: importlib.metadata.version(name) for name in ("lioncub", "torch")}
    return Profile(
        world_size=topology.workers,
        hosts=tuple(stated[ranks[0]][0] for ranks in topology.nodes),
        nodes=topology.nodes,
        backend=backend_of(groups.group, device.type),
        date=stated[0][1],
        versions={**versions, "python": platform.python_version()},
        inter=inter,
        intra=intra,
        error=error,
        points=tuple(points),
    )


def measure_costs(groups: ProcessGroups, device: torch.device, impl: str = "auto", seconds: float = 0.4) -> Costs:
    """Measure the two links of a group in at most about half a second; a collective of ranks that have agreed to it.

    All-gathers and reduce-scatters of two or three sizes; the result is the same on all ranks.
    """
    run = _Run(groups, seconds, None, device, impl, QUICK_BYTES, ("all_gather", "reduce_scatter"))
    run.measure()
    topology, points = groups.topology, run.points()
    inter, intra, error = fit_links(topology, points, default_costs(topology, backend_of(groups.group, device.type)))
    source = f"measured at construction: {inter} between nodes"
    if topology.n_nodes < topology.workers:
        source += f"; {intra} inside"
    return Costs(topology, inter, intra, source, error)


def fit_links(topology: Topology, points: Sequence[Point], default: Costs) -> tuple[Link, Link, float]:
    """Fit (between nodes, inside a node) by least squares of relative errors, and return the fit's relative error.

    A link that no point is about is that of ``default``.
    """
    inter, intra = default.inter, default.intra
    two_levels = {point.level for point in points} > {"whole"}
    if two_levels:
        local = topology.local_size
        intra = _fit(Topology.even(1, local), [p for p in points if p.level == "intra"])
        alone = _fit(Topology.flat(topology.n_nodes), [p for p in points if p.level == "inter"])
        # all places of a node shared its link
        inter = Link(alone.latency_s, alone.bytes_per_s * local)
    elif topology.n_nodes == 1:
        intra = _fit(topology, points)
    else:
        inter = _fit(topology, points, intra)
    fitted = Costs(topology, inter, intra)
    whole = [point for point in points if point.level == "whole"]
    errors = [fitted.seconds(point.algorithm, point.n_bytes) / point.seconds - 1 for point in whole]
    return inter, intra, (sum(error**2 for error in errors) / len(errors)) ** 0.5


def _fit(topology: Topology, points: Sequence[Point], intra: Link | None = None) -> Link:
    """Fit the one link that these points are about, that of ``topology`` between or inside nodes."""

    def costs(latency_s: float, bytes_per_s: float) -> Costs:
        link = Link(latency_s, bytes_per_s)
        return Costs(topology, link, intra or link)

    rows = []
    for point in points:
        # the model is linear in the latency and in the seconds per byte
        transfer = costs(0.0, 1.0).seconds(point.algorithm, point.n_bytes)
        rounds = costs(1.0, 1.0).seconds(point.algorithm, point.n_bytes) - transfer
        rows.append((rounds / point.seconds, transfer / point.seconds))
    aa, ab, bb = (sum(x[i] * x[j] for x in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] for x in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    lines = [(0.0, b / bb)]
    # as good as equal sizes leave the slope open
    if determinant > 1e-12 * aa * bb:
        lines.append(((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant))
    if aa > 0:
        # so fast that nothing is seen of it
        lines.append((a / aa, 1e-15))
    latency, per_byte = min(
        (line for line in lines if line[0] >= 0 and line[1] > 0),
        key=lambda line: sum((line[0] * x + line[1] * y - 1) ** 2 for x, y in rows),
    )
    return Link(latency, 1 / per_byte)


@dataclass
class _Ladder:
    """One algorithm on one level, and the times of its votes by message size."""

    level: str
    algorithm: str
    groups: ProcessGroups
    voters: dict[int, Voter] = field(default_factory=dict)
    times: dict[int, list[float]] = field(default_factory=dict)

    def expected_seconds(self, n_bytes: int) -> float:
        """Estimate a vote by that of the size below it, the same on all ranks; 0 for the smallest."""
        smaller = max((size for size in self.times if size < n_bytes), default=None)
        return 0.0 if smaller is None else statistics.median(self.times[smaller]) * n_bytes / smaller


class _Run:
    def __init__(
        self,
        groups: ProcessGroups,
        seconds: float,
        on_progress: OnProgress | None,
        device: torch.device,
        impl: str,
        sizes: Sequence[int],
        algorithms: Sequence[str],
    ) -> None:
        self._groups, self._budget, self._device, self._impl, self._sizes = groups, seconds, device, impl, sizes
        self._on_progress = on_progress or (lambda fraction, name: None)
        self._ladders = [_Ladder("whole", name, groups) for name in algorithms]
        if groups.topology.is_two_level:
            for level, group in (("intra", groups.intra), ("inter", groups.inter)):
                alone = ProcessGroups.flat(group)
                self._ladders += [_Ladder(level, name, alone) for name in algorithms if name != "hierarchical"]
        self._started, self._elapsed = time.perf_counter(), 0.0
        # this rank's own noise, so that no two agree by construction
        generator = torch.Generator().manual_seed(rank_of(groups.group))
        noise = torch.randint(256, (sizes[-1],), dtype=torch.uint8, device="cpu", generator=generator)
        self._noise = noise.to(device)

    def measure(self) -> None:
        """Vote on every size, once and then again while the time lasts."""
        # connections and compiled kernels are not measured
        on_progress, self._on_progress = self._on_progress, lambda fraction, name: None
        for ladder in self._ladders:
            self._vote(ladder, self._sizes[0])
        self._on_progress = on_progress
        self._started, self._elapsed = time.perf_counter(), 0.0
        for count, n_bytes in enumerate(self._sizes):
            for ladder in self._ladders:
                late = self._elapsed + 2 * ladder.expected_seconds(n_bytes) > self._budget
                if count < FEWEST_SIZES or not late:
                    # the first vote pays for memory that training, which repeats its sizes, has
                    first = self._vote(ladder, n_bytes)
                    is_long = first > self._budget / 8
                    ladder.times[n_bytes] = [first if is_long else self._vote(ladder, n_bytes)]
        lasted = self._elapsed
        for _ in range(MOST_PASSES):
            if self._elapsed + lasted > self._budget:
                break
            for ladder in self._ladders:
                for n_bytes, times in ladder.times.items():
                    times.append(self._vote(ladder, n_bytes))
        self._on_progress(1.0, "done")

    def points(self) -> list[Point]:
        """Return the medians."""
        return [
            Point(ladder.level, ladder.algorithm, n_bytes, statistics.median(times))
            for ladder in self._ladders
            for n_bytes, times in ladder.times.items()
        ]

    def _vote(self, ladder: _Ladder, n_bytes: int) -> float:
        """Return the slowest rank's seconds for one vote."""
        fraction = min(0.99, self._elapsed / self._budget) if self._budget > 0 else 0.99
        self._on_progress(fraction, f"{ladder.level} {ladder.algorithm} {n_bytes} bytes")
        if n_bytes not in ladder.voters:
            ladder.voters[n_bytes] = Voter(
                n_bytes,
                groups=ladder.groups,
                device=self._device,
                algorithm=ladder.algorithm,
                impl=self._impl,
                eager=not rounds_pay(ladder.expected_seconds(n_bytes), ladder.groups.workers),
            )
        voter = ladder.voters[n_bytes]
        # as an optimizer does before it encodes
        voter.expect()
        self._slowest(0.0)
        began = time.perf_counter()
        voter.start(self._noise[:n_bytes], 0).result()
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._slowest(time.perf_counter() - began)

    def _slowest(self, seconds: float) -> float:
        """Wait for all ranks; return the largest of their numbers, and note that of the times since the start."""
        largest = torch.tensor([seconds, time.perf_counter() - self._started], dtype=torch.float64, device=self._device)
        with losing(self._groups.group):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._groups.group)
        taken, self._elapsed = largest.tolist()
        return max(float(taken), 1e-9)
