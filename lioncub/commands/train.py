"""``lioncub train``."""

import argparse
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lioncub.commands.common import end_on_sigterm, fail, need_extra, stored, torchrun_workers
from lioncub.kernels.backends import IMPLS
from lioncub.training.config import ALGORITHMS, ERROR_NAME, METHODS, TrainConfig, UserError, resumed_config

DESCRIPTION = """\
Train a small byte-level GPT on real text with several workers, by LionCub (1-bit votes) or by plain Lion under
DistributedDataParallel (fp32 all-reduce), or by both in turns, to compare them. Workers are processes on this machine
over Gloo; under torchrun the command joins torchrun's group instead. Results: a table on stdout and, in the folder of
the run, log.jsonl (a line per method and step), plots, checkpoints."""
EPILOG = """\
Times of lion's communication are taken by a DDP communication hook that does what DDP does by itself and notes when
each bucket of gradients was ready and when its sum had arrived. Bytes of lion are computed for a ring all-reduce."""


def add_parser(commands: Any) -> None:
    """Add the command's flags; those that were not given are absent from the result, so that resume can tell."""
    parser = commands.add_parser(
        "train",
        help="train a small GPT with several workers and compare methods",
        description=DESCRIPTION,
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    _add_run_flags(parser)
    _add_model_flags(parser)
    _add_optimizer_flags(parser)


def run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Run the command; returns the exit code."""
    need_extra(parser, "train")
    resume: str | None = given.pop("resume", None)
    overwrite: bool = given.pop("overwrite", False)
    try:
        config, joined = settings(given, resume, os.environ)
    except UserError as error:
        parser.exit(2, f"lioncub train: {error}\n")
    if not joined:
        # a worker of torchrun keeps the default, which ends it at once even in the middle of a collective
        end_on_sigterm("train")
    return _train(config, resume=resume is not None, overwrite=overwrite, joined=joined)


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add(
        "--method", dest="methods", action="append", choices=METHODS, help="give it twice to compare (default: lioncub)"
    )
    add("--data", metavar="FILE", help="any file, read as bytes (default: the standard library's own sources)")
    add("--workers", type=int, metavar="N", help=_help("processes to start; under torchrun: WORLD_SIZE", "workers"))
    add("--steps", type=int, metavar="N", help=_help("steps of each method", "steps"))
    add("--block", type=int, metavar="N", help=_help("steps of one method before the other's turn", "block"))
    add("--seed", type=int, metavar="N", help=_help("of weights and batches", "seed"))
    add("--out", metavar="DIR", help="folder of the run (default: runs/<date>-<time>)")
    add("--overwrite", action="store_true", help="replace an earlier run in --out")
    add("--resume", metavar="DIR", help="continue the run in DIR from its newest checkpoint, with its settings")
    add("--checkpoint-every", type=int, metavar="N", help=_help("steps; 0: never", "checkpoint_every"))
    add("--eval-every", type=int, metavar="N", help=_help("steps; 0: at the end only", "eval_every"))
    add("--eval-windows", type=int, metavar="N", help=_help("windows of the validation text", "eval_windows"))
    add("--timeout", type=float, metavar="S", help=_help("seconds to wait for a silent worker", "timeout"))


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and batch")
    add = group.add_argument
    add("--layers", type=int, metavar="N", help=_help("blocks", "layers"))
    add("--heads", type=int, metavar="N", help=_help("attention heads", "heads"))
    add("--width", type=int, metavar="N", help=_help("of the residual stream", "width"))
    add("--context", type=int, metavar="N", help=_help("bytes that the model sees", "context"))
    add("--batch", type=int, metavar="N", help=_help("windows per worker and step", "batch"))


def _add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--lr", type=float, metavar="X", help=_help("peak learning rate of both methods; cosine decay", "lr"))
    add("--warmup", type=int, metavar="N", help=_help("steps until the peak", "warmup"))
    add("--betas", type=float, nargs=2, action=_Pair, metavar="B", help=_help("Lion's betas", "betas"))
    add("--weight-decay", type=float, metavar="X", help=_help("decoupled", "weight_decay"))
    add("--algorithm", choices=ALGORITHMS, help=_help("how votes travel", "algorithm"))
    add("--impl", choices=IMPLS, help=_help("which kernels", "impl"))


class _Pair(argparse.Action):
    """Stores the values as a tuple, as TrainConfig has them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values or ()))


def _help(text: str, field: str) -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
    default = defaults[field]
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} (default: {shown})"


def settings(given: dict[str, Any], resume: str | None, environment: Mapping[str, str]) -> tuple[TrainConfig, bool]:
    """Settings from the flags that were given, and whether to join torchrun's group.

    Raises:
        UserError: flags contradict each other, the environment or the run to be resumed.
    """
    given = dict(given)
    if "methods" in given:
        given["methods"] = tuple(given["methods"])
    joined = "WORLD_SIZE" in environment
    if joined:
        given["workers"] = torchrun_workers(given.get("workers"), environment)
        if resume is None and "out" not in given:
            raise UserError("--out: expected a folder, since under torchrun all workers must know it, got none")
    if resume is not None:
        if "out" in given:
            raise UserError("--out: expected none with --resume, which goes on in the same folder")
        return resumed_config(Path(resume), given), joined
    given.setdefault("out", time.strftime("runs/%Y%m%d-%H%M%S"))
    return TrainConfig(**given), joined


def _train(config: TrainConfig, *, resume: bool, overwrite: bool, joined: bool) -> int:
    # here, since it needs the extra
    from lioncub.training.run import train
    from lioncub.training.worker import WorkerFailedError

    try:
        train(config, resume=resume, overwrite=overwrite, joined=joined)
    except KeyboardInterrupt:
        return fail("train", f"interrupted{_how_to_continue(config)}", 130)
    except WorkerFailedError as error:
        return fail(
            "train", f"{error}{stored(error.traceback, Path(config.out) / ERROR_NAME)}{_how_to_continue(config)}", 1
        )
    except (UserError, OSError) as error:
        return fail("train", str(error), 1)
    return 0


def _how_to_continue(config: TrainConfig) -> str:
    from lioncub.training.checkpoint import latest

    return f"; continue with: lioncub train --resume {config.out}" if latest(Path(config.out)) else ""
