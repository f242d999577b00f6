"""The methods that are compared, all on one model: what a worker does in a step, and how long each part takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any, Protocol

import lion_pytorch  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook, bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import lioncub
from netlab.clocks import Hook, HookClock, StepTimes
from netlab.names import ALGORITHM_OF, BASELINE, FLOOR, OVERLAP

LR, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.99), 0.1
POWERSGD_RANK = 4
# larger than any model here, so that there is one bucket
ONE_BUCKET_MB = 4096
MAX_INT8_WORKERS = 127

MakeModel = Callable[[], nn.Module]


class Method(Protocol):
    """A way to take a step with the shared model."""

    def step(self, windows: Tensor) -> StepTimes:
        """Train one step on int64 [1, context + 1]; changes model and momentum."""
        ...


def timed(model: nn.Module, update: Callable[[], Any], windows: Tensor) -> tuple[float, float, float]:
    """Seconds of forward, of backward and of ``update``, one after the other."""
    begin = perf_counter()
    loss = model(windows)
    forward = perf_counter()
    loss.backward()
    backward = perf_counter()
    update()
    return forward - begin, backward - forward, perf_counter() - backward


class Plain:
    """No communication: the time that remains when it costs nothing."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def step(self, windows: Tensor) -> StepTimes:
        """See `Method`."""
        self._optimizer.zero_grad()
        forward, backward, update = timed(self._model, self._optimizer.step, windows)
        return StepTimes(forward + backward + update, forward, backward, 0.0, update, 0.0)


class UnderDDP:
    """Gradients averaged by DDP through a hook, then any optimizer."""

    def __init__(self, ddp: DistributedDataParallel, clock: HookClock, optimizer: torch.optim.Optimizer) -> None:
        self._ddp, self._clock, self._optimizer = ddp, clock, optimizer

    def step(self, windows: Tensor) -> StepTimes:
        """See `Method`."""
        self._clock.reset()
        self._optimizer.zero_grad()
        forward, backward, update = timed(self._ddp, self._optimizer.step, windows)
        exposed, busy = self._clock.exposed_seconds(), self._clock.busy_seconds()
        return StepTimes(forward + backward + update, forward, backward - exposed, exposed, update, busy)


class Int8Vote:
    """The majority vote that people write first: signs as int8, one all-reduce, the sign of the sum applied."""

    def __init__(self, model: nn.Module, momenta: Iterable[Tensor]) -> None:
        if dist.get_world_size() > MAX_INT8_WORKERS:
            raise ValueError(f"workers: expected at most {MAX_INT8_WORKERS} for int8 sums, got {dist.get_world_size()}")
        self._model, self._params, self._momenta = model, list(model.parameters()), list(momenta)
        self._signs = torch.empty(sum(param.numel() for param in self._params), dtype=torch.int8)

    @torch.no_grad()
    def vote(self) -> float:
        """Take the optimizer's step; gives the seconds of the all-reduce."""
        offset, parts = 0, []
        for param, momentum in zip(self._params, self._momenta, strict=True):
            assert param.grad is not None
            part = self._signs[offset : offset + param.numel()].view_as(param)
            part.copy_(momentum.lerp(param.grad, 1 - BETAS[0]).sign_())
            momentum.lerp_(param.grad, 1 - BETAS[1])
            parts.append(part)
            offset += param.numel()
        started = perf_counter()
        dist.all_reduce(self._signs)
        seconds = perf_counter() - started
        for param, part in zip(self._params, parts, strict=True):
            param.mul_(1 - LR * WEIGHT_DECAY).add_(part.sign_(), alpha=-LR)
        return seconds

    def step(self, windows: Tensor) -> StepTimes:
        """See `Method`."""
        self._model.zero_grad()
        seconds: list[float] = []
        forward, backward, update = timed(self._model, lambda: seconds.append(self.vote()), windows)
        (sent,) = seconds
        return StepTimes(forward + backward + update, forward, backward, sent, update - sent, sent)


class Voting:
    """`lioncub.LionCub` on parameters of its own in the model's memory: its hooks end with it, no other's are run.

    ``make_model`` gives a model like the shared one, of whatever values.
    """

    def __init__(
        self, model: nn.Module, make_model: MakeModel, algorithm: str, overlap: bool, profile: str | None
    ) -> None:
        with torch.device("meta"):
            self._model = make_model()
        self._model.load_state_dict(model.state_dict(), assign=True)
        named = self._model.named_parameters()
        self._optimizer = lioncub.LionCub(
            named,
            LR,
            BETAS,
            WEIGHT_DECAY,
            # one kind of message, which is what the cost model forecasts
            compression=lioncub.SignVote(),
            algorithm=algorithm,
            overlap=overlap,
            profile=profile,
            broadcast=False,
        )

    def stats(self) -> lioncub.Stats:
        """What the last step cost."""
        return self._optimizer.stats()

    def step(self, windows: Tensor) -> StepTimes:
        """See `Method`."""
        self._optimizer.zero_grad()
        forward, backward, update = timed(self._model, self._optimizer.step, windows)
        stats = self._optimizer.stats()
        exposed, busy = stats.exposed_seconds, stats.communication_seconds
        return StepTimes(forward + backward + update, forward, backward, exposed, update - exposed, busy)

    def step_alone(self) -> float:
        """Step once more, with the last gradients; seconds of communication."""
        self._optimizer.step()
        return self._optimizer.stats().communication_seconds


def bf16_hook(group: dist.ProcessGroup | None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Gradients cast to bf16, divided, summed and cast back: torch's own hook under a name that DDP takes on Gloo."""
    future: torch.futures.Future[Tensor] = bf16_compress_hook(group, bucket)  # type: ignore[arg-type]
    return future


class Workbench:
    """One model and what methods can share on it, built when first asked for.

    All methods but LionCub keep one set of momentum, and fp32 and bf16 one DDP: what is timed does not depend on their
    values, and eight workers must fit into the machine.
    """

    def __init__(self, make_model: MakeModel) -> None:
        self._make_model = make_model
        self.model = model = make_model()
        self.ours = lioncub.Lion(model.parameters(), LR, BETAS, WEIGHT_DECAY)
        self._built: dict[str, Method] = {}
        self._clock = HookClock()
        self._hook: tuple[Hook, Any] = (allreduce_hook, None)
        self._ddp: DistributedDataParallel | None = None
        self._initial = [param.detach().clone() for param in model.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its first parameters back, the same on all workers, and no gradients."""
        for param, initial in zip(self.model.parameters(), self._initial, strict=True):
            param.copy_(initial)
        self.model.zero_grad()

    def method(self, name: str, profile: str | None = None) -> Method:
        """The method of that name. Collective; a LionCub is made anew each time, the others are kept."""
        algorithm = ALGORITHM_OF.get(name)
        if algorithm is not None:
            overlap = name.endswith(OVERLAP)
            return Voting(self.model, self._make_model, algorithm, overlap, profile)
        if name not in self._built:
            self._built[name] = self._build(name)
        if name in ("ddp_fp32", BASELINE):
            self._hook = (allreduce_hook, None)
        elif name == "ddp_bf16":
            self._hook = (bf16_hook, None)
        return self._built[name]

    def _build(self, name: str) -> Method:
        builders: dict[str, Callable[[], Method]] = {
            FLOOR: lambda: Plain(self.model, self.ours),
            BASELINE: lambda: UnderDDP(self._shared_ddp(), self._clock, self._theirs()),
            "ddp_fp32": lambda: UnderDDP(self._shared_ddp(), self._clock, self.ours),
            "ddp_bf16": lambda: UnderDDP(self._shared_ddp(), self._clock, self.ours),
            "ddp_powersgd": self._power_sgd,
            "int8_vote": lambda: Int8Vote(self.model, self._momenta()),
        }
        return builders[name]()

    def _momenta(self) -> list[Tensor]:
        return [self.ours.state[param]["exp_avg"] for param in self.model.parameters()]

    def _theirs(self) -> torch.optim.Optimizer:
        options = {"lr": LR, "betas": BETAS, "weight_decay": WEIGHT_DECAY}
        optimizer: torch.optim.Optimizer = lion_pytorch.Lion(self.model.parameters(), **options)
        for param, momentum in zip(self.model.parameters(), self._momenta(), strict=True):
            optimizer.state[param]["exp_avg"] = momentum
        return optimizer

    def _shared_ddp(self) -> DistributedDataParallel:
        if self._ddp is None:
            # workers start from one seed, so nothing need be sent to make them equal
            self._ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, init_sync=False)
            self._ddp.register_comm_hook(
                None, self._clock.timed(lambda _, bucket: self._hook[0](self._hook[1], bucket), None)
            )
        return self._ddp

    def _power_sgd(self) -> Method:
        ddp = DistributedDataParallel(
            self.model, gradient_as_bucket_view=True, init_sync=False, bucket_cap_mb=ONE_BUCKET_MB
        )
        state = PowerSGDState(process_group=None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=2)
        clock = HookClock()
        ddp.register_comm_hook(None, clock.timed(powerSGD_hook, state))
        return UnderDDP(ddp, clock, self.ours)
