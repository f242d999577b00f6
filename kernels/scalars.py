"""Run-time hyperparameters: one float64 in, the float32 coefficients of rule 1 out.

The complements 1 - beta and the decay 1 - lr*wd are computed in float64 and rounded once, so that every
implementation multiplies by the same float32 numbers.
"""

from __future__ import annotations

import ctypes
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


# of kernels that take coefficients and use none
NO_MIX = Mix(0.0, 0.0)


def round_to_float32(value: float) -> float:
    """Return the float32 nearest to ``value``."""
    return ctypes.c_float(value).value


def mix_of(beta: Tensor, grad_scale: Tensor | None = None) -> Mix:
    """float32 (beta, 1 - beta); a ``grad_scale`` multiplies the second, exactly where it is -1 or a power of two."""
    kept = _value(beta)
    new = _rounded(1.0 - kept)
    if grad_scale is not None:
        new = _rounded((new.double() if isinstance(new, Tensor) else new) * _value(grad_scale))
    return Mix(_rounded(kept), new)


def rates_of(lr: Tensor, weight_decay: Tensor, divisor: int = 1) -> tuple[Number, Number]:
    """float32 ``lr / divisor``, and the factor 1 - lr*weight_decay of decoupled weight decay."""
    rate = _value(lr)
    return _rounded(rate / divisor), _rounded(1.0 - rate * _value(weight_decay))


def _value(scalar: Tensor) -> Number:
    """Return float64, where the scalar is: the host never waits for a device."""
    return float(scalar) if scalar.is_cpu else scalar.double()


def _rounded(value: Number) -> Number:
    return value.float() if isinstance(value, Tensor) else ctypes.c_float(value).value


def parity_of(count: Tensor) -> int | Tensor:
    """Return the parity bit of a step counter, or the counter itself where reading it would wait for a device."""
    return int(count) & 1 if count.is_cpu else count


def float_scalar(name: str, value: Scalar, least: float = -LARGEST, most: float = LARGEST) -> Tensor:
    """Return a 0-dim float64 tensor of a number in ``least`` .. ``most``; a 0-dim tensor passes through unread."""
    if isinstance(value, Tensor):
        return _checked_scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, float | int | numbers.Real):
        raise TypeError(f"{name}: expected a number or a 0-dim tensor, got {type(value).__name__}")
    if not least <= value <= most:
        raise ValueError(f"{name}: expected a number in [{least:.8g}, {most:.8g}], got {value}")
    # the device is named because torch.set_default_device must not send a scalar to an accelerator
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def rate_scalars(lr: Scalar, weight_decay: Scalar) -> tuple[Tensor, Tensor]:
    """`float_scalar` of both. Raises ValueError also where the decay lr*weight_decay is not finite in float32."""
    rates = float_scalar("lr", lr, 0.0), float_scalar("weight_decay", weight_decay, 0.0)
    if not isinstance(lr, Tensor) and not isinstance(weight_decay, Tensor) and lr * weight_decay > LARGEST:
        raise ValueError(f"lr, weight_decay: expected a finite product in float32, got {lr} * {weight_decay}")
    return rates


def count_scalar(name: str, value: int | Tensor) -> Tensor:
    """Return a 0-dim int64 tensor of an integer; a 0-dim tensor passes through unread."""
    if isinstance(value, Tensor):
        return _checked_scalar(name, value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        check_integer(name, value, -(2**63), 2**63 - 1)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def _checked_scalar(name: str, value: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a 0-dim tensor, got shape {tuple(value.shape)}")
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    return value
