"""The methods that are compared, and one run of one of them with its losses and bytes."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lioncub import BySize, Comm, Lion, LionCub, MomentumSync, Precision, Quantized, SignMean, SignVote, TernaryVote
from lioncub.simulate import Workers
from study.tasks import TASKS

BETAS, WEIGHT_DECAY, WARM_UP_STEPS = (0.9, 0.99), 0.1, 20
REFERENCE, PLAIN_VOTE = "Lion", "SignVote"


@dataclass(frozen=True)
class Method:
    """How workers' gradients become a step. Without a compression, they are averaged in full precision.

    ``lr`` is a multiple of the task's, the best of 0.5, 1 and 2 (AdamW: 2, 4 and 8) on equal shards.
    """

    compression: Any = None
    sync: MomentumSync | None = None
    lr: float = 1.0
    precision: Precision = field(default_factory=Precision)
    # of parameters and gradients; losses are computed in fp32
    dtype: torch.dtype = torch.float32


def _staggered(every: int, **options: Any) -> MomentumSync:
    return MomentumSync(every=every, schedule="staggered", dtype="int8", **options)


_SHARED_LEVELS = Quantized(bits=2, norm="l2", stochastic=True, block=64, share_scales_every=8)
METHODS = {
    REFERENCE: Method(),
    "AdamW": Method(lr=4.0),
    PLAIN_VOTE: Method(SignVote()),
    # the default of LionCub
    "BySize": Method(BySize()),
    "SignMean": Method(SignMean()),
    "TernaryVote": Method(TernaryVote()),
    "2-bit l1": Method(Quantized(bits=2, norm="l1")),
    "2-bit linf": Method(Quantized(bits=2, norm="linf"), lr=2.0),
    "4-bit l1": Method(Quantized(bits=4, norm="l1")),
    "4-bit linf": Method(Quantized(bits=4, norm="linf")),
    "SignVote + staggered 64 int8": Method(SignVote(), _staggered(64)),
    "SignVote + staggered 32 int8": Method(SignVote(), _staggered(32)),
    "SignVote + staggered 16 int8": Method(SignVote(), _staggered(16)),
    # the most that a fifteenth of fp32's bytes leaves room for
    "SignVote + staggered 9 int8": Method(SignVote(), _staggered(9)),
    "SignVote + staggered 4 int8": Method(SignVote(), _staggered(4)),
    "SignVote + every 1 fp32": Method(SignVote(), MomentumSync()),
    "SignVote + auto 0.25": Method(SignVote(), _staggered(8, select="auto", budget=0.25)),
    "SignVote + auto 1.0": Method(SignVote(), _staggered(4, select="auto", budget=1.0)),
    "2-bit l2 shared + staggered 32 int8": Method(_SHARED_LEVELS, _staggered(32)),
    "2-bit l2 shared + staggered 16 int8": Method(_SHARED_LEVELS, _staggered(16)),
}


def _bf16(**options: Any) -> Method:
    return Method(BySize(), dtype=torch.bfloat16, precision=Precision(**options))


_HALF_MOMENTUM = {"momentum_dtype": torch.bfloat16}
# what the precision of parameters costs, with the bytes of weights and optimizer state per parameter
PRECISIONS = {
    "fp32": (Method(BySize()), 4 + 4),
    "bf16, to nearest": (_bf16(), 2 + 4),
    "bf16, stochastic": (_bf16(param_rounding="stochastic"), 2 + 4),
    "bf16, stochastic, bf16 momentum": (_bf16(param_rounding="stochastic", **_HALF_MOMENTUM), 2 + 2),
    "bf16, fp32 masters": (_bf16(master_weights=True), 2 + 4 + 4),
    "bf16, fp32 masters, bf16 momentum": (_bf16(master_weights=True, **_HALF_MOMENTUM), 2 + 4 + 2),
}


@dataclass(frozen=True)
class Config:
    """All arguments of a run; ``method`` is a name of `METHODS` or `PRECISIONS`."""

    task: str
    shards: str
    workers: int
    batch: int
    method: str
    seed: int
    lr: float


def config_of(task: str, shards: str, workers: int, method: str, seed: int) -> Config:
    """Return a run with the task's batch and the method's learning rate."""
    # on digits twice the rate was better for AdamW
    factor = 2.0 if (task, method) == ("digits", "AdamW") else METHODS[method].lr
    return Config(task, shards, workers, TASKS[task].batch, method, seed, float(f"{TASKS[task].lr * factor:.4g}"))


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate: linear warm-up, then a cosine to zero."""
    if step < WARM_UP_STEPS:
        return (step + 1) / WARM_UP_STEPS
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP_STEPS) / (steps - WARM_UP_STEPS)))


def run(config: Config, steps: int | None = None) -> dict[str, Any]:
    """Train, for the task's steps unless given; returns a record with the loss and bytes per step and worker.

    All workers have the same parameters, so their gradients are computed on those of the first one.
    """
    began = time.perf_counter()
    task, size = TASKS[config.task], config.workers
    method = METHODS.get(config.method) or PRECISIONS[config.method][0]
    steps = steps or task.steps
    model = task.model(config.seed).to(method.dtype)
    initial = [p.detach().clone() for p in model.parameters()]
    parameters = sum(p.numel() for p in initial)
    # of a ring all-reduce
    fp32_bytes = 2 * (size - 1) / size * 4 * parameters
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        trainer = _Averaged(model, config) if method.compression is None else _Voting(model, method, config, stack)
        sent = 0.0
        for step in range(steps):
            trainer.set_lr(config.lr * schedule(step, steps))
            for rank in range(size):
                batch = task.batch_of(config.seed, config.shards, size, config.batch, rank, step)
                task.loss(_widened(model), batch).backward()
                trainer.collect(rank)
            sent += trainer.step() or fp32_bytes
        return {
            "kind": "training",
            **asdict(config),
            "loss": task.validation_loss(copy.deepcopy(model).float()),
            "moved": sum(int((p != q).sum()) for p, q in zip(model.parameters(), initial, strict=True)) / parameters,
            "bytes_per_step": sent / steps,
            "fp32_bytes_per_step": fp32_bytes,
            "seconds": time.perf_counter() - began,
        }


def _widened(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the model as a function that computes in fp32."""
    if next(model.parameters()).dtype == torch.float32:
        return model
    return lambda inputs: functional_call(model, {name: p.float() for name, p in model.named_parameters()}, inputs)


class _Averaged:
    """Gradients averaged in full precision, in rank order, and one optimizer."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        self._params, self._workers = list(model.parameters()), config.workers
        make = torch.optim.AdamW if config.method == "AdamW" else Lion
        self._optimizer: torch.optim.Optimizer = make(self._params, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def collect(self, rank: int) -> None:
        """Take a worker's gradients: backward has added them to those before."""

    def step(self) -> int:
        """Take the step; returns 0, since nothing is counted."""
        for p in self._params:
            assert p.grad is not None
            p.grad /= self._workers
        self._optimizer.step()
        self._optimizer.zero_grad()
        return 0


class _Voting:
    """A LionCub for every simulated worker."""

    def __init__(self, model: nn.Module, method: Method, config: Config, stack: ExitStack) -> None:
        names = [name for name, _ in model.named_parameters()]
        shared = list(model.parameters())
        clones = ([nn.Parameter(p.detach().clone()) for p in shared] for _ in range(config.workers - 1))
        self._params = [shared, *clones]
        self._workers = stack.enter_context(Workers(config.workers))
        self._optimizers = self._workers.run(
            lambda rank, group: LionCub(
                list(zip(names, self._params[rank], strict=True)),
                betas=BETAS,
                weight_decay=WEIGHT_DECAY,
                compression=method.compression,
                momentum_sync=method.sync,
                precision=method.precision,
                comm=Comm(
                    algorithm="reduce_scatter",
                    drift_every=25 if method.sync is not None and method.sync.is_auto else None,
                ),
                process_group=group,
            )
        )
        self._gradients: list[list[Tensor | None]] = [[] for _ in range(config.workers)]

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

    def collect(self, rank: int) -> None:
        """Take a worker's gradients off the shared parameters."""
        self._gradients[rank] = [p.grad for p in self._params[0]]
        for p in self._params[0]:
            p.grad = None

    def step(self) -> int:
        """Take a step of all workers; returns the bytes that one sends."""
        for params, gradients in zip(self._params, self._gradients, strict=True):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
        self._workers.run(lambda rank, group: self._optimizers[rank].step())
        for params in self._params:
            for p in params:
                p.grad = None
        return self._optimizers[0].stats().bytes_sent_per_step
