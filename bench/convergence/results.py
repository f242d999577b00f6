"""What the finished runs say: the learning rate of each method, and losses by cell and seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convergence.methods import METHODS, REFERENCE
from convergence.statistics import Interval, relative_difference, t_interval
from convergence.store import Record, Store
from convergence.tasks import TASKS
from convergence.training import Config

# of the task's rate; AdamW steps are as long as its rate only at first
FACTORS = (0.5, 1.0, 2.0)
ADAMW_FACTOR = 4.0
# seeds by number of workers
LR_SEEDS = {4: 2, 16: 1}


@dataclass(frozen=True, order=True)
class Cell:
    """Where methods are compared: all runs of a cell and a seed see the same data."""

    task: str
    shards: str
    workers: int
    batch: int

    def config(self, method: str, lr: float, seed: int) -> Config:
        """A run in this cell."""
        steps = TASKS[self.task].steps
        return Config(self.task, method, lr, self.workers, self.shards, self.batch, seed, steps)


def cell_of(task: str, shards: str, workers: int, batches: int = 1) -> Cell:
    """A cell with ``batches`` times the task's examples per worker and step."""
    return Cell(task, shards, workers, TASKS[task].batch * batches)


def grid(task: str, family: str) -> list[float]:
    """Learning rates that a family of methods is tried with; the middle one is the default."""
    middle = TASKS[task].lr * (ADAMW_FACTOR if METHODS[family].adamw else 1.0)
    return [float(f"{middle * factor:.4g}") for factor in FACTORS]


def families() -> list[str]:
    """Methods whose learning rates are tuned, the reference first."""
    return list(dict.fromkeys(method.family for method in METHODS.values()))


def grid_configs(task: str, family: str, lr: float) -> list[Config]:
    """The runs that say how good a learning rate is."""
    cells = [cell_of(task, "iid", workers) for workers in LR_SEEDS]
    return [cell.config(family, lr, seed) for cell in cells for seed in range(LR_SEEDS[cell.workers])]


class Results:
    """A store, asked in terms of methods and cells."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # what follows from the store as it was at a version
        self._version = -1
        self._rates: dict[tuple[str, str], float] = {}
        self._known_seeds: list[int] = []

    def lr_of(self, task: str, method: str) -> float:
        """The learning rate of a method on a task.

        Of its family's grid, that with the least mean of log losses over the grid's runs; but the reference's multiple
        of the default (for the reference: the default) where that is not worse by more than one standard error of the
        paired differences. Until all runs of the grid are there: that multiple itself.
        """
        family = METHODS[method].family
        self._refresh()
        if (task, family) not in self._rates:
            self._rates[task, family] = self._best_rate(task, family)
        return self._rates[task, family]

    def _best_rate(self, task: str, family: str) -> float:
        rates = grid(task, family)
        preferred = len(FACTORS) // 2
        if family != REFERENCE:
            preferred = grid(task, REFERENCE).index(self.lr_of(task, REFERENCE))
        losses = [self._log_losses(task, family, lr) for lr in rates]
        known = [values for values in losses if values is not None]
        if len(known) < len(rates):
            return rates[preferred]
        best = min(range(len(rates)), key=lambda i: math.fsum(known[i]))
        worse = [a - b for a, b in zip(known[preferred], known[best], strict=True)]
        return rates[preferred] if math.fsum(worse) / len(worse) <= standard_error(worse) else rates[best]

    def is_at_edge(self, task: str, method: str) -> bool:
        """Whether the rate is the least or greatest of its grid, so that a better one may lie outside."""
        rates = grid(task, METHODS[method].family)
        return self.lr_of(task, method) in (rates[0], rates[-1])

    def config(self, cell: Cell, method: str, seed: int) -> Config:
        """The run of a method at its own learning rate."""
        return cell.config(method, self.lr_of(cell.task, method), seed)

    def runs(self, cell: Cell, method: str) -> dict[int, Record]:
        """Finished runs at the method's learning rate, by seed."""
        lr = self.lr_of(cell.task, method)
        found = {seed: self.store.find(cell.config(method, lr, seed)) for seed in self._seeds()}
        return {seed: record for seed, record in found.items() if record is not None}

    def losses(self, cell: Cell, *methods: str) -> list[list[float]]:
        """Final losses of each method, by the seeds that all of them have; those that diverged are infinite."""
        runs = [self.runs(cell, method) for method in methods]
        seeds = sorted(set.intersection(*(set(found) for found in runs)))
        return [[final_loss(found[seed]) for seed in seeds] for found in runs]

    def difference(self, cell: Cell, method: str, other: str = REFERENCE) -> Interval | None:
        """Of the method's loss relative to another's, over paired seeds; None without one, or where a run diverged."""
        mine, others = self.losses(cell, method, other)
        if not mine or not all(map(math.isfinite, [*mine, *others])):
            return None
        return relative_difference(mine, others)

    def loss(self, cell: Cell, method: str) -> Interval | None:
        """Of the method alone, over all of its seeds."""
        (losses,) = self.losses(cell, method)
        return t_interval(losses) if losses and all(map(math.isfinite, losses)) else None

    def bytes_ratio(self, cell: Cell, method: str) -> float | None:
        """fp32 all-reduce's bytes over the method's; None without a run."""
        runs = list(self.runs(cell, method).values())
        return runs[0]["fp32_bytes_per_step"] / runs[0]["bytes_per_step"] if runs else None

    def cells(self) -> list[Cell]:
        """All that have a run, in order."""
        found = {Cell(c["task"], c["shards"], c["workers"], c["batch"]) for c in self._configs()}
        return sorted(found)

    def _configs(self) -> Sequence[Record]:
        return [record["config"] for record in self.store.records()]

    def _seeds(self) -> list[int]:
        self._refresh()
        return self._known_seeds

    def _refresh(self) -> None:
        if self._version != self.store.version:
            self._version, self._rates = self.store.version, {}
            self._known_seeds = sorted({config["seed"] for config in self._configs()})

    def _log_losses(self, task: str, family: str, lr: float) -> list[float] | None:
        records = [self.store.find(config) for config in grid_configs(task, family, lr)]
        known = [record for record in records if record is not None]
        return [math.log(final_loss(record)) for record in known] if len(known) == len(records) else None


def final_loss(record: Record) -> float:
    """Of the whole validation set after the last step; infinite where it is not a number."""
    loss = float(record["final_loss"])
    return loss if math.isfinite(loss) else math.inf


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for one value, infinite where a value is not finite."""
    if len(values) < 2:
        return 0.0
    if not all(map(math.isfinite, values)):
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
