"""Lion's two averages by themselves, for those who need their values: c for a residual, m for a mean over workers."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.kernels.checks import check_float, check_same_storage_order
from lioncub.kernels.scalars import Scalar, beta_scalar, factor_scalar, mix_of


def lion_mix(exp_avg: Tensor, grad: Tensor, *, beta: Scalar, grad_scale: Scalar = 1.0) -> Tensor:
    """``fl(fl(beta*exp_avg) + fl((1-beta)*grad_scale*grad))`` in fp32 (rule 1).

    With beta1 this is c, whose sign is the vote; with beta2 the next momentum.

    Two products and a sum, each an operation of its own on every device, so nothing is fused; the bits are those of
    `lion_encode` and `apply_votes_`. Takes fp32, bf16 or fp16 tensors of one shape, changes neither.
    """
    check_float("grad", grad)
    check_float("exp_avg", exp_avg)
    check_same_storage_order("exp_avg", exp_avg, "grad", grad)
    kept, new = mix_of(beta_scalar("beta", beta), factor_scalar("grad_scale", grad_scale))
    return torch.add(kept * exp_avg.float(), new * grad.float())
