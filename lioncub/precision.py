"""Rounding of a step, and fp32 masters of bf16 and fp16 parameters: which are updated in their place."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lioncub.config import Precision
from lioncub.kernels import Rounding
from lioncub.kernels.checks import storage_order_view
from lioncub.params import is_sharded, like_param, local_of

Named = Sequence[tuple[str, Tensor]]


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
    """The masters in ``state[p]["master"]``; a parameter without one moves itself.

    ``versions`` are those of the parameters when they were last known to be their masters, rounded to nearest. Where
    ``in_use`` is false, no parameter has one, and none is looked for.
    """

    state: Mapping[Tensor, dict[str, Any]]
    versions: MutableMapping[Tensor, int]
    in_use: bool = True

    def of(self, name: str, param: Tensor) -> Tensor:
        """Return the 1-d view, in storage order, of `moved`."""
        return storage_order_view(name, self.moved(name, param))

    def moved(self, name: str, param: Tensor) -> Tensor:
        """Return the local tensor that is updated: that of the parameter's master, or its own."""
        if not self.in_use:
            return local_of(param)
        master: Tensor | None = self.state[param].get("master")
        if master is None:
            return local_of(param)
        if master.dtype != torch.float32 or master.shape != param.shape or master.stride() != param.stride():
            raise RuntimeError(f"state of parameter {name}: expected the master made at construction, got another one")
        return local_of(master)

    def refresh(self, named: Named) -> None:
        """Copy a parameter into its master where it was changed from outside since `write_back`."""
        for _, param in named:
            master = self.state[param].get("master")
            # operations on lists of DTensors, as of clipping or averaging, do not count versions
            is_known = self.versions.get(param) == param._version and not is_sharded(param)
            if master is None or is_known:
                continue
            mine, theirs = local_of(master), local_of(param.detach())
            if not torch.equal(mine.to(theirs.dtype), theirs):
                mine.copy_(theirs)
            self.versions[param] = param._version

    def write_back(self, params: Sequence[Tensor]) -> None:
        """Round the masters of these parameters, to nearest, into them."""
        if not self.in_use:
            return
        low = [param for param in params if "master" in self.state[param]]
        if low:
            masters = [local_of(self.state[param]["master"]) for param in low]
            torch._foreach_copy_([local_of(param) for param in low], masters)
        if not torch.compiler.is_compiling():
            self.versions.update({param: param._version for param in low})

    def named(self, named: Named) -> list[tuple[str, Tensor]]:
        """Return the local tensors of all masters with their names."""
        return [
            (f"{name} (master)", local_of(self.state[p]["master"])) for name, p in named if "master" in self.state[p]
        ]
