"""How bf16 and fp16 parameters learn from steps smaller than their spacing, and in which dtype momentum is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import check_flag
from lioncub.kernels import Rounding

ROUNDINGS = ("nearest", "stochastic")
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The arguments of both optimizers about precision, checked.

    Raises ValueError or TypeError, naming the argument, for what is impossible.
    """

    param_rounding: str = "nearest"
    master_weights: bool = False
    momentum_dtype: torch.dtype = torch.float32
    rounding_seed: int = 0

    def __post_init__(self) -> None:
        if self.param_rounding not in ROUNDINGS:
            raise ValueError(f"param_rounding: expected one of {ROUNDINGS}, got {self.param_rounding!r}")
        check_flag("master_weights", self.master_weights)
        if self.momentum_dtype not in MOMENTUM_DTYPES:
            raise ValueError(f"momentum_dtype: expected torch.float32 or torch.bfloat16, got {self.momentum_dtype!r}")
        if isinstance(self.rounding_seed, bool) or not isinstance(self.rounding_seed, int):
            raise TypeError(f"rounding_seed: expected an integer, got {self.rounding_seed!r}")
        if self.master_weights and self.param_rounding != "nearest":
            raise ValueError(
                "param_rounding: expected 'nearest' with master_weights=True, since masters lose nothing, got "
                f"{self.param_rounding!r}"
            )

    @property
    def keeps_small_steps(self) -> bool:
        """Whether a low-precision parameter is moved by steps smaller than its spacing."""
        return self.master_weights or self.param_rounding == "stochastic"

    def rounding(self, step: int | Tensor, rank: int) -> Rounding | None:
        """How the kernels round in a step of this worker; None: to nearest."""
        if self.param_rounding == "nearest":
            return None
        return Rounding(self.rounding_seed, step, rank)

    def facts(self) -> dict[str, Any]:
        """What workers must have in common, by the names that an error gives it."""
        return {
            "param_rounding": self.param_rounding,
            "master_weights": self.master_weights,
            "momentum_dtype": str(self.momentum_dtype),
            "rounding_seed": self.rounding_seed,
        }
