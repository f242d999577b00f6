"""Rounding of a step, and fp32 masters of bf16 and fp16 parameters: which are updated in their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.config import Precision
from lioncub.kernels import Rounding
from lioncub.kernels.rounding import current_values
from lioncub.params import Named, like_param, local_of


def keeps_small_steps(precision: Precision) -> bool:
    """Whether a low-precision parameter is moved by steps smaller than its spacing."""
    return precision.master_weights or precision.param_rounding == "stochastic"


def rounding_of(precision: Precision, step: int | Tensor, rank: int) -> Rounding | None:
    """Return how the kernels round in a step of this rank; None: to nearest."""
    if precision.param_rounding == "nearest":
        return None
    return Rounding(precision.rounding_seed, step, rank)


def master_of(param: Tensor) -> Tensor:
    """Return a new master: the parameter in fp32, in its storage order, sharded as it is."""
    local = local_of(param.detach())
    return like_param(param, torch.empty_like(local, dtype=torch.float32).copy_(local))


@dataclass(frozen=True)
class Masters:
    """The masters in ``state[p]["master"]`` of bf16 and fp16 parameters; an fp32 one has none.

    Where ``in_use`` is false, no parameter has one, and none is looked for.
    """

    state: Mapping[Tensor, dict[str, Any]]
    in_use: bool = True

    def of(self, named: Named) -> list[Tensor]:
        """Return the local tensors of all masters, as kernels take them. Raises RuntimeError where one is not ours."""
        return [local_of(master) for *_, master in self._found(named)]

    def named(self, named: Named) -> list[tuple[str, Tensor]]:
        """Return the local values from which parameters will move, with their names: masters that are up to date."""
        return [
            (f"{name} (master)", current_values(local_of(param.detach()), local_of(master)))
            for name, param, master in self._found(named)
        ]

    def _found(self, named: Named) -> list[tuple[str, Tensor, Tensor]]:
        found: list[tuple[str, Tensor, Tensor]] = []
        for name, param in named if self.in_use else ():
            if param.dtype == torch.float32:
                continue
            master: Tensor | None = self.state[param].get("master")
            if master is None or (master.dtype, master.shape, master.stride()) != (
                torch.float32,
                param.shape,
                param.stride(),
            ):
                raise RuntimeError(
                    f"state of parameter {name}: expected the master made at construction, got another one"
                )
            found.append((name, param, master))
        return found
