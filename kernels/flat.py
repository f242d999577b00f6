"""The Lion ops over a bucket: parameters and gradients as they are, their momentum and codes one flat buffer each.

Tensor i has its momentum from element ``starts[i]`` on and its codes from bit ``starts[i]`` on, a multiple of 64. A
compiler that sees these sees two buffers that are written, and not a view of them for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import (
    FLOAT_DTYPES,
    check_dense,
    check_float,
    check_integer,
    check_same_storage_order,
    check_status,
    storage_order_view,
)
from lioncub.kernels.gates import check_gate
from lioncub.kernels.layout import WORD_SIGNS, packed_bytes
from lioncub.kernels.lion import foreach_apply_votes_, foreach_lion_encode, foreach_lion_step_
from lioncub.kernels.list_checks import check_list_types
from lioncub.kernels.registry import register
from lioncub.kernels.rounding import Rounding, rounding_arguments, rounding_of
from lioncub.kernels.scalars import Scalar, beta_scalar, count_scalar, factor_scalar, rate_scalars


def encode_bucket(
    exp_avg: Tensor,
    grad: Sequence[Tensor],
    starts: Sequence[int],
    *,
    beta1: Scalar,
    parity: int | Tensor,
    out: Tensor,
    status: Tensor,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> None:
    """`foreach_lion_encode` of a bucket; ``out`` is uint8[n] for 8*n codes, ``status`` int32 with one per tensor."""
    check_list_types(grad=grad)
    _check_bucket(starts, grad, exp_avg=exp_avg, out=out)
    check_status(status, grad[0] if grad else None, len(grad))
    numbers = beta_scalar("beta1", beta1), count_scalar("parity", parity)
    _ENCODE(exp_avg, grad, starts, *numbers, out, status, factor_scalar("grad_scale", grad_scale), impl)


def apply_bucket_(
    param: Sequence[Tensor],
    packed: Tensor,
    starts: Sequence[int],
    *,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Sequence[Tensor],
    exp_avg: Tensor,
    beta2: Scalar,
    gate: Tensor,
    grad_scale: Scalar = 1.0,
    rounding: Rounding | None = None,
    tensors: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`foreach_apply_votes_` of a bucket. Mutates ``param`` and ``exp_avg`` of tensors whose ``gate`` is not zero."""
    check_list_types(param=param, grad=grad)
    _check_gradients(grad, param)
    _check_bucket(starts, param, exp_avg=exp_avg, packed=packed)
    check_gate(gate, param)
    rates = rate_scalars(lr, weight_decay)
    further = beta_scalar("beta2", beta2), factor_scalar("grad_scale", grad_scale)
    how = rounding_arguments(rounding, tensors, param)
    _APPLY(param, packed, starts, *rates, grad, exp_avg, *further, gate, *how, impl)


def step_bucket_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Tensor,
    starts: Sequence[int],
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    weight_decay: Scalar,
    gate: Tensor,
    grad_scale: Scalar = 1.0,
    rounding: Rounding | None = None,
    tensors: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`foreach_lion_step_` of a bucket. Mutates ``param`` and ``exp_avg`` of tensors whose ``gate`` is not zero."""
    check_list_types(param=param, grad=grad)
    _check_gradients(grad, param)
    _check_bucket(starts, param, exp_avg=exp_avg)
    check_gate(gate, param)
    rates = rate_scalars(lr, weight_decay)
    betas = beta_scalar("beta1", beta1), beta_scalar("beta2", beta2)
    how = rounding_arguments(rounding, tensors, param)
    _STEP(param, grad, exp_avg, starts, *rates, *betas, factor_scalar("grad_scale", grad_scale), gate, *how, impl)


def _check_gradients(grad: Sequence[Tensor], param: Sequence[Tensor]) -> None:
    if len(grad) != len(param):
        raise ValueError(f"grad: expected {len(param)} tensors, one for each of param, got {len(grad)}")
    for i, (g, x) in enumerate(zip(grad, param, strict=True)):
        check_float(f"grad[{i}]", g)
        check_float(f"param[{i}]", x)
        # a gradient may be in storage order already
        if g.shape != (x.numel(),) or not g.is_contiguous() or g.device != x.device:
            check_same_storage_order(f"grad[{i}]", g, f"param[{i}]", x)


def _check_bucket(starts: Sequence[int], like: Sequence[Tensor], **flat: Tensor) -> None:
    """Raise unless flat buffers have a place for each tensor: from a multiple of 64 on, behind the one before."""
    if len(starts) != len(like):
        raise ValueError(f"starts: expected {len(like)} numbers, one per tensor, got {len(starts)}")
    end = last = 0
    for i, (start, tensor) in enumerate(zip(starts, like, strict=True)):
        check_integer(f"starts[{i}]", start, least=end)
        if start % WORD_SIGNS:
            raise ValueError(f"starts[{i}]: expected a multiple of {WORD_SIGNS}, got {start}")
        last, end = start + tensor.numel(), start + 8 * packed_bytes(tensor.numel())
    for name, buffer in flat.items():
        is_codes = name != "exp_avg"
        check_dense(name, buffer, (torch.uint8,) if is_codes else FLOAT_DTYPES)
        least = end // 8 if is_codes else last
        if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.numel() < least:
            raise ValueError(
                f"{name}: expected a contiguous tensor of shape [n] with n >= {least}, got shape {tuple(buffer.shape)} "
                f"with strides {buffer.stride()}"
            )


def _encode(
    exp_avg: Tensor,
    grad: Sequence[Tensor],
    starts: Sequence[int],
    beta1: Tensor,
    parity: Tensor,
    out: Tensor,
    status: Tensor,
    grad_scale: Tensor,
    impl: str,
) -> None:
    foreach_lion_encode(
        _momenta(exp_avg, grad, starts),
        _in_storage_order("grad", grad),
        beta1=beta1,
        parity=parity,
        out=_codes(out, grad, starts),
        status=status,
        grad_scale=grad_scale,
        impl=impl,
    )


def _apply(
    param: Sequence[Tensor],
    packed: Tensor,
    starts: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    grad: Sequence[Tensor],
    exp_avg: Tensor,
    beta2: Tensor,
    grad_scale: Tensor,
    gate: Tensor,
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    numbers: Sequence[int],
    impl: str,
) -> None:
    foreach_apply_votes_(
        _in_storage_order("param", param),
        _codes(packed, param, starts),
        lr=lr,
        weight_decay=weight_decay,
        grad=_in_storage_order("grad", grad),
        exp_avg=_momenta(exp_avg, param, starts),
        beta2=beta2,
        grad_scale=grad_scale,
        gate=gate,
        rounding=rounding_of(rounding, rounding_step),
        tensors=numbers if rounding is not None else None,
        impl=impl,
    )


def _step(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Tensor,
    starts: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    grad_scale: Tensor,
    gate: Tensor,
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    numbers: Sequence[int],
    impl: str,
) -> None:
    foreach_lion_step_(
        _in_storage_order("param", param),
        _in_storage_order("grad", grad),
        _momenta(exp_avg, param, starts),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
        gate=gate,
        rounding=rounding_of(rounding, rounding_step),
        tensors=numbers if rounding is not None else None,
        impl=impl,
    )


def _in_storage_order(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [storage_order_view(name, tensor) for tensor in tensors]


def _momenta(exp_avg: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    return [exp_avg[start : start + tensor.numel()] for start, tensor in zip(starts, like, strict=True)]


def _codes(packed: Tensor, like: Sequence[Tensor], starts: Sequence[int]) -> list[Tensor]:
    parts = zip(starts, like, strict=True)
    return [packed[start // 8 : start // 8 + packed_bytes(tensor.numel())] for start, tensor in parts]


_ENCODE = register(
    "encode_bucket(Tensor exp_avg, Tensor[] grad, int[] starts, Tensor beta1, Tensor parity, Tensor(a!) out, "
    "Tensor(b!) status, Tensor grad_scale, str impl) -> ()",
    _encode,
)
_APPLY = register(
    "apply_bucket_(Tensor(a!)[] param, Tensor packed, int[] starts, Tensor lr, Tensor weight_decay, Tensor[] grad, "
    "Tensor(b!) exp_avg, Tensor beta2, Tensor grad_scale, Tensor gate, Tensor? rounding, "
    "Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _apply,
)
_STEP = register(
    "step_bucket_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!) exp_avg, int[] starts, Tensor lr, "
    "Tensor weight_decay, Tensor beta1, Tensor beta2, Tensor grad_scale, Tensor gate, Tensor? rounding, "
    "Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _step,
)
