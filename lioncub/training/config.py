"""What a run is told to do: one frozen dataclass, checked when it is built and stored beside the run's results."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lioncub.collectives import ALGORITHMS as VOTE_ALGORITHMS
from lioncub.kernels.backends import IMPLS

METHODS = ("lion", "lioncub")
ALGORITHMS = ("auto", *VOTE_ALGORITHMS)
# in the folder of a run that failed: the worker's traceback
ERROR_NAME = "error.txt"


class UserError(ValueError):
    """Something the user can mend; its text is shown alone, without a traceback."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Times are in seconds, sizes in bytes (a token is a byte).

    Raises:
        UserError: a value is out of range; the message names the flag, what was expected and what came.
    """

    methods: tuple[str, ...] = ("lioncub",)
    data: str | None = None
    out: str = ""
    workers: int = 4
    layers: int = 5
    heads: int = 4
    width: int = 128
    context: int = 128
    batch: int = 8
    steps: int = 500
    seed: int = 0
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    warmup: int = 20
    algorithm: str = "auto"
    impl: str = "auto"
    block: int = 10
    eval_every: int = 50
    eval_windows: int = 64
    checkpoint_every: int = 200
    timeout: float = 60.0

    def __post_init__(self) -> None:
        """Check every field; the first bad one raises."""
        for name in ("workers", "layers", "heads", "width", "batch", "steps", "block", "eval_windows"):
            _require(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        for name in ("seed", "warmup", "eval_every", "checkpoint_every"):
            _require(getattr(self, name) >= 0, name, "an integer >= 0", getattr(self, name))
        _require(self.context >= 2, "context", "an integer >= 2", self.context)
        _require(self.width % self.heads == 0, "width", f"a multiple of --heads ({self.heads})", self.width)
        # written so that nan fails too
        _require(0 < self.lr < float("inf"), "lr", "a finite number > 0", self.lr)
        _require(0 <= self.weight_decay < float("inf"), "weight_decay", "a finite number >= 0", self.weight_decay)
        _require(0 < self.timeout < float("inf"), "timeout", "a finite number of seconds > 0", self.timeout)
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        _require(in_range, "betas", "two numbers in [0, 1)", self.betas)
        _require(self.algorithm in ALGORITHMS, "algorithm", f"one of {', '.join(ALGORITHMS)}", self.algorithm)
        _require(self.impl in IMPLS, "impl", f"one of {', '.join(IMPLS)}", self.impl)
        known = bool(self.methods) and all(method in METHODS for method in self.methods)
        _require(known, "method", f"one of {', '.join(METHODS)}", self.methods)
        _require(len(set(self.methods)) == len(self.methods), "method", "each method once", self.methods)

    def to_json(self) -> str:
        """The settings as indented JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


# settings that may change on resume, since they do not change what is computed
FREE_ON_RESUME = frozenset({"out", "data", "checkpoint_every", "timeout"})


def flag(name: str) -> str:
    """The command-line flag of a field of TrainConfig."""
    return "--method" if name == "methods" else "--" + name.replace("_", "-")


def config_from_json(text: str, source: str) -> TrainConfig:
    """The inverse of :meth:`TrainConfig.to_json`; `source` names the text in the error message."""
    try:
        fields = json.loads(text)
        return TrainConfig(**{**fields, "methods": tuple(fields["methods"]), "betas": tuple(fields["betas"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{source}: not the settings of a lioncub run: {error}") from error


def resumed_config(directory: Path, given: dict[str, Any]) -> TrainConfig:
    """Settings of the run in `directory`, with those of `given` that may change on resume.

    Raises:
        UserError: there is no run, or `given` contradicts it.
    """
    path = directory / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--resume {directory}: cannot read {path.name}: {error.strerror}") from error
    saved = config_from_json(text, str(path))
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != getattr(saved, name):
            raise UserError(
                f"{flag(name)}: expected {_shown(getattr(saved, name))}, as in the run {directory} to be resumed,"
                f" got {_shown(value)}"
            )
    return dataclasses.replace(saved, **{**given, "out": str(directory)})


def _require(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise UserError(f"{flag(name)}: expected {expected}, got {_shown(got)}")


def _shown(value: object) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, tuple) else str(value)
