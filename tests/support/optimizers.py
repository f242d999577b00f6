"""The optimizers with all options as plain arguments, so that tests combine them in one dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

import lioncub
from lioncub import Comm, Precision

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "stochastic": {"param_rounding": "stochastic"},
    "stochastic, bf16 momentum": {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "rounding_seed": 5},
    "masters": {"master_weights": True},
    "masters, bf16 momentum": {"master_weights": True, "momentum_dtype": torch.bfloat16},
}

_COMM, _PRECISION = (tuple(field.name for field in fields(config)) for config in (Comm, Precision))


def grouped(options: Mapping[str, Any]) -> dict[str, Any]:
    """Put the options of `Comm` and `Precision` into one each."""
    found = {name: value for name, value in options.items() if name not in (*_COMM, *_PRECISION)}
    for name, config, known in (("comm", Comm, _COMM), ("precision", Precision, _PRECISION)):
        given = {option: options[option] for option in known if option in options}
        if given:
            found[name] = config(**given)
    return found


class LionCub(lioncub.LionCub):
    """`lioncub.LionCub` with plain options, by one algorithm: "auto" measures the links, half a second each time."""

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        options.setdefault("algorithm", "reduce_scatter")
        super().__init__(params, *args, **grouped(options))


class Lion(lioncub.Lion):
    """`lioncub.Lion` with plain options."""

    def __init__(self, params: Any, *args: Any, **options: Any) -> None:
        super().__init__(params, *args, **grouped(options))
