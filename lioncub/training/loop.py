"""What each worker does: build the methods, let them take turns, log, evaluate, save."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.training import checkpoint
from lioncub.training.config import TrainConfig, UserError
from lioncub.training.gpt import GPT
from lioncub.training.log import LogWriter, StepRecord
from lioncub.training.methods import Method, StepCost, build_method, warm_up
from lioncub.training.schedule import is_due, learning_rate, turns
from lioncub.training.text import Text, load_text, training_windows, validation_windows

OnRecord = Callable[[StepRecord], None]


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """A run as a job for workers; rank 0 reports a StepRecord after every step of every method."""

    config: TrainConfig
    resume: bool

    @property
    def workers(self) -> int:
        """Number of workers."""
        return self.config.workers

    @property
    def timeout(self) -> float:
        """Seconds to wait for a silent worker."""
        return self.config.timeout

    def run(self, report: OnRecord) -> None:
        """Train."""
        Trainer(self.config, resume=self.resume, on_record=report).run()


class Trainer:
    """One worker's part of a run, under an initialised default process group.

    Construction is collective. `on_record` is called on rank 0 after every step of every method.
    """

    def __init__(self, config: TrainConfig, *, resume: bool, on_record: OnRecord) -> None:
        self.config = config
        self.rank = dist.get_rank()
        self.directory = Path(config.out)
        self.on_record = on_record
        self.text: Text = load_text(config.data, config.context)
        windows = validation_windows(self.text, count=config.eval_windows, context=config.context)
        self.validation: Tensor = windows[self.rank :: config.workers]
        warm_up(config)
        self.methods: dict[str, Method] = {name: build_method(name, config) for name in config.methods}
        self.done, log_bytes = self._restore() if resume else (0, 0)
        self.log = LogWriter(self.directory, log_bytes) if self.rank == 0 else None

    def _restore(self) -> tuple[int, int]:
        folder = checkpoint.latest(self.directory)
        if folder is None:
            raise UserError(f"--resume {self.directory}: there is no complete checkpoint")
        position = checkpoint.read_position(folder)
        workers = dist.get_world_size()
        checkpoint.check_position(position, folder, workers=workers, text_sha256=self.text.sha256)
        checkpoint.restore(folder, self.methods, self.rank)
        return position.step, position.log_bytes

    def run(self) -> None:
        """Train to the last step."""
        config = self.config
        every = config.checkpoint_every
        for turn in turns(config.methods, steps=config.steps, block=config.block, checkpoint_every=every):
            if turn.last <= self.done:
                continue
            for name in turn.methods:
                for step in range(max(turn.first, self.done + 1), turn.last + 1):
                    self._step(name, step)
            if every and is_due(turn.last, every=every, steps=config.steps):
                self._save(turn.last)
        if self.log is not None:
            self.log.close()

    def _step(self, name: str, step: int) -> None:
        config, method = self.config, self.methods[name]
        rate = learning_rate(step, steps=config.steps, peak=config.lr, warmup=config.warmup)
        for group in method.optimizer.param_groups:
            group["lr"] = rate
        begin = perf_counter()
        windows = training_windows(
            self.text,
            batch=config.batch,
            context=config.context,
            seed=config.seed,
            rank=self.rank,
            step=step,
        )
        cost = method.step(windows)
        record = self._record(name, step, rate, perf_counter() - begin, cost)
        if self.log is not None:
            self.log.write(record)
            self.on_record(record)

    def _record(self, name: str, step: int, rate: float, seconds: float, cost: StepCost) -> StepRecord:
        figures = dataclasses.asdict(cost) | {"step_seconds": seconds}
        bytes_sent = figures.pop("bytes_sent")
        means = _mean_over_workers(figures)
        if not math.isfinite(means["loss"]):
            raise UserError(f"{name}: the loss is {means['loss']} at step {step}; a smaller --lr may help")
        val_loss = None
        if is_due(step, every=self.config.eval_every, steps=self.config.steps):
            val_loss = self._validation_loss(self.methods[name].model)
        return StepRecord(name, step, val_loss=val_loss, lr=rate, bytes_sent=bytes_sent, **means)

    @torch.no_grad()
    def _validation_loss(self, model: GPT) -> float:
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        # no window at all where there are more workers than windows
        for start in range(0, len(self.validation), self.config.batch):
            windows = self.validation[start : start + self.config.batch]
            total += model(windows).double() * len(windows)
        dist.all_reduce(total)
        return total.item() / self.config.eval_windows

    def _save(self, step: int) -> None:
        log_bytes = self.log.bytes_written() if self.log is not None else 0
        position = checkpoint.Position(step, self.config.workers, log_bytes, self.text.sha256)
        checkpoint.save(self.directory, position, self.methods, self.rank)


def _mean_over_workers(figures: dict[str, float]) -> dict[str, float]:
    total = torch.tensor(list(figures.values()), dtype=torch.float64, device="cpu")
    dist.all_reduce(total)
    return dict(zip(figures, (total / dist.get_world_size()).tolist(), strict=True))
