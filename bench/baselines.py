"""What the kernels are measured against: streams through memory, and the ways to do the same without them."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


@numba.njit(nogil=True)
def stream(a: Any, b: Any, s: np.float32) -> None:
    """a += s*b in place: reads 8 bytes and writes 4 per element."""
    for j in range(a.size):
        a[j] += s * b[j]


@numba.njit(nogil=True)
def read(a: Any, b: Any) -> int:
    """Read two int64 arrays and write nothing, each in four places by turns, the fastest order found."""
    # short of a quarter, as in the kernels, so that the places are not a power of two apart
    size = a.size // 4 - 160
    a0, a1, a2, a3 = a[:size], a[size : 2 * size], a[2 * size : 3 * size], a[3 * size : 4 * size]
    b0, b1, b2, b3 = b[:size], b[size : 2 * size], b[2 * size : 3 * size], b[3 * size : 4 * size]
    seen = 0
    for j in range(size):
        seen |= a0[j] | a1[j] | a2[j] | a3[j] | b0[j] | b1[j] | b2[j] | b3[j]
    for j in range(4 * size, a.size):
        seen |= a[j] | b[j]
    return seen


def torch_encode(exp_avg: Tensor, grad: Tensor, beta1: float, powers: Tensor) -> Tensor:
    """Sign bits of the update in plain torch ops; zeros get bit 0. The size is a multiple of 8."""
    update = exp_avg.mul(beta1).add_(grad, alpha=1 - beta1)
    return torch.sum((update > 0).view(-1, 8) * powers, dim=1, dtype=torch.uint8)


def torch_apply(param: Tensor, packed: Tensor, lr: float, decay: float, shifts: Tensor) -> None:
    """param = param*decay - lr*(+1/-1) in plain torch ops."""
    votes = ((packed.unsqueeze(1) >> shifts) & 1).view(-1).to(torch.float32).mul_(2).sub_(1)
    param.mul_(decay).add_(votes, alpha=-lr)


def numpy_vote(packed: Any) -> Any:
    """Majority of an even number of voters by unpacking, summing and packing; ties give 0."""
    ones = np.unpackbits(packed, axis=1, bitorder="little").sum(axis=0, dtype=np.uint8)
    return np.packbits(ones > packed.shape[0] // 2, bitorder="little")


def foreach_lion_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
) -> None:
    """Lion's step in torch._foreach ops."""
    update = torch._foreach_mul(exp_avgs, beta1)
    torch._foreach_add_(update, grads, alpha=1 - beta1)
    torch._foreach_sign_(update)
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_add_(params, update, alpha=-lr)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta2)
