"""What runs when: rates, workers, models and methods, in the order of their measurement, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lioncub.collectives import bytes_sent
from lioncub.collectives.topology import Topology
from netlab.names import ALGORITHM_OF, COMPARED, FLOOR, OVERLAP, TWO_LEVEL

CONTEXT = 64
VOCABULARY = 256
# repetitions of the cells that decide, those of 4 workers, and of the others
DECIDING_WORKERS, DECIDING_REPETITIONS, OTHER_REPETITIONS, TWO_LEVEL_REPETITIONS = 4, 5, 2, 2
# a repetition takes steps for about this long, and this many at most
REPETITION_SECONDS, MAX_STEPS = 1.0, 4
# exchanges with nothing else going on, per repetition
ALONE_STEPS = 2
# only for the estimates: one parameter's forward, backward and update, and a start of all workers
SECONDS_PER_PARAMETER, CORES = 9e-9, 2
START_SECONDS, START_SECONDS_PER_PARAMETER, CHECK_SECONDS = 10.0, 4e-7, 2.2
# given to the probe whose profile the automatic choice is made from, for each number of hosts and rate
PROBE_SECONDS = 15.0


@dataclass(frozen=True)
class Model:
    """A GPT of bench/demo over bytes."""

    layers: int
    width: int
    heads: int

    @property
    def parameters(self) -> int:
        """Elements, the matrix that embeds and predicts counted once."""
        return (VOCABULARY + CONTEXT + 1) * self.width + self.layers * (12 * self.width**2 + 2 * self.width)


MODELS = {"10M": Model(layers=8, width=320, heads=8), "25M": Model(layers=8, width=512, heads=8)}


@dataclass(frozen=True)
class Session:
    """Worker processes that stay up: hosts, workers on each, and the model that all of them hold."""

    hosts: int
    per_host: int
    model: str

    @property
    def workers(self) -> int:
        """All of them."""
        return self.hosts * self.per_host


@dataclass(frozen=True)
class Turn:
    """One repetition of one method: untimed steps, timed steps, exchanges alone (the bare one and a whole step)."""

    session: Session
    rate: int
    repetition: int
    method: str
    untimed: int
    steps: int
    alone: int

    @property
    def seconds(self) -> float:
        """An estimate."""
        step = step_seconds(self.method, self.session, self.rate)
        exchange = wire_seconds(self.method, self.session, self.rate)
        return (self.untimed + self.steps) * step + 2 * self.alone * (exchange + 0.03) + 0.2


@dataclass(frozen=True)
class Choice:
    """What of the whole matrix is run; rates in bits per second."""

    rates: tuple[int, ...] = (10**8, 10**9, 10**10)
    workers: tuple[int, ...] = (4, 2, 8)
    models: tuple[str, ...] = tuple(MODELS)
    methods: tuple[str, ...] = COMPARED
    repetitions: int | None = None
    two_level: bool = True
    two_level_rates: tuple[int, ...] = field(default=(10**8, 10**9))

    def __post_init__(self) -> None:
        for name, values, allowed in (("models", self.models, tuple(MODELS)), ("methods", self.methods, COMPARED)):
            unknown = [value for value in values if value not in allowed]
            if unknown or not values:
                raise ValueError(f"{name}: expected some of {', '.join(allowed)}, got {', '.join(unknown) or 'none'}")
        if not self.workers or not all(2 <= count <= 64 for count in self.workers):
            raise ValueError(f"workers: expected numbers from 2 to 64, got {self.workers}")
        if not self.rates:
            raise ValueError("rates: expected at least one, got none")
        if self.repetitions is not None and self.repetitions < 1:
            raise ValueError(f"repetitions: expected at least 1, got {self.repetitions}")

    def repetitions_of(self, session: Session) -> int:
        """How often each method takes its turn."""
        if self.repetitions is not None:
            return self.repetitions
        if session.per_host > 1:
            return TWO_LEVEL_REPETITIONS
        return DECIDING_REPETITIONS if session.workers == DECIDING_WORKERS else OTHER_REPETITIONS


def wire_bytes(method: str, session: Session) -> float:
    """Bytes that a worker sends in a step, small headers left out; PowerSGD's are an estimate."""
    workers, parameters = session.workers, MODELS[session.model].parameters
    ring = 2 * (workers - 1) / workers
    per_parameter = {FLOOR: 0.0, "ddp_bf16": 2 * ring, "ddp_powersgd": 0.1 * ring, "int8_vote": ring}
    algorithm = ALGORITHM_OF.get(method)
    if algorithm is None:
        return parameters * per_parameter.get(method, 4 * ring)
    topology = Topology.even(session.hosts, session.per_host)
    return bytes_sent("reduce_scatter" if algorithm == "auto" else algorithm, parameters // 8, topology)


def wire_seconds(method: str, session: Session, rate: int) -> float:
    """The time that these bytes take on a link of ``rate`` bits per second, which a host's workers share."""
    return 8 * wire_bytes(method, session) * session.per_host / rate


def step_seconds(method: str, session: Session, rate: int) -> float:
    """An estimate of a step, for the progress display and the number of steps in a repetition."""
    compute = SECONDS_PER_PARAMETER * MODELS[session.model].parameters * max(1.0, session.workers / CORES)
    return compute + 1.05 * wire_seconds(method, session, rate) + 0.005 * session.workers


def turn_of(session: Session, rate: int, repetition: int, method: str) -> Turn:
    """A turn with as many steps as its length allows."""
    estimate = step_seconds(method, session, rate)
    steps = min(max(1, round(REPETITION_SECONDS / estimate)), MAX_STEPS)
    if method in ALGORITHM_OF:
        overlap = method.endswith(OVERLAP)
        alone = 0 if overlap or session.per_host > 1 else ALONE_STEPS
        # a new optimizer compares replicas in its first step, and learns with overlap what it sends early in the second
        return Turn(session, rate, repetition, method, 2 if overlap else 1, steps, alone)
    return Turn(session, rate, repetition, method, 1 if estimate < REPETITION_SECONDS else 0, steps, 0)


def sessions_of(choice: Choice) -> list[Session]:
    """The deciding ones first."""
    flat = [Session(workers, 1, model) for workers in choice.workers for model in choice.models]
    flat.sort(key=lambda session: session.workers != DECIDING_WORKERS)
    two_level = [Session(2, 4, choice.models[0])] if choice.two_level else []
    first = [session for session in flat if session.workers == DECIDING_WORKERS]
    return first + two_level + flat[len(first) :]


def methods_of(choice: Choice, session: Session) -> tuple[str, ...]:
    """Two levels are for the algorithms, a flat lab for what is worth comparing there."""
    if session.per_host > 1:
        return TWO_LEVEL
    return choice.methods


def rates_of(choice: Choice, session: Session) -> tuple[int, ...]:
    """Two levels are for a slow link between the hosts."""
    return choice.two_level_rates if session.per_host > 1 else choice.rates


def start_seconds(session: Session) -> float:
    """An estimate for starting workers and warming up, on few cores."""
    return START_SECONDS + START_SECONDS_PER_PARAMETER * MODELS[session.model].parameters * session.workers


def turns_of(choice: Choice, session: Session) -> Iterator[Turn]:
    """All turns of a session, rate by rate, methods interleaved repetition by repetition.

    Every repetition starts with another method, so that none always follows the same one.
    """
    methods = methods_of(choice, session)
    for rate in rates_of(choice, session):
        for repetition in range(choice.repetitions_of(session)):
            for method in rotated(methods, repetition):
                yield turn_of(session, rate, repetition, method)


def rotated(methods: Sequence[str], by: int) -> list[str]:
    """The same in a circle, from another beginning."""
    start = by * max(1, len(methods) // DECIDING_REPETITIONS) % len(methods)
    return [*methods[start:], *methods[:start]]


def total_seconds(choice: Choice) -> float:
    """An estimate of the whole run."""
    sessions = sessions_of(choice)
    labs = {(session.hosts, session.per_host): rates_of(choice, session) for session in sessions}
    checks = sum(CHECK_SECONDS * hosts * len(rates) for (hosts, _), rates in labs.items())
    checks += sum(PROBE_SECONDS * len(rates) for rates in labs.values())
    starts = math.fsum(start_seconds(session) for session in sessions)
    return checks + starts + math.fsum(turn.seconds for session in sessions for turn in turns_of(choice, session))
