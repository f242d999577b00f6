"""Run-time hyperparameters: one float64 in, the float32 coefficients of rule 1 out.

The complements 1 - beta and the decay 1 - lr*wd are computed in float64 and rounded once, so that every
implementation multiplies by the same float32 numbers.
"""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor


class Mix(NamedTuple):
    """Coefficients of ``kept * state + new * incoming``, float32 values held as Python floats."""

    kept: float
    new: float


def round_to_float32(value: float) -> float:
    """The float32 nearest to ``value``."""
    return ctypes.c_float(value).value


def mix_of(beta: Tensor, grad_scale: Tensor | None = None) -> Mix:
    """float32 (beta, 1 - beta); a ``grad_scale`` multiplies the second, exactly where it is -1 or a power of two."""
    b = float(beta)
    new = round_to_float32(1.0 - b)
    return Mix(round_to_float32(b), new if grad_scale is None else round_to_float32(new * float(grad_scale)))


def decay_of(lr: Tensor, weight_decay: Tensor) -> float:
    """float32 factor 1 - lr*weight_decay of decoupled weight decay."""
    return round_to_float32(1.0 - float(lr) * float(weight_decay))


def beta_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a beta in [0, 1]; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return _scalar(name, value)


def rate_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a finite number >= 0; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not 0.0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return _scalar(name, value)


def factor_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a finite number; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return _scalar(name, value)


def count_scalar(name: str, value: int | Tensor) -> Tensor:
    """A 0-dim int64 tensor of an integer; a 0-dim tensor passes through unread."""
    if isinstance(value, Tensor):
        return _scalar(name, value)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def _scalar(name: str, value: Scalar) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        return value
    # the device is named because torch.set_default_device must not send a scalar to an accelerator
    return torch.tensor(value, dtype=torch.float64, device="cpu")
