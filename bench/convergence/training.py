"""One run: a method on a task, with its curves, bytes and diagnostics."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convergence.methods import METHODS, Method
from convergence.tasks import TASKS
from lioncub import Lion, LionCub
from lioncub.collectives.cost import ring_all_reduce_bytes
from lioncub.simulate import Workers

BETAS = (0.9, 0.99)
WEIGHT_DECAY = 0.1
WARM_UP_STEPS = 20
LOOK_EVERY = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """All that a run is a function of."""

    task: str
    method: str
    lr: float
    workers: int
    shards: str
    batch: int
    seed: int
    steps: int


def run(config: Config) -> dict[str, Any]:
    """Train; gives losses, bytes per step and worker, and what was seen on the way."""
    began = time.perf_counter()
    task, method = TASKS[config.task], METHODS[config.method]
    model = task.model(config.seed)
    train = _Averaged if method.compression is None else _Voting
    curve, training, seen = [], [], []
    with torch.random.fork_rng(devices=[]), train(model, method, config) as way:
        for step in range(config.steps):
            way.set_lr(config.lr * _schedule(step, config.steps))
            losses = []
            for rank in range(config.workers):
                batch = task.batch_of(config.seed, config.shards, config.workers, config.batch, rank, step)
                loss = task.loss(model, batch)
                loss.backward()
                way.collect(rank)
                losses.append(float(loss.detach()))
            is_looked_at = (step + 1) % LOOK_EVERY == 0 or step + 1 == config.steps
            found = way.step(look=is_looked_at, kind_of=task.kind_of)
            if is_looked_at:
                training.append([step + 1, sum(losses) / len(losses)])
                curve.append([step + 1, task.validation_loss(model, thorough=False)])
                seen.append({"step": step + 1, **found})
        parameters = sum(p.numel() for p in model.parameters())
        return {
            "config": dataclasses.asdict(config),
            "final_loss": task.validation_loss(model, thorough=True),
            "validation": curve,
            "training": training,
            "parameters": parameters,
            "bytes_per_step": way.bytes_sent / config.steps,
            "fp32_bytes_per_step": ring_all_reduce_bytes(parameters, config.workers),
            "seen": seen,
            "seconds": time.perf_counter() - began,
        }


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / (steps - WARM_UP_STEPS)))


class _Averaged:
    """Gradients averaged in full precision, in rank order, and one optimizer."""

    def __init__(self, model: nn.Module, method: Method, config: Config) -> None:
        self._params, self._workers = list(model.parameters()), config.workers
        self._optimizer: torch.optim.Optimizer
        if method.adamw:
            self._optimizer = torch.optim.AdamW(self._params, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY)
        else:
            self._optimizer = Lion(self._params, betas=BETAS, weight_decay=WEIGHT_DECAY)
        self._steps = 0
        self.bytes_sent = 0

    def __enter__(self) -> _Averaged:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_lr(self, lr: float) -> None:
        """For the step to come."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def collect(self, rank: int) -> None:
        """Take a worker's gradients: backward has added them to those before."""

    def step(self, *, look: bool, kind_of: Callable[[str], str]) -> dict[str, Any]:
        """Average and step; nothing to look at."""
        for p in self._params:
            assert p.grad is not None
            p.grad /= self._workers
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.bytes_sent += ring_all_reduce_bytes(sum(p.numel() for p in self._params), self._workers)
        return {}


class _Voting:
    """A LionCub for every worker. Gradients are computed on the first one's parameters, since all have the same."""

    def __init__(self, model: nn.Module, method: Method, config: Config) -> None:
        self._names = [name for name, _ in model.named_parameters()]
        shared = list(model.parameters())
        clones = ([nn.Parameter(p.detach().clone()) for p in shared] for _ in range(config.workers - 1))
        self._params = [shared, *clones]
        self._simulated = Workers(config.workers)
        self._optimizers = self._simulated.run(
            lambda rank, group: LionCub(
                list(zip(self._names, self._params[rank], strict=True)),
                betas=BETAS,
                weight_decay=WEIGHT_DECAY,
                compression=method.compression,
                momentum_sync=method.sync,
                drift_every=25 if method.sync is not None and method.sync.is_auto else None,
                algorithm="reduce_scatter",
                process_group=group,
            )
        )
        self._gradients: list[list[Tensor | None]] = [[] for _ in range(config.workers)]
        self.bytes_sent = 0

    def __enter__(self) -> _Voting:
        return self

    def __exit__(self, *error: object) -> None:
        self._simulated.close()

    def set_lr(self, lr: float) -> None:
        """For the step to come."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def collect(self, rank: int) -> None:
        """Take a worker's gradients off the shared parameters."""
        self._gradients[rank] = [p.grad for p in self._params[0]]
        for p in self._params[0]:
            p.grad = None

    def step(self, *, look: bool, kind_of: Callable[[str], str]) -> dict[str, Any]:
        """One step of all workers; where it is looked at, what was seen."""
        for params, gradients in zip(self._params, self._gradients, strict=True):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
        wanted = self._wanted() if look else []
        before = [p.detach().clone() for p in self._params[0]] if look else []
        self._simulated.run(lambda rank, group: self._optimizers[rank].step())
        for params in self._params:
            for p in params:
                p.grad = None
        stats = self._optimizers[0].stats()
        self.bytes_sent += stats.bytes_sent_per_step
        if not look:
            return {}
        return {
            "tied": stats.tied,
            "unanimous": stats.unanimous,
            "agreement": self._agreement(before, wanted),
            "drift": self._drift(kind_of),
        }

    def _momenta(self, i: int) -> Tensor:
        """[N, ...]: all workers' momentum of a parameter."""
        pairs = zip(self._optimizers, self._params, strict=True)
        return torch.stack([optimizer.state[params[i]]["exp_avg"] for optimizer, params in pairs])

    def _wanted(self) -> list[Tensor]:
        """The update that plain Lion would make, from the mean of all momenta and gradients."""
        found = []
        for i in range(len(self._names)):
            gradients = torch.stack([params[i].grad for params in self._params])
            found.append(BETAS[0] * self._momenta(i).mean(dim=0) + (1 - BETAS[0]) * gradients.mean(dim=0))
        return found

    def _agreement(self, before: list[Tensor], wanted: list[Tensor]) -> float:
        """Share of elements that moved as plain Lion would have moved them."""
        group = self._optimizers[0].param_groups[0]
        agreeing, total = 0, 0
        for old, new, update in zip(before, self._params[0], wanted, strict=True):
            moved = old * (1 - group["lr"] * WEIGHT_DECAY) - new.detach()
            # decay alone leaves rounding errors, far below a step
            direction = torch.where(moved.abs() > 1e-3 * group["lr"], moved.sign(), 0.0)
            agreeing += int((direction == update.sign()).sum())
            total += old.numel()
        return agreeing / total

    def _drift(self, kind_of: Callable[[str], str]) -> dict[str, float]:
        """Variance of momentum over workers relative to its mean square, by kind of layer."""
        apart: dict[str, float] = {}
        power: dict[str, float] = {}
        for i, name in enumerate(self._names):
            momenta, kind = self._momenta(i), kind_of(name)
            apart[kind] = apart.get(kind, 0.0) + float((momenta - momenta.mean(dim=0)).square().sum())
            power[kind] = power.get(kind, 0.0) + float(momenta.square().sum())
        return {kind: apart[kind] / power[kind] if power[kind] else 0.0 for kind in apart}
