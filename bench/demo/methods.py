"""The methods that are compared: plain Lion under DistributedDataParallel, and LionCub on a bare module."""

from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from demo.gpt import GPT, parameter_count
from lioncub.collectives.cost import ring_all_reduce_bytes


@dataclass(frozen=True)
class StepCost:
    """One step of this worker: its loss before the update in nats per byte, seconds, and bytes.

    ``backward_seconds`` and ``optimizer_seconds`` are without communication; ``exposed_seconds`` is the communication
    that the step waited for. Bytes are counted for LionCub, and computed for a ring all-reduce for Lion under DDP.
    """

    loss: float
    forward_seconds: float
    backward_seconds: float
    exposed_seconds: float
    optimizer_seconds: float
    bytes_sent: float


class AllReduceClock:
    """Times of DDP's all-reduces, taken by a communication hook that does what DDP does by itself."""

    def __init__(self) -> None:
        self.last_start = self.last_end = 0.0

    def hook(self, group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Pass this to ``register_comm_hook``; ``group`` None is the default group."""
        self.last_start = perf_counter()
        return allreduce_hook(group, bucket).then(self._finish)  # type: ignore[arg-type]

    def _finish(self, future: torch.futures.Future[Tensor]) -> Tensor:
        self.last_end = perf_counter()
        return future.value()

    def exposed_seconds(self) -> float:
        """Return the time from the last bucket's start: all gradients are there, and the backward pass only waits."""
        return self.last_end - self.last_start


class LionUnderDDP:
    """``lioncub.Lion`` with gradients averaged by DDP in fp32."""

    def __init__(self, model: GPT, lr: float, algorithm: str) -> None:
        self.model, self.clock = model, AllReduceClock()
        self.ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.ddp.register_comm_hook(None, self.clock.hook)
        self.optimizer: torch.optim.Optimizer = lioncub.Lion(model.parameters(), lr, weight_decay=0.1)
        self.bytes_per_step = ring_all_reduce_bytes(parameter_count(model), dist.get_world_size())

    def step(self, windows: Tensor) -> StepCost:
        """Train one step on int64 [batch, context + 1]; changes model and optimizer."""
        loss, (forward, backward, optimizer) = _timed_step(self.ddp, self.optimizer, windows)
        exposed = self.clock.exposed_seconds()
        return StepCost(loss, forward, backward - exposed, exposed, optimizer, self.bytes_per_step)


class LionCubOnModule:
    """``lioncub.LionCub``: gradients stay on their worker, votes are exchanged."""

    def __init__(self, model: GPT, lr: float, algorithm: str) -> None:
        self.model = model
        self.optimizer = lioncub.LionCub(
            model.named_parameters(), lr, weight_decay=0.1, comm=lioncub.Comm(algorithm=algorithm)
        )

    def step(self, windows: Tensor) -> StepCost:
        """Train one step on int64 [batch, context + 1]; changes model and optimizer."""
        loss, (forward, backward, optimizer) = _timed_step(self.model, self.optimizer, windows)
        stats = self.optimizer.stats()
        waited = stats.communication_seconds
        return StepCost(loss, forward, backward, waited, optimizer - waited, stats.bytes_sent_per_step)


Method = LionUnderDDP | LionCubOnModule
METHODS: dict[str, type[Method]] = {"lion": LionUnderDDP, "lioncub": LionCubOnModule}


def _timed_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, windows: Tensor
) -> tuple[float, tuple[float, float, float]]:
    """Train one step; return the loss, and the seconds of forward pass, backward pass and optimizer."""
    optimizer.zero_grad()
    begin = perf_counter()
    loss = model(windows)
    forward_end = perf_counter()
    loss.backward()
    backward_end = perf_counter()
    optimizer.step()
    end = perf_counter()
    return loss.item(), (forward_end - begin, backward_end - forward_end, end - backward_end)
