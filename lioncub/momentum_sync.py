"""When momentum is averaged over workers, which parts of it, and in how many bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor

from lioncub.arguments import check_count
from lioncub.collectives.average import check_dtype

SCHEDULES = ("fixed", "staggered")
Selection = str | Sequence[str] | Callable[[str, Tensor], bool] | None


@dataclass(frozen=True, kw_only=True)
class MomentumSync:
    """A policy of averaging momentum over workers (Lion Cub, arXiv 2411.16462, section 3): m <- mean of all m.

    Args:
        every: k, in steps.
        schedule: "fixed": in every k-th step; "staggered": in each step the next 1/k of the elements, so that
            traffic is even.
        select: which parameters: all (None), those whose names match one of these patterns (as in a shell: ``*.bias``),
            those for which a function of name and parameter is true, or "auto": those whose momentum differs most
            between workers, measured every ``drift_every`` steps (see `LionCub`), as many as ``budget`` allows.
        budget: with "auto", the bytes of synchronization as a fraction of the votes', both as one worker's messages
            and on average over steps.
        dtype: how values travel: "fp32", "bf16", or "int8" with a scale per 64 of them.
    """

    every: int = 1
    schedule: str = "fixed"
    select: Selection = None
    budget: float | None = None
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        check_count("every", self.every, "a number of steps")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule: expected one of {SCHEDULES}, got {self.schedule!r}")
        check_dtype(self.dtype)
        if isinstance(self.select, str) and self.select != "auto":
            raise ValueError(f"select: expected 'auto', a list of patterns or a function, got {self.select!r}")
        if isinstance(self.select, Sequence) and not all(isinstance(pattern, str) for pattern in self.select):
            raise TypeError(f"select: expected patterns, which are strings, got {self.select!r}")
        if not (self.select is None or isinstance(self.select, Sequence) or callable(self.select)):
            raise TypeError(f"select: expected 'auto', a list of patterns or a function, got {self.select!r}")
        if isinstance(self.budget, bool):
            raise TypeError(f"budget: expected a fraction > 0 or None, got {self.budget!r}")
        if self.is_auto and not (isinstance(self.budget, int | float) and 0 < self.budget < float("inf")):
            raise ValueError(f"budget: expected a fraction > 0 with select='auto', got {self.budget!r}")
        if not self.is_auto and self.budget is not None:
            raise ValueError(f"budget: expected it with select='auto' only, got {self.budget!r}")

    @property
    def is_auto(self) -> bool:
        """Whether the parameters are chosen by measured drift."""
        return isinstance(self.select, str)

    def chooses(self, name: str, param: Tensor) -> bool:
        """Whether a parameter can ever be synchronized."""
        if self.select is None or self.is_auto:
            return True
        if callable(self.select):
            return bool(self.select(name, param))
        return any(fnmatchcase(name, pattern) for pattern in self.select)

    def facts(self, named: Sequence[tuple[str, Tensor]]) -> dict[str, object]:
        """What workers must have in common. Raises ValueError where ``select`` chooses none of these parameters."""
        chosen = [name for name, param in named if self.chooses(name, param)]
        if not chosen:
            raise ValueError(f"select: expected it to choose at least one parameter, got none by {self.select!r}")
        return {
            "momentum_sync": (self.every, self.schedule, self.is_auto, self.budget, self.dtype),
            "the parameters whose momentum is synchronized": chosen,
        }

    def piece(self, step: int) -> tuple[int, int] | None:
        """(i, k) where the i-th of k equal pieces of the elements is due in step ``step``; None for nothing."""
        if self.schedule == "staggered":
            return step % self.every, self.every
        return (0, 1) if (step + 1) % self.every == 0 else None


def check_momentum_sync(value: object) -> MomentumSync | None:
    """``value`` itself. Raises TypeError unless it is a `MomentumSync` or None."""
    if value is None or isinstance(value, MomentumSync):
        return value
    raise TypeError(f"momentum_sync: expected None or MomentumSync(...), got {type(value).__name__} {value!r}")
