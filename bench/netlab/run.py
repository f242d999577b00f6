"""Runs the matrix: labs, workers, turns, and a journal of what they found."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from time import perf_counter

from netlab.check import check_links
from netlab.crew import Crew
from netlab.lab import Lab, run
from netlab.matrix import (
    CHECK_SECONDS,
    MODELS,
    PROBE_SECONDS,
    Choice,
    Session,
    Turn,
    methods_of,
    rates_of,
    sessions_of,
    start_seconds,
    turns_of,
)
from netlab.names import ALGORITHM_OF, OVERLAP
from netlab.rates import rate_name
from netlab.records import Journal

JOURNAL_NAME, LOG_NAME = "records.jsonl", "workers.log"
# warm-up steps are not measured, and need not wait for a slow link
WARM_UP_RATE = 10**10
BARRIERS = 20
IDENTICAL_STEPS = 5
PACKAGES = ("torch", "numba", "numpy", "lion-pytorch")

# seconds that were estimated for what is done now, and what comes next
OnProgress = Callable[[float, str], None]


def run_matrix(choice: Choice, folder: Path, on_progress: OnProgress) -> None:
    """Measure all that ``choice`` says and write it to the journal in ``folder``.

    Raises LabError where the lab cannot be built or is not as fast as asked, WorkerFailedError where a worker fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_NAME).write_bytes(b"")
    journal = Journal(folder / JOURNAL_NAME)
    try:
        journal.write("environment", **environment())
        run = _Run(choice, folder, journal, on_progress)
        for _, sessions in groupby(sessions_of(choice), key=lambda session: (session.hosts, session.per_host)):
            run.lab_of(list(sessions))
        journal.write("end", date=_now())
    finally:
        journal.close()


def environment() -> dict[str, object]:
    """The machine and the versions of what runs on it."""
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": _now(),
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("lioncub", *PACKAGES)},
        "iperf3": run(["iperf3", "--version"]).split()[1],
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class _Run:
    def __init__(self, choice: Choice, folder: Path, journal: Journal, on_progress: OnProgress) -> None:
        self.choice, self.folder, self.journal, self.on_progress = choice, folder, journal, on_progress
        # profiles that were measured in this run, not in an earlier one
        self.profiles: set[Path] = set()

    def lab_of(self, sessions: list[Session]) -> None:
        """All sessions on one lab, whose links are checked at every rate first."""
        first = sessions[0]
        rates = rates_of(self.choice, first)
        with Lab(first.hosts, rates[0], first.per_host) as lab:
            for rate in rates:
                self.on_progress(0, f"{first.hosts} hosts, {rate_name(rate)}: checking links")
                lab.set_rate(rate)
                for speed in check_links(lab):
                    facts = dataclasses.asdict(speed)
                    self.journal.write("link", hosts=first.hosts, per_host=first.per_host, **facts)
                self.on_progress(CHECK_SECONDS * first.hosts, "")
            for session in sessions:
                lab.set_rate(WARM_UP_RATE)
                self.on_progress(0, f"{session.workers} workers, {session.model}: starting")
                with Crew(lab, session.model, self.folder / LOG_NAME) as crew:
                    self._session(session, lab, crew)

    def _session(self, session: Session, lab: Lab, crew: Crew) -> None:
        methods, facts = methods_of(self.choice, session), dataclasses.asdict(session)
        crew.ask("warm_up", methods=methods)
        barrier = crew.ask("barriers", count=BARRIERS)
        self.journal.write("session", **facts, parameters=MODELS[session.model].parameters, barrier=barrier)
        self.on_progress(start_seconds(session), "")
        profile = None
        for turn in turns_of(self.choice, session):
            if lab.rate != turn.rate or profile is None:
                lab.set_rate(turn.rate)
                profile = self._profile(session, turn.rate, crew)
            self.on_progress(0, f"{session.workers} workers, {session.model}, {rate_name(turn.rate)}: {turn.method}")
            self._turn(turn, profile, crew)
            self.on_progress(turn.seconds, "")
        if session.per_host > 1:
            self._compare(methods, facts, crew)
        peaks = [answer["peak_bytes"] for answer in crew.ask("memory")]
        self.journal.write("memory", **facts, peak_bytes=peaks)

    def _profile(self, session: Session, rate: int, crew: Crew) -> Path:
        """The profile of these hosts at this rate, measured when it is first asked for; it knows no model."""
        path = self.folder / f"profile-{session.hosts}x{session.per_host}-{rate}.json"
        if path not in self.profiles:
            self.on_progress(0, f"{session.workers} workers, {rate_name(rate)}: probing")
            crew.ask("probe", seconds=PROBE_SECONDS, path=str(path))
            self.profiles.add(path)
            self.on_progress(PROBE_SECONDS, "")
        return path

    def _turn(self, turn: Turn, profile: Path, crew: Crew) -> None:
        begin = perf_counter()
        counts = {"untimed": turn.untimed, "steps": turn.steps, "alone": turn.alone}
        workers = crew.ask("measure", method=turn.method, **counts, profile=str(profile))
        self.journal.write(
            "turn",
            **dataclasses.asdict(turn.session),
            rate=turn.rate,
            repetition=turn.repetition,
            method=turn.method,
            seconds=perf_counter() - begin,
            estimate=turn.seconds,
            workers=workers,
        )

    def _compare(self, methods: Sequence[str], facts: dict[str, object], crew: Crew) -> None:
        """Parameters after some steps of every algorithm: all must come to the same bits on all workers."""
        for method in methods:
            if method in ALGORITHM_OF and not method.endswith(OVERLAP):
                answers = crew.ask("digest", method=method, steps=IDENTICAL_STEPS)
                digests = [answer["digest"] for answer in answers]
                self.journal.write("digest", **facts, method=method, steps=IDENTICAL_STEPS, digests=digests)
