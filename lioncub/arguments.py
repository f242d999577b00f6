"""Arguments that both optimizers share: hyperparameters, read anew at every step, and which tensors are accepted."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from lioncub.kernels.checks import check_float, is_dense, storage_order_view


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one param group at one step, as numbers."""

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
        for i, beta in enumerate((self.beta1, self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")

    @classmethod
    def of(cls, group: dict[str, Any]) -> Hyperparameters:
        """Those of a param group now. Raises ValueError or TypeError where one is impossible."""
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        return cls(
            lr=_number("lr", group["lr"]),
            beta1=_number("betas[0]", betas[0]),
            beta2=_number("betas[1]", betas[1]),
            weight_decay=_number("weight_decay", group["weight_decay"]),
            maximize=bool(group["maximize"]),
        )


def parameter_names(group: dict[str, Any], group_index: int) -> list[str]:
    """The names that errors use: the group's own, or its index and the parameter's."""
    own: list[str] | None = group.get("param_names")
    return own or [f"param_groups[{group_index}]['params'][{i}]" for i in range(len(group["params"]))]


def check_parameter(name: str, param: Tensor) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless it is a dense local float tensor."""
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if tensor_module is not None and isinstance(param, tensor_module.DTensor):
        raise TypeError(
            f"parameter {name}: expected a local tensor, got a DTensor; sharded parameters are not supported"
        )
    if getattr(param, "_is_flat_param", False):
        raise TypeError(f"parameter {name}: expected a whole tensor, got a shard of FullyShardedDataParallel")
    check_float(f"parameter {name}", param)
    if not is_dense(param.shape, param.stride()):
        raise ValueError(
            f"parameter {name}: expected a dense tensor without gaps or overlaps, "
            f"got shape {tuple(param.shape)} with strides {param.stride()}"
        )


def check_no_overlap(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError where two different parameters share memory: each would be updated twice."""
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in named
        if p.numel()
    )
    for (device, _, end, first), (next_device, start, _, second) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(f"parameters {first} and {second}: expected separate memory, got tensors that overlap")


def gradient_of(name: str, param: Tensor) -> Tensor | None:
    """The gradient as a 1-d view in the parameter's storage order, or None.

    A gradient that autograd left in another storage order than the parameter's is copied into it; every other one is
    read in place. Raises TypeError for a gradient that is sparse or of a dtype that the kernels do not read.
    """
    grad = param.grad
    if grad is None:
        return None
    check_float(f"gradient of {name}", grad)
    if grad.stride() != param.stride() and not (grad.is_contiguous() and param.is_contiguous()):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return storage_order_view(f"gradient of {name}", grad)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}")
    return float(value)
