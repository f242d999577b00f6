"""The Lion ops over a bucket: parameters and gradients as they are, their momentum and codes one flat buffer each.

Tensor i has its momentum from element ``starts[i]`` on and its codes from bit ``starts[i]`` on, a multiple of 64. A
compiler that sees these sees two buffers that are written, and not a view of them for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lioncub.kernels.checks import storage_order_view
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.lion import foreach_apply_votes_, foreach_lion_encode, foreach_lion_step_
from lioncub.kernels.registry import register
from lioncub.kernels.rounding import Rounding, rounding_arguments, rounding_of
from lioncub.kernels.scalars import Scalar, beta_scalar, count_scalar, factor_scalar, rate_scalar


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
    rates = rate_scalar("lr", lr), rate_scalar("weight_decay", weight_decay)
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
    rates = rate_scalar("lr", lr), rate_scalar("weight_decay", weight_decay)
    betas = beta_scalar("beta1", beta1), beta_scalar("beta2", beta2)
    how = rounding_arguments(rounding, tensors, param)
    _STEP(param, grad, exp_avg, starts, *rates, *betas, factor_scalar("grad_scale", grad_scale), gate, *how, impl)


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
