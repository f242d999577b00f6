"""Run-time hyperparameters: one float64 in, the float32 coefficients of rule 1 out.

The complements 1 - beta and the decay 1 - lr*wd are computed in float64 and rounded once, so that every
implementation multiplies by the same float32 numbers.
"""

from __future__ import annotations

import ctypes
import math
import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from lioncub.kernels.checks import check_integer

Scalar = float | Tensor
# the largest finite float32
LARGEST = float(torch.finfo(torch.float32).max)

# a float32 value held as a Python float, or a 0-dim float32 tensor on the device that a kernel reads it from
Number = float | Tensor


class Mix(NamedTuple):
    """Coefficients of ``kept * state + new * incoming``."""

    kept: Number
    new: Number


def round_to_float32(value: float) -> float:
    """The float32 nearest to ``value``."""
    return ctypes.c_float(value).value


def mix_of(beta: Tensor, grad_scale: Tensor | None = None) -> Mix:
    """float32 (beta, 1 - beta); a ``grad_scale`` multiplies the second, exactly where it is -1 or a power of two."""
    kept = _value(beta)
    new = _rounded(1.0 - kept)
    if grad_scale is not None:
        wide = new.double() if isinstance(new, Tensor) else new
        new = _rounded(wide * _value(grad_scale))
    return Mix(_rounded(kept), new)


def rate_of(lr: Tensor, divisor: int = 1) -> Number:
    """float32 ``lr / divisor``."""
    return _rounded(_value(lr) / divisor)


def decay_of(lr: Tensor, weight_decay: Tensor) -> Number:
    """float32 factor 1 - lr*weight_decay of decoupled weight decay."""
    return _rounded(1.0 - _value(lr) * _value(weight_decay))


def parity_of(count: Tensor) -> int | Tensor:
    """The parity bit of a step counter, or the counter itself where reading it would wait for a device."""
    return count if is_elsewhere(count) else int(count) & 1


def is_elsewhere(scalar: Tensor) -> bool:
    """Whether a 0-dim tensor is on a device that the host would have to wait for."""
    return scalar.device.type != "cpu"


def _value(scalar: Tensor) -> Number:
    """In float64, where it is."""
    return scalar.double() if is_elsewhere(scalar) else float(scalar)


def _rounded(value: Number) -> Number:
    return value.float() if isinstance(value, Tensor) else round_to_float32(value)


def beta_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a beta in [0, 1]; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not (_is_number(name, value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return _scalar(name, value)


def rate_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a number >= 0 that is finite in float32; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not (_is_number(name, value) and 0.0 <= value < math.inf):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    _check_range(name, value)
    return _scalar(name, value)


def rate_scalars(lr: Scalar, weight_decay: Scalar) -> tuple[Tensor, Tensor]:
    """`rate_scalar` of both. Raises ValueError also where the decay lr*weight_decay is not finite in float32."""
    rates = rate_scalar("lr", lr), rate_scalar("weight_decay", weight_decay)
    if not isinstance(lr, Tensor) and not isinstance(weight_decay, Tensor) and lr * weight_decay > LARGEST:
        raise ValueError(f"lr, weight_decay: expected a finite product in float32, got {lr} * {weight_decay}")
    return rates


def factor_scalar(name: str, value: Scalar) -> Tensor:
    """A 0-dim float64 tensor of a number that is finite in float32; a 0-dim tensor passes through unread."""
    if not isinstance(value, Tensor) and not (_is_number(name, value) and -math.inf < value < math.inf):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    _check_range(name, value)
    return _scalar(name, value)


def count_scalar(name: str, value: int | Tensor) -> Tensor:
    """A 0-dim int64 tensor of an integer; a 0-dim tensor passes through unread."""
    if isinstance(value, Tensor):
        return _scalar(name, value)
    check_integer(name, value, -(2**63), 2**63 - 1)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def _is_number(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, float | int | numbers.Real):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")
    return True


def _check_range(name: str, value: Scalar) -> None:
    if not isinstance(value, Tensor) and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{name}: expected a number of at most {LARGEST:.8g}, which float32 holds, got {value}")


def _scalar(name: str, value: Scalar) -> Tensor:
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
        if value.device.type == "meta":
            raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
        return value
    # the device is named because torch.set_default_device must not send a scalar to an accelerator
    return torch.tensor(value, dtype=torch.float64, device="cpu")
