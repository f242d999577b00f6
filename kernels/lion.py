"""The Lion kernels: encode the update, apply a vote, or take the whole step on one device.

Each public function takes one tensor; its ``foreach_`` twin takes lists of 1-d contiguous tensors in storage order, one
call for a whole bucket. Both raise, with nothing written, where a tensor does not fit the others. In lists
``grad_scale`` multiplies the gradients within the pass, exactly for -1 and powers of two (maximization, the inverse of
a loss scale).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import (
    check_all_or_none,
    check_device,
    check_exp_avg,
    check_float,
    check_packed,
    check_same_storage_order,
    check_status,
    packed_out,
    storage_order_view,
)
from lioncub.kernels.gates import check_gate, let_through
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.list_checks import (
    check_code_list,
    check_float_lists,
    check_list_types,
    code_bytes,
)
from lioncub.kernels.overlaps import check_lists_apart
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.rounding import Rounding, rounding_arguments, streams_of
from lioncub.kernels.scalars import (
    Scalar,
    beta_scalar,
    count_scalar,
    decay_of,
    factor_scalar,
    mix_of,
    parity_of,
    rate_of,
    rate_scalars,
)
from lioncub.kernels.tensor_lists import TensorList


def lion_encode(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    status: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Packed sign codes of Lion's update ``beta1*exp_avg + (1-beta1)*grad`` (Chen et al. 2023, arXiv 2302.06675).

    Reads exp_avg and grad once; changes nothing but ``out`` and ``status``.

    Args:
        exp_avg: momentum, fp32 or the parameter's dtype, with grad's shape and strides.
        grad: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        beta1: number in [0, 1] or 0-dim tensor.
        parity: element j whose update is zero or NaN gets bit (j + parity) & 1; see `abstain_parity`.
        out: uint8[packed_bytes(n)] to write; allocated unless given.
        status: int32[1], set to 1 where any element of grad, exp_avg or the update is not finite; never cleared.
        impl: "auto", "triton", "cpu" or "reference".

    Returns:
        ``out``.
    """
    m, g, out = _encode_arguments(exp_avg, grad, out, status)
    foreach_lion_encode([m], [g], beta1=beta1, parity=parity, out=[out], status=status, impl=impl)
    return out


def lion_encode_(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    beta2: Scalar,
    parity: int | Tensor = 0,
    out: Tensor | None = None,
    status: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`lion_encode`, and in the same pass ``exp_avg = beta2*exp_avg + (1-beta2)*grad``.

    Mutates exp_avg, ``out`` and ``status``; an element whose update is not finite keeps its momentum.
    """
    m, g, out = _encode_arguments(exp_avg, grad, out, status)
    b1, b2 = beta_scalar("beta1", beta1), beta_scalar("beta2", beta2)
    _ENCODE_([m], [g], b1, b2, count_scalar("parity", parity), [out], status, impl)
    return out


def apply_votes_(
    param: Tensor,
    packed: Tensor,
    *,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Tensor | None = None,
    exp_avg: Tensor | None = None,
    beta2: Scalar | None = None,
    rounding: Rounding | None = None,
    tensor: int = 0,
    impl: str = "auto",
) -> None:
    """One pass: ``param *= 1 - lr*weight_decay``, ``param -= lr*(+1 or -1)``; optionally the momentum advances.

    Args:
        param: dense fp32, bf16 or fp16 tensor of n elements, mutated; computed in fp32, rounded once.
        packed: uint8[packed_bytes(n)] of voted one-bit codes.
        lr: number >= 0 or 0-dim tensor.
        weight_decay: number >= 0 or 0-dim tensor.
        grad: gradient of param's shape and storage order; given together with exp_avg and beta2.
        exp_avg: momentum, mutated: it becomes ``beta2*exp_avg + (1-beta2)*grad``.
        beta2: number or 0-dim tensor.
        rounding: round bf16 and fp16 results stochastically; to nearest unless given.
        tensor: number of the tensor, which selects its stream of random words.
        impl: "auto", "triton", "cpu" or "reference".
    """
    check_float("param", param)
    x = storage_order_view("param", param)
    check_packed("packed", packed, packed_bytes(x.numel()))
    check_device("packed", packed, "param", param)
    check_all_or_none(grad=grad, exp_avg=exp_avg, beta2=beta2)
    grads = momenta = None
    if grad is not None and exp_avg is not None:
        check_float("grad", grad)
        check_same_storage_order("grad", grad, "param", param)
        check_exp_avg(exp_avg, param)
        grads, momenta = [storage_order_view("grad", grad)], [storage_order_view("exp_avg", exp_avg)]
    foreach_apply_votes_(
        [x],
        [packed],
        lr=lr,
        weight_decay=weight_decay,
        grad=grads,
        exp_avg=momenta,
        beta2=beta2,
        rounding=rounding,
        tensors=[tensor],
        impl=impl,
    )


def lion_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    weight_decay: Scalar,
    rounding: Rounding | None = None,
    tensor: int = 0,
    impl: str = "auto",
) -> None:
    """The whole Lion step of one worker in one pass (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Mutates param (fp32, bf16 or fp16) and exp_avg (fp32 or param's dtype); grad, any of the three float dtypes,
    is read. All have one shape and one storage order. sign(0) = 0: such an element only decays. ``rounding`` and
    ``tensor`` as in `apply_votes_`.
    """
    check_float("param", param)
    check_float("grad", grad)
    check_same_storage_order("grad", grad, "param", param)
    check_exp_avg(exp_avg, param)
    x, g, m = (storage_order_view("param", t) for t in (param, grad, exp_avg))
    foreach_lion_step_(
        [x],
        [g],
        [m],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        rounding=rounding,
        tensors=[tensor],
        impl=impl,
    )


def foreach_lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    parity: int | Tensor,
    out: Sequence[Tensor],
    status: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> None:
    """`lion_encode` of lists of 1-d contiguous tensors; status is int32 with one element per tensor."""
    check_list_types(exp_avg=exp_avg, grad=grad, out=out)
    check_status(status, None, len(grad))
    b1 = beta_scalar("beta1", beta1)
    _ENCODE(
        exp_avg, grad, b1, count_scalar("parity", parity), out, status, factor_scalar("grad_scale", grad_scale), impl
    )


def foreach_apply_votes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    *,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Sequence[Tensor] | None = None,
    exp_avg: Sequence[Tensor] | None = None,
    beta2: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    gate: Tensor | None = None,
    rounding: Rounding | None = None,
    tensors: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`apply_votes_` of lists of 1-d contiguous tensors.

    Where int32[n] ``gate`` is zero, a parameter and its momentum stay as they are. ``tensors`` are the
    numbers of the streams to round by, the tensors' places unless given.
    """
    check_list_types(param=param, packed=packed)
    how = rounding_arguments(rounding, tensors, param)
    rate, decay = rate_scalars(lr, weight_decay)
    check_gate(gate, param)
    if grad is None or exp_avg is None or beta2 is None:
        check_all_or_none(grad=grad, exp_avg=exp_avg, beta2=beta2)
        _APPLY(param, packed, rate, decay, gate, *how, impl)
    else:
        check_list_types(grad=grad, exp_avg=exp_avg)
        b2, scale = beta_scalar("beta2", beta2), factor_scalar("grad_scale", grad_scale)
        _APPLY_MOMENTUM(param, packed, rate, decay, grad, exp_avg, b2, scale, gate, *how, impl)


def foreach_lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    weight_decay: Scalar,
    grad_scale: Scalar = 1.0,
    gate: Tensor | None = None,
    rounding: Rounding | None = None,
    tensors: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`lion_step_` of lists; ``gate`` and ``tensors`` as in `foreach_apply_votes_`."""
    check_list_types(param=param, grad=grad, exp_avg=exp_avg)
    how = rounding_arguments(rounding, tensors, param)
    check_gate(gate, param)
    rate, decay = rate_scalars(lr, weight_decay)
    b1, b2 = beta_scalar("beta1", beta1), beta_scalar("beta2", beta2)
    scale = factor_scalar("grad_scale", grad_scale)
    _STEP(param, grad, exp_avg, rate, decay, b1, b2, scale, gate, *how, impl)


def _encode_arguments(
    exp_avg: Tensor, grad: Tensor, out: Tensor | None, status: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    check_float("grad", grad)
    check_float("exp_avg", exp_avg)
    check_same_storage_order("exp_avg", exp_avg, "grad", grad)
    check_status(status, grad)
    out = packed_out(out, packed_bytes(grad.numel()), "grad", grad)
    return storage_order_view("exp_avg", exp_avg), storage_order_view("grad", grad), out


def _check_encoding(exp_avg: TensorList, grad: TensorList, out: TensorList, status: Tensor | None) -> None:
    check_float_lists(grad=grad, exp_avg=exp_avg)
    check_code_list("out", out, code_bytes(grad.sizes), "grad", grad)
    check_status(status, grad[0] if grad else None, len(grad))
    check_lists_apart({"out": out}, {"grad": grad, "exp_avg": exp_avg})


def _encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    parity: Tensor,
    out: Sequence[Tensor],
    status: Tensor | None,
    grad_scale: Tensor,
    impl: str,
) -> None:
    exp_avg, grad, out = map(TensorList, (exp_avg, grad, out))
    _check_encoding(exp_avg, grad, out, status)
    if grad:
        run = backend(impl, grad[0].device)
        run.lion_encode(exp_avg, grad, mix_of(beta1, grad_scale), parity_of(parity), out, status)
    mark_written(out, status)


def _encode_(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    beta2: Tensor,
    parity: Tensor,
    out: Sequence[Tensor],
    status: Tensor | None,
    impl: str,
) -> None:
    exp_avg, grad, out = map(TensorList, (exp_avg, grad, out))
    _check_encoding(exp_avg, grad, out, status)
    check_lists_apart({"exp_avg": exp_avg}, {"grad": grad})
    if grad:
        run = backend(impl, grad[0].device)
        run.lion_encode_(exp_avg, grad, mix_of(beta1), mix_of(beta2), parity_of(parity), out, status)
    mark_written(exp_avg, out, status)


def _apply(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    gate: Tensor | None,
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    numbers: Sequence[int],
    impl: str,
) -> None:
    param, packed = TensorList(param), TensorList(packed)
    check_float_lists(param=param)
    check_code_list("packed", packed, code_bytes(param.sizes), "param", param)
    check_lists_apart({"param": param}, {"packed": packed})
    options, (x, codes) = let_through(gate, streams_of(rounding, rounding_step, numbers), impl, param, packed)
    if x:
        run = backend(impl, x[0].device)
        run.apply_votes_(x, codes, rate_of(lr), decay_of(lr, weight_decay), None, None, None, **options)
    mark_written(param)


def _apply_momentum(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    beta2: Tensor,
    grad_scale: Tensor,
    gate: Tensor | None,
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    numbers: Sequence[int],
    impl: str,
) -> None:
    param, packed, grad, exp_avg = map(TensorList, (param, packed, grad, exp_avg))
    check_float_lists(param=param, grad=grad, exp_avg=exp_avg)
    check_code_list("packed", packed, code_bytes(param.sizes), "param", param)
    check_lists_apart({"param": param, "exp_avg": exp_avg}, {"packed": packed, "grad": grad})
    options, (x, codes, g, m) = let_through(
        gate, streams_of(rounding, rounding_step, numbers), impl, param, packed, grad, exp_avg
    )
    if x:
        rate, decay = rate_of(lr), decay_of(lr, weight_decay)
        run = backend(impl, x[0].device)
        run.apply_votes_(x, codes, rate, decay, g, m, mix_of(beta2, grad_scale), **options)
    mark_written(param, exp_avg)


def _step(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    grad_scale: Tensor,
    gate: Tensor | None,
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    numbers: Sequence[int],
    impl: str,
) -> None:
    param, grad, exp_avg = map(TensorList, (param, grad, exp_avg))
    check_float_lists(param=param, grad=grad, exp_avg=exp_avg)
    check_lists_apart({"param": param, "exp_avg": exp_avg}, {"grad": grad})
    options, (x, g, m) = let_through(gate, streams_of(rounding, rounding_step, numbers), impl, param, grad, exp_avg)
    if x:
        rate, decay = rate_of(lr), decay_of(lr, weight_decay)
        run = backend(impl, x[0].device)
        run.lion_step_(x, g, m, rate, decay, mix_of(beta1, grad_scale), mix_of(beta2, grad_scale), **options)
    mark_written(param, exp_avg)


_ENCODE = register(
    "lion_encode(Tensor[] exp_avg, Tensor[] grad, Tensor beta1, Tensor parity, Tensor(a!)[] out, "
    "Tensor(b!)? status, Tensor grad_scale, str impl) -> ()",
    _encode,
)
_ENCODE_ = register(
    "lion_encode_(Tensor(a!)[] exp_avg, Tensor[] grad, Tensor beta1, Tensor beta2, Tensor parity, "
    "Tensor(b!)[] out, Tensor(c!)? status, str impl) -> ()",
    _encode_,
)
_APPLY = register(
    "apply_votes_(Tensor(a!)[] param, Tensor[] packed, Tensor lr, Tensor weight_decay, Tensor? gate, "
    "Tensor? rounding, Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _apply,
)
_APPLY_MOMENTUM = register(
    "apply_votes_with_momentum_(Tensor(a!)[] param, Tensor[] packed, Tensor lr, Tensor weight_decay, "
    "Tensor[] grad, Tensor(b!)[] exp_avg, Tensor beta2, Tensor grad_scale, Tensor? gate, "
    "Tensor? rounding, Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _apply_momentum,
)
_STEP = register(
    "lion_step_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor lr, Tensor weight_decay, "
    "Tensor beta1, Tensor beta2, Tensor grad_scale, Tensor? gate, "
    "Tensor? rounding, Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _step,
)
