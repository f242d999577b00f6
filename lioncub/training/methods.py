"""The two ways to train that are compared: plain Lion under DistributedDataParallel, and LionCub on a bare module."""

import dataclasses
from time import perf_counter
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub.training.config import TrainConfig
from lioncub.training.gpt import GPT, parameter_count
from lioncub.training.wire_time import ring_all_reduce_bytes


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one step took on this worker; the fields are explained at :class:`lioncub.training.log.StepRecord`."""

    loss: float
    forward_seconds: float
    backward_seconds: float
    communication_seconds: float
    exposed_seconds: float
    optimizer_seconds: float
    bytes_sent: int


class Method(Protocol):
    """A model with its optimizer and its way to communicate."""

    @property
    def model(self) -> GPT:
        """The bare model."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Its optimizer."""
        ...

    def step(self, windows: Tensor) -> StepCost:
        """Train one step on int64 [batch, context + 1]; changes model and optimizer."""
        ...


class AllReduceClock:
    """Times the all-reduces of DDP.

    As a communication hook it does what DDP does by itself (divide, then sum in fp32) and notes when each
    bucket was ready and when its sum had arrived.
    """

    def __init__(self) -> None:
        self.started: list[float] = []
        self.finished: list[float] = []

    def hook(self, group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """The hook for ``register_comm_hook``; `group` None is the default group."""
        self.started.append(perf_counter())
        return allreduce_hook(group, bucket).then(self._finish)  # type: ignore[arg-type]

    def _finish(self, future: torch.futures.Future[Tensor]) -> Tensor:
        self.finished.append(perf_counter())
        return future.value()

    def reset(self) -> None:
        """Forget the past step."""
        self.started.clear()
        self.finished.clear()

    def exposed_seconds(self) -> float:
        """Time from the last bucket's start: all gradients are there, and the backward pass only waits."""
        return max(self.finished) - max(self.started)

    def busy_seconds(self) -> float:
        """Time with at least one all-reduce under way, since the last reset."""
        return covered_seconds(self.started, self.finished)


def covered_seconds(started: list[float], finished: list[float]) -> float:
    """Length of the time in which more intervals have started than finished.

    Both lists may be in any order: how many intervals are open at a moment does not depend on which is which.
    """
    covered, open_count, opened_at = 0.0, 0, 0.0
    # at the same moment a start comes first, so that touching intervals count once
    for moment, change in sorted([(t, 1) for t in started] + [(t, -1) for t in finished], key=lambda e: (e[0], -e[1])):
        if open_count == 0:
            opened_at = moment
        open_count += change
        if open_count == 0:
            covered += moment - opened_at
    return covered


class LionUnderDDP:
    """``lioncub.Lion`` with gradients averaged by DDP in fp32."""

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model = model
        self.clock = AllReduceClock()
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.ddp.register_comm_hook(None, self.clock.hook)
        self.optimizer = lioncub.Lion(
            model.parameters(), config.lr, config.betas, config.weight_decay, impl=config.impl
        )
        self.bytes_per_step = ring_all_reduce_bytes(parameter_count(model), config.workers)

    def step(self, windows: Tensor) -> StepCost:
        """See :class:`Method`."""
        self.clock.reset()
        self.optimizer.zero_grad()
        begin = perf_counter()
        loss = self.ddp(windows)
        forward_end = perf_counter()
        loss.backward()
        backward_end = perf_counter()
        self.optimizer.step()
        end = perf_counter()
        exposed = self.clock.exposed_seconds()
        return StepCost(
            loss=loss.item(),
            forward_seconds=forward_end - begin,
            backward_seconds=backward_end - forward_end - exposed,
            communication_seconds=self.clock.busy_seconds(),
            exposed_seconds=exposed,
            optimizer_seconds=end - backward_end,
            bytes_sent=self.bytes_per_step,
        )


class LionCubMethod:
    """``lioncub.LionCub``: gradients stay on their worker, votes travel."""

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model = model
        self.optimizer = lioncub.LionCub(
            model.named_parameters(),
            config.lr,
            config.betas,
            config.weight_decay,
            algorithm=config.algorithm,
            impl=config.impl,
        )

    def step(self, windows: Tensor) -> StepCost:
        """See :class:`Method`."""
        self.optimizer.zero_grad()
        begin = perf_counter()
        loss = self.model(windows)
        forward_end = perf_counter()
        loss.backward()
        backward_end = perf_counter()
        self.optimizer.step()
        end = perf_counter()
        stats = self.optimizer.stats()
        return StepCost(
            loss=loss.item(),
            forward_seconds=forward_end - begin,
            backward_seconds=backward_end - forward_end,
            communication_seconds=stats.communication_seconds,
            exposed_seconds=stats.communication_seconds,
            optimizer_seconds=end - backward_end - stats.communication_seconds,
            bytes_sent=stats.bytes_sent_per_step,
        )


def build_method(name: str, config: TrainConfig) -> Method:
    """Model and optimizer of one method. Collective: every worker calls it, in the same order.

    The weights depend on the seed alone, so all methods and all workers start from the same ones.
    """
    torch.manual_seed(config.seed)
    model = GPT(layers=config.layers, heads=config.heads, width=config.width, context=config.context)
    return LionUnderDDP(model, config) if name == "lion" else LionCubMethod(model, config)


def warm_up(config: TrainConfig) -> None:
    """One step of each method on a throwaway model, so that no timed step compiles kernels. Collective."""
    tiny = dataclasses.replace(config, layers=1, heads=1, width=8)
    for name in config.methods:
        build_method(name, tiny).step(torch.zeros(1, config.context + 1, dtype=torch.int64, device="cpu"))
