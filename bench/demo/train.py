"""Each worker's part of the demo: options, the turns of the methods, evaluation, and the report at the end."""

import argparse
import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import torch
import torch.distributed as dist

from demo.gpt import GPT, parameter_count
from demo.methods import METHODS, Method
from demo.report import Record, table, write_plots
from demo.text import load_text, training_windows, validation_windows
from lioncub.collectives import ALGORITHMS

EVAL_WINDOWS = 64


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a run, those of ``make demo`` by default. Raises ValueError where one is out of range."""

    methods: tuple[str, ...] = ("lion", "lioncub")
    data: str | None = None
    out: str = "runs/demo"
    steps: int = 300
    seed: int = 0
    layers: int = 4
    heads: int = 4
    width: int = 128
    context: int = 64
    batch: int = 8
    lr: float = 3e-4
    warmup: int = 20
    # as on a slow network; on one machine "auto" would send twice the bytes, which is faster there
    algorithm: str = "reduce_scatter"
    block: int = 10
    eval_every: int = 30

    def __post_init__(self) -> None:
        for name in ("steps", "layers", "heads", "width", "batch", "block", "eval_every"):
            self._require(name, "an integer >= 1", getattr(self, name) >= 1)
        self._require("warmup", "an integer >= 0", self.warmup >= 0)
        self._require("context", "an integer >= 2", self.context >= 2)
        self._require("width", f"a multiple of --heads ({self.heads})", self.width % self.heads == 0)
        # written so that nan fails too
        self._require("lr", "a finite number > 0", 0 < self.lr < math.inf)

    def _require(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the flags. Raises ValueError where one is unknown or out of range."""
    parser = _Parser(prog="bench/demo", description="Train a GPT by each method; start it by torchrun.")
    add, defaults = parser.add_argument, Options()
    add("--methods", nargs="+", choices=METHODS, default=defaults.methods, help="default: both")
    add("--data", metavar="FILE", help="text; default: the standard library's sources")
    add("--algorithm", choices=("auto", *ALGORITHMS), default=defaults.algorithm, help="of the votes")
    for name, default in dataclasses.asdict(defaults).items():
        if name not in ("methods", "data", "algorithm"):
            flag = f"--{name.replace('_', '-')}"
            add(flag, type=type(default), default=default, metavar="X", help=f"default: {default}")
    given = vars(parser.parse_args(arguments))
    return Options(**{**given, "methods": tuple(dict.fromkeys(given["methods"]))})


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of step 1..steps: linear warm-up, then a cosine down to a tenth of ``peak``."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


def turns(methods: Sequence[str], steps: int, block: int) -> list[tuple[str, range]]:
    """List which method trains which steps, in order: all methods by blocks of ``block`` steps."""
    # reversed in every second block: a machine that slowly gets busier favours no method
    return [
        (name, range(start, min(start + block, steps + 1)))
        for index, start in enumerate(range(1, steps + 1, block))
        for name in (methods if index % 2 == 0 else methods[::-1])
    ]


def build(name: str, options: Options) -> Method:
    """Build model and optimizer of a method, a collective call; the weights depend on the seed alone."""
    torch.manual_seed(options.seed)
    model = GPT(layers=options.layers, heads=options.heads, width=options.width, context=options.context)
    return METHODS[name](model, options.lr, options.algorithm)


def train(options: Options) -> list[Record]:
    """Train all methods by turns, under an initialised default process group; every rank gets the same records.

    Raises:
        ValueError: the text cannot be used, or a loss is not finite.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    text = load_text(options.data, options.context)
    held_out = validation_windows(text, count=EVAL_WINDOWS, context=options.context)[rank::world_size]
    # one step of each method on a throwaway model, so that no timed step compiles kernels
    tiny = dataclasses.replace(options, layers=1, heads=1, width=8)
    for name in options.methods:
        build(name, tiny).step(torch.zeros(1, options.context + 1, dtype=torch.int64))
    methods = {name: build(name, options) for name in options.methods}
    records = []
    for name, block in turns(options.methods, options.steps, options.block):
        method = methods[name]
        for step in block:
            lr = learning_rate(step, steps=options.steps, peak=options.lr, warmup=options.warmup)
            for group in method.optimizer.param_groups:
                group["lr"] = lr
            begin = perf_counter()
            sizes = {"batch": options.batch, "context": options.context}
            cost = method.step(training_windows(text, **sizes, seed=options.seed, rank=rank, step=step))
            figures = {"step_seconds": perf_counter() - begin} | dataclasses.asdict(cost)
            record = Record(method=name, step=step, **_mean_over_workers(figures))
            if not math.isfinite(record.loss):
                raise ValueError(f"{name}: the loss is {record.loss} at step {step}; a smaller --lr may help")
            if step % options.eval_every == 0 or step == options.steps:
                record = dataclasses.replace(record, val_loss=_validation_loss(method.model, held_out, options.batch))
                if rank == 0:
                    losses = f"loss {record.loss:.3f}  val {record.val_loss:.3f}  {1e3 * record.step_seconds:.0f} ms"
                    print(f"{name:>8}  step {step}/{options.steps}  {losses}", file=sys.stderr, flush=True)
            records.append(record)
    return records


@torch.no_grad()
def _validation_loss(model: GPT, windows: torch.Tensor, batch: int) -> float:
    total = torch.zeros((), dtype=torch.float64)
    # no window at all where there are more workers than windows
    for part in windows.split(batch) if len(windows) else ():
        total += model(part).double() * len(part)
    dist.all_reduce(total)
    return total.item() / EVAL_WINDOWS


def _mean_over_workers(figures: dict[str, float]) -> dict[str, float]:
    total = torch.tensor(list(figures.values()), dtype=torch.float64)
    dist.all_reduce(total)
    return dict(zip(figures, (total / dist.get_world_size()).tolist(), strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one worker; return the exit code. The first rank prints the table and writes log and plots."""
    leads = os.environ.get("RANK", "0") == "0"
    try:
        options = parse(arguments)
        if "RANK" not in os.environ:
            raise ValueError("expected to be started by torchrun, as in `make demo`")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])))
        if leads:
            Path(options.out).mkdir(parents=True, exist_ok=True)
        dist.init_process_group("gloo")
        records = train(options)
    except (ValueError, OSError) as error:
        if not leads:
            # the first worker speaks for all; when it has ended, torchrun ends the others
            time.sleep(60)
        print(f"demo: {error}", file=sys.stderr)
        return 1
    workers = dist.get_world_size()
    # a DDP model that is garbage would be the group's last holder, and freeing the group from there joins threads that
    # may be waiting for the interpreter's lock
    gc.collect()
    dist.destroy_process_group()
    if leads:
        log = Path(options.out) / "log.jsonl"
        log.write_text("".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in records))
        write_plots(records, log.with_name("plots.png"))
        model = GPT(layers=options.layers, heads=options.heads, width=options.width, context=options.context)
        print(f"GPT of {parameter_count(model):,} parameters, {workers} workers, {options.steps} steps\n")
        print(table(records, workers))
        print(f"\nwritten: {log}, {log.with_name('plots.png')}")
    return 0
