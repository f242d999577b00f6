"""apply_codes_: a step by ternary votes, or by the mean of everyone's signs, whose codes have more than one bit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import (
    check_all_or_none,
    check_choice,
    check_device,
    check_exp_avg,
    check_float,
    check_packed,
    check_same_storage_order,
    storage_order_view,
)
from lioncub.kernels.gates import check_gate, let_through
from lioncub.kernels.layout import FIELD_BITS, packed_bytes
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
    decay_of,
    factor_scalar,
    mix_of,
    rate_of,
    rate_scalars,
)
from lioncub.kernels.tensor_lists import TensorList


def apply_codes_(
    param: Tensor,
    packed: Tensor,
    *,
    bits: int,
    step: int,
    offset: int,
    divisor: int = 1,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Tensor | None = None,
    exp_avg: Tensor | None = None,
    beta2: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    rounding: Rounding | None = None,
    tensor: int = 0,
    impl: str = "auto",
) -> None:
    """``param = param*(1 - lr*weight_decay) - (step*code - offset) * (lr/divisor)``, and the momentum beside it.

    Ternary votes have codes of 2 bits, step 1 and offset 1; the mean of N signs, whose sum is ``2*code - N``, step 2,
    offset N and divisor N. Mutates ``param`` and, where given, ``exp_avg``, which becomes
    ``beta2*exp_avg + (1-beta2)*grad_scale*grad``. lr/divisor is rounded once to fp32, then each product and the
    difference.

    Args:
        param: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        packed: contiguous ``uint8[bits * packed_bytes(n)]``: a parameter begins on a boundary of 64 codes of any width.
        bits: width of a code: 1, 2, 4, 8 or 16.
        step: integer >= 1; every ``step*code - offset`` is within 2^24.
        offset: integer.
        divisor: integer >= 1.
        lr: number or 0-dim tensor.
        weight_decay: number or 0-dim tensor.
        grad: gradient of param's shape and storage order; given together with exp_avg and beta2.
        exp_avg: momentum, fp32 or of param's dtype, mutated.
        beta2: number or 0-dim tensor.
        rounding: round bf16 and fp16 results stochastically; to nearest unless given.
        tensor: number of the tensor, which selects its stream of random words.
        impl: "auto", "triton", "cpu" or "reference".
    """
    check_float("param", param)
    _check_format(bits, step, offset, divisor)
    check_packed("packed", packed, bits * packed_bytes(param.numel()))
    check_device("packed", packed, "param", param)
    check_all_or_none(grad=grad, exp_avg=exp_avg, beta2=beta2)
    flat = [storage_order_view("param", param)]
    grads = momenta = None
    if grad is not None and exp_avg is not None:
        check_float("grad", grad)
        check_same_storage_order("grad", grad, "param", param)
        check_exp_avg(exp_avg, param)
        grads, momenta = [storage_order_view("grad", grad)], [storage_order_view("exp_avg", exp_avg)]
    foreach_apply_codes_(
        flat,
        [packed],
        bits=bits,
        step=step,
        offset=offset,
        divisor=divisor,
        lr=lr,
        weight_decay=weight_decay,
        grad=grads,
        exp_avg=momenta,
        beta2=beta2,
        grad_scale=grad_scale,
        rounding=rounding,
        tensors=[tensor],
        impl=impl,
    )


def foreach_apply_codes_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    *,
    bits: int,
    step: int,
    offset: int,
    divisor: int = 1,
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
    """`apply_codes_` of lists of 1-d contiguous tensors in storage order, on one device.

    Where int32[n] ``gate`` is zero, a parameter and its momentum stay as they are. ``tensors`` are the numbers of the
    streams to round by, the tensors' places unless given.
    """
    check_list_types(param=param, packed=packed)
    how = rounding_arguments(rounding, tensors, param)
    _check_format(bits, step, offset, divisor)
    check_gate(gate, param)
    rates = rate_scalars(lr, weight_decay)
    form = bits, step, offset, divisor
    if grad is None or exp_avg is None or beta2 is None:
        check_all_or_none(grad=grad, exp_avg=exp_avg, beta2=beta2)
        _APPLY(param, packed, *form, *rates, gate, *how, impl)
    else:
        check_list_types(grad=grad, exp_avg=exp_avg)
        b2, scale = beta_scalar("beta2", beta2), factor_scalar("grad_scale", grad_scale)
        _APPLY_MOMENTUM(param, packed, *form, *rates, grad, exp_avg, b2, scale, gate, *how, impl)


def _check_format(bits: int, step: int, offset: int, divisor: int) -> None:
    check_choice("bits", bits, FIELD_BITS)
    for name, value, least in (("step", step, 1), ("offset", offset, 0), ("divisor", divisor, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if max(step * (2**bits - 1) - offset, offset) > 2**24:
        raise ValueError(f"step, offset: expected step*code - offset within 2^24, got {step} and {offset}")


def _apply(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    bits: int,
    step: int,
    offset: int,
    divisor: int,
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
    check_code_list("packed", packed, code_bytes(param.sizes, bits), "param", param)
    check_lists_apart({"param": param}, {"packed": packed})
    options, (x, codes) = let_through(gate, streams_of(rounding, rounding_step, numbers), impl, param, packed)
    if x:
        run = backend(impl, x[0].device)
        rate = rate_of(lr, divisor)
        run.apply_codes_(x, codes, bits, step, offset, rate, decay_of(lr, weight_decay), None, None, None, **options)
    mark_written(param)


def _apply_momentum(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    bits: int,
    step: int,
    offset: int,
    divisor: int,
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
    check_code_list("packed", packed, code_bytes(param.sizes, bits), "param", param)
    check_lists_apart({"param": param, "exp_avg": exp_avg}, {"packed": packed, "grad": grad})
    options, (x, codes, g, m) = let_through(
        gate, streams_of(rounding, rounding_step, numbers), impl, param, packed, grad, exp_avg
    )
    if x:
        run = backend(impl, x[0].device)
        rate, decay = rate_of(lr, divisor), decay_of(lr, weight_decay)
        run.apply_codes_(x, codes, bits, step, offset, rate, decay, g, m, mix_of(beta2, grad_scale), **options)
    mark_written(param, exp_avg)


_APPLY = register(
    "apply_codes_(Tensor(a!)[] param, Tensor[] packed, int bits, int step, int offset, int divisor, Tensor lr, "
    "Tensor weight_decay, Tensor? gate, "
    "Tensor? rounding, Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _apply,
)
_APPLY_MOMENTUM = register(
    "apply_codes_with_momentum_(Tensor(a!)[] param, Tensor[] packed, int bits, int step, int offset, int divisor, "
    "Tensor lr, Tensor weight_decay, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor beta2, Tensor grad_scale, "
    "Tensor? gate, Tensor? rounding, Tensor? rounding_step, int[] numbers, str impl) -> ()",
    _apply_momentum,
)
