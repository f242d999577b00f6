"""Arguments that both optimizers share: hyperparameters, read anew at every step, and which tensors are accepted."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lioncub.kernels.checks import FLOAT_DTYPES, check_float, is_dense, storage_order_view
from lioncub.kernels.scalars import Scalar

# float32's largest number
_LARGEST = torch.finfo(torch.float32).max
# steps fit into a signed 64-bit word of a header
_STEPS = 2**62


@dataclass(frozen=True)
class Hyperparameters:
    """The hyperparameters of one param group at one step: numbers, or 0-dim tensors that the host must not wait for."""

    lr: Scalar
    beta1: Scalar
    beta2: Scalar
    weight_decay: Scalar
    maximize: bool

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            # kernels take it as float32, in which a larger one is infinite
            if not isinstance(value, Tensor) and not 0 <= value <= _LARGEST:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value}{_in_float32(value)}")
        known = not isinstance(self.lr, Tensor) and not isinstance(self.weight_decay, Tensor)
        if known and self.lr * self.weight_decay > _LARGEST:
            raise ValueError(f"weight_decay: expected lr * weight_decay finite in float32, got {self.weight_decay}")
        for i, beta in enumerate((self.beta1, self.beta2)):
            if not isinstance(beta, Tensor) and not 0 <= beta < 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")

    @classmethod
    def of(cls, group: Mapping[str, Any], *, keep_tensors: bool = False) -> Hyperparameters:
        """Return those of a param group now. Raises ValueError or TypeError where one is impossible.

        Tensors on another device than the CPU are kept as they are, with ``keep_tensors`` all of them.
        """
        betas = group["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r}")
        return cls(
            lr=_number("lr", group["lr"], keep_tensors),
            beta1=_number("betas[0]", betas[0], keep_tensors),
            beta2=_number("betas[1]", betas[1], keep_tensors),
            weight_decay=_number("weight_decay", group["weight_decay"], keep_tensors),
            maximize=check_flag("maximize", group["maximize"]),
        )

    def words(self) -> tuple[Scalar, ...]:
        """Return all of them as numbers."""
        return self.lr, self.beta1, self.beta2, self.weight_decay, float(self.maximize)


def check_flag(name: str, value: Any) -> bool:
    """Return ``value``. Raises TypeError unless it is True or False: any string, "no" included, counts as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def check_count(name: str, value: Any, what: str) -> int:
    """Return ``value``. Raises ValueError unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected {what} >= 1, got {value!r}")
    return value


def step_of(group: Mapping[str, Any]) -> int:
    """Return the step counter of a param group, a number or 0-dim tensor. Raises TypeError or ValueError for others."""
    if "step" not in group:
        raise ValueError("step: expected a step counter in every param group, got none")
    step = group["step"]
    if isinstance(step, Tensor) and step.numel() == 1 and not (step.is_floating_point() or step.is_complex()):
        step = step.item()
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: expected an integer >= 0, got {step!r}")
    if not 0 <= step < _STEPS:
        raise ValueError(f"step: expected an integer from 0 to 2^62 - 1, got {step}")
    return step


def parameter_names(group: dict[str, Any], group_index: int) -> list[str]:
    """Return the names that errors use: the group's own, or its index and the parameter's."""
    own: list[str] | None = group.get("param_names")
    return own or [f"param_groups[{group_index}]['params'][{i}]" for i in range(len(group["params"]))]


def check_parameter(name: str, param: Tensor) -> None:
    """Raise TypeError or ValueError, naming the parameter, unless it is a dense local float tensor with data."""
    if torch.nn.parameter.is_lazy(param):
        raise TypeError(f"parameter {name}: expected an initialized tensor, got a lazy one; run a forward pass first")
    check_float(f"parameter {name}", param)
    if param.is_meta:
        raise ValueError(
            f"parameter {name}: expected a tensor with data, got one on the meta device; materialize the module "
            "(to_empty, then its initialization or checkpoint) first"
        )
    if param.numel() and not is_dense(param.shape, param.stride()):
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


def refuse_shards(named: Sequence[tuple[str, Tensor]], *, are_broadcast: bool) -> None:
    """Raise TypeError where parameters are shards of FullyShardedDataParallel, or look so and are to be broadcast.

    Shards of one parameter are other elements on every rank: the first rank's must not overwrite the others'.
    """
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, param in named:
        if getattr(param, "_is_flat_param", False) or getattr(param, "_fsdp_flattened", False):
            raise TypeError(
                f"parameter {name}: expected a whole tensor, got a shard of FullyShardedDataParallel, which cannot be "
                "voted on; train the module without it, or use Lion"
            )
        if are_broadcast and param.numel():
            by_storage.setdefault(param.untyped_storage().data_ptr(), []).append((name, param))
    for sharing in by_storage.values():
        # those of an nn.LSTM share memory too, matrices among them
        if len(sharing) > 1 and all(param.dim() == 1 for _, param in sharing):
            raise TypeError(
                f"parameters {sharing[0][0]} and {sharing[1][0]}: expected whole tensors, got 1-d views into one flat "
                "storage, as shards of FullyShardedDataParallel are, which broadcasting would destroy; where they are "
                "whole on every rank, pass broadcast=False with equal parameters, or give each its own memory"
            )


def refuse_zero() -> None:
    """Raise TypeError where ZeroRedundancyOptimizer builds this optimizer: it gives every rank other parameters."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame: FrameType | None = sys._getframe(1)
    while module is not None and frame is not None:
        if isinstance(frame.f_locals.get("self"), module.ZeroRedundancyOptimizer):
            raise TypeError(
                "optimizer_class: expected an optimizer that steps on each rank alone, such as lioncub.Lion, got "
                "LionCub in ZeroRedundancyOptimizer, whose ranks have different parameters and cannot vote on them"
            )
        frame = frame.f_back


def hint_of_shards(message: str) -> str:
    """Return a hint for an error about 1-d parameters of different sizes, as the shards of one parameter are."""
    shapes = re.findall(r"shape \((.*?)\)", message)
    if message.startswith("workers disagree on parameter ") and all(re.fullmatch(r"\d+,", shape) for shape in shapes):
        return "; shards, as of FullyShardedDataParallel, cannot be voted on: every rank needs whole parameters"
    return ""


def gradient_of(name: str, param: Tensor, grad: Tensor | None) -> Tensor | None:
    """Return a parameter's gradient as a 1-d view in its storage order, or None.

    A gradient that autograd left in another storage order than the parameter's is copied into it; every other one is
    read in place. Raises TypeError or ValueError for a gradient that is sparse, of a dtype that the kernels do not
    read, or of another shape or device than the parameter.
    """
    if grad is None:
        return None
    if grad.layout is not torch.strided or grad.dtype not in FLOAT_DTYPES:
        check_float(f"gradient of {name}", grad)
    if grad.shape != param.shape or grad.device != param.device:
        raise ValueError(
            f"gradient of {name}: expected the parameter's shape {tuple(param.shape)} on {param.device}, got "
            f"{tuple(grad.shape)} on {grad.device}"
        )
    if grad.stride() != param.stride() and not (grad.is_contiguous() and param.is_contiguous()):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return storage_order_view(f"gradient of {name}", grad)


def _number(name: str, value: Any, keep_tensors: bool) -> Scalar:
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}")
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool or value.is_meta:
            raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {value!r}")
        return value.view(()) if keep_tensors or value.device.type != "cpu" else float(value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that float64 holds, got {value!r}") from None


def _in_float32(value: float) -> str:
    return ", which float32 cannot hold" if _LARGEST < value < math.inf else ""
