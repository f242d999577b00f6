"""Carries out stages: on processes side by side, resumable, within a time budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median

from convergence.pool import Pool
from convergence.results import Results
from convergence.stages import Stage
from convergence.store import Store, missing, stamped
from convergence.training import Config, run

# seconds of a step on one core: by worker, and more by worker whose votes are simulated
SECONDS_PER_WORKER = {"text": 6e-3, "digits": 4.7e-3}
VOTE_SECONDS = 3e-3


class Pace:
    """Expected seconds of runs: as measured in the store, else from constants."""

    def __init__(self, store: Store) -> None:
        self._measured: dict[tuple[object, ...], list[float]] = {}
        for record in store.records():
            self._measured.setdefault(_kind(Config(**record["config"])), []).append(record["seconds"])

    def seconds(self, config: Config) -> float:
        """Of one run on one core."""
        known = self._measured.get(_kind(config))
        if known:
            return median(known)
        votes = 0.0 if config.method in ("Lion", "AdamW") else VOTE_SECONDS
        return config.steps * config.workers * (SECONDS_PER_WORKER[config.task] + votes)


def _kind(config: Config) -> tuple[object, ...]:
    return config.task, config.workers, config.batch, config.method in ("Lion", "AdamW"), "auto" in config.method


def stamped_run(config: Config) -> dict[str, object]:
    """A run as it is stored."""
    return stamped(run, config)


def carry_out(
    stages: Sequence[Stage],
    store: Store,
    *,
    jobs: int,
    hours: float | None,
    on_progress: Callable[[float, str], None],
    function: Callable[[Config], dict[str, object]] = stamped_run,
) -> bool:
    """Run what the stages want and the store does not have; gives whether all of it is there at the end.

    A stage is asked again until it wants nothing new. No run is begun that is expected to end after ``hours``.
    ``on_progress`` gets the expected seconds of a run that has ended, and what it was.
    """
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    results = Results(store)
    if not any(missing(store, stage(results, False)) for stage in stages):
        return True
    with Pool(jobs, function) as pool:
        for stage in stages:
            while wanted := missing(store, stage(results, False)):
                pace = Pace(store)
                begun = Begun(wanted, pace, deadline)
                for config, record in pool.results(begun):
                    store.add(config, record)
                    on_progress(pace.seconds(config), describe(config))
                if begun.was_cut:
                    return False
    return True


class Begun:
    """Runs as long as there is time."""

    def __init__(self, wanted: Sequence[Config], pace: Pace, deadline: float | None) -> None:
        self._wanted, self._pace, self._deadline = wanted, pace, deadline
        self.was_cut = False

    def __iter__(self) -> Iterator[Config]:
        for config in self._wanted:
            if self._deadline is not None and time.monotonic() + self._pace.seconds(config) > self._deadline:
                self.was_cut = True
                return
            yield config


def describe(config: Config) -> str:
    """A run in a line."""
    return (
        f"{config.task} {config.shards}, {config.workers} workers, {config.method}, "
        f"lr {config.lr:g}, seed {config.seed}"
    )


def plan(stages: dict[str, Stage], store: Store, jobs: int) -> list[tuple[str, int, int, float]]:
    """(stage, runs at most, those missing, hours that these take) of each; runs of earlier stages are not counted."""
    results, pace, seen = Results(store), Pace(store), set[Config]()
    rows = []
    for name, stage in stages.items():
        wanted = [config for config in dict.fromkeys(stage(results, True)) if config not in seen]
        seen.update(wanted)
        left = missing(store, wanted)
        rows.append((name, len(wanted), len(left), sum(map(pace.seconds, left)) / jobs / 3600))
    return rows
