"""The options that most users leave alone, in frozen configs: how votes are carried, and precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from lioncub.arguments import check_flag
from lioncub.collectives import Profile

ROUNDINGS = ("nearest", "stochastic")
MOMENTUM_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Comm:
    """Options of communication. Checked by `LionCub`, which informs the other ranks of an error.

    Args:
        algorithm: "all_gather", "reduce_scatter", "hierarchical", "all_reduce" or "auto": for each bucket the one that
            the cost model finds fastest, corrected by the first steps; `LionCub.explain` shows why.
        mesh: a DeviceMesh of shape [nodes, workers per node]; else the nodes are found by host names and
            LOCAL_WORLD_SIZE.
        profile: the measurement of this group by ``lioncub probe``, as a path or a `Profile`; unless given, "auto"
            measures at construction for about half a second.
        bucket_mb: largest message, in MiB of packed votes (1 MiB is 8.4 M parameters); unless given, the model chooses.
        broadcast: start from the parameters of the group's first rank.
        drift_every: steps between measurements of how far momentum has drifted apart, for `LionCub.stats` and
            ``MomentumSync(select="auto")``; 100 for that, else never.
    """

    algorithm: str = "auto"
    mesh: DeviceMesh | None = None
    profile: str | PathLike[str] | Profile | None = None
    bucket_mb: float | None = None
    broadcast: bool = True
    drift_every: int | None = None


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Options of rounding, master weights and the dtype of momentum.

    Args:
        param_rounding: of bf16 and fp16 parameters: "nearest", or "stochastic", up or down at random so that steps
            smaller than their spacing add up on average; no memory, no state.
        master_weights: keep bf16 and fp16 parameters in fp32 too, in ``state[p]["master"]``, and move those.
        momentum_dtype: torch.float32 or torch.bfloat16; the latter is rounded as ``param_rounding`` says.
        rounding_seed: of stochastic rounding.

    Raises ValueError or TypeError, naming the argument, for values that are impossible.
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


_CONFIG_OF = {
    **dict.fromkeys(Comm.__dataclass_fields__, ("comm", "Comm")),
    **dict.fromkeys(Precision.__dataclass_fields__, ("precision", "Precision")),
}


def refuse_unknown(optimizer: str, arguments: Mapping[str, Any]) -> None:
    """Raise TypeError for arguments that an optimizer does not have, naming the config that has them."""
    for name in arguments:
        config = _CONFIG_OF.get(name)
        known = f"; write {config[0]}={config[1]}({name}=...)" if config is not None else ""
        raise TypeError(f"{optimizer}() got an unexpected keyword argument {name!r}{known}")


def check_config(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless ``value`` is a config of this kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__}(...), got {type(value).__name__} {value!r}")
