"""Apply voted codes, or take the whole Lion step, on one device.

Each ``foreach_`` function takes lists of dense tensors in one call, for a whole bucket; its single-tensor twin is a
list of one. All raise, with nothing written, where a tensor does not fit the others. ``grad_scale`` multiplies the
gradients within the pass, exactly for -1 and powers of two (maximization, the inverse of a loss scale).

With ``starts``, multiples of 64, ``exp_avg`` is one flat buffer in which tensor i has its momentum from element
starts[i] on, and codes of b bits are one flat uint8 buffer in which it has its codes from bit ``b*starts[i]`` on. A
compiler then sees two buffers that are written, instead of a view of them for each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import check_all_or_none, check_choice, check_flat, check_float, check_same_storage_order
from lioncub.kernels.dispatch import backend, mark_written, register
from lioncub.kernels.layout import FIELD_BITS, code_bytes
from lioncub.kernels.lists import (
    Tensors,
    check_lists_apart,
    firsts_of,
    flat_list,
    float_list,
    master_lists,
    tensor_lists,
)
from lioncub.kernels.rounding import NO_STREAM, Rounding, rounding_arguments, streams_of
from lioncub.kernels.scalars import Scalar, float_scalar, mix_of, rate_scalars, rates_of


def lion_apply_(
    param: Tensor,
    packed: Tensor,
    *,
    bits: int = 1,
    step: int = 2,
    offset: int = 1,
    divisor: int = 1,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Tensor | None = None,
    exp_avg: Tensor | None = None,
    beta2: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    master: Tensor | None = None,
    rounding: Rounding | None = None,
    param_id: int = 0,
    impl: str = "auto",
) -> None:
    """``param = param*(1 - lr*weight_decay) - (step*code - offset) * (lr/divisor)``, and the momentum beside it.

    A vote is a code of one bit: by default a parameter moves by +lr or -lr. Ternary codes have 2 bits, step 1 and
    offset 1; the mean of N signs, whose sum is ``2*code - N``, step 2, offset N and divisor N. Mutates ``param`` and,
    where given, ``exp_avg``. lr/divisor is rounded once to fp32, then each product and the difference.

    Args:
        param: dense fp32, bf16 or fp16 tensor of n elements, taken in storage order.
        packed: contiguous ``uint8[bits * packed_bytes(n)]``: a parameter begins on a boundary of 64 codes of any width.
        bits: width of a code: 1, 2, 4, 8 or 16.
        step: integer >= 1; every ``step*code - offset`` is within 2^24.
        offset: integer >= 0.
        divisor: integer >= 1.
        lr: number >= 0 or 0-dim tensor.
        weight_decay: number >= 0 or 0-dim tensor.
        grad: gradient of param's shape and storage order; given together with exp_avg and beta2.
        exp_avg: momentum, fp32, bf16 or fp16: it becomes ``beta2*exp_avg + (1-beta2)*grad_scale*grad``.
        beta2: number in [0, 1] or 0-dim tensor.
        grad_scale: number or 0-dim tensor.
        master: fp32 tensor of which a bf16 or fp16 param is the rounded copy; it moves in param's place, from param
            where it does not round to that: what is written into a parameter counts.
        rounding: round bf16 and fp16 results stochastically; to nearest unless given.
        param_id: number of the parameter, which selects its stream of random words.
        impl: "auto", "triton", "cpu" or "reference".
    """
    foreach_lion_apply_(
        [param],
        [packed],
        bits=bits,
        step=step,
        offset=offset,
        divisor=divisor,
        lr=lr,
        weight_decay=weight_decay,
        grad=None if grad is None else [grad],
        exp_avg=None if exp_avg is None else [exp_avg],
        beta2=beta2,
        grad_scale=grad_scale,
        master=None if master is None else [master],
        rounding=rounding,
        param_ids=[param_id],
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
    master: Tensor | None = None,
    rounding: Rounding | None = None,
    param_id: int = 0,
    impl: str = "auto",
) -> None:
    """Take the whole Lion step of one worker in one pass (Chen et al. 2023, arXiv 2302.06675, algorithm 2).

    Mutates param and exp_avg, reads grad; each is fp32, bf16 or fp16, all have one shape and one storage order.
    sign(0) = 0: such an element only decays. ``master``, ``rounding`` and ``param_id`` as in `lion_apply_`.
    """
    foreach_lion_step_(
        [param],
        [grad],
        [exp_avg],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        master=None if master is None else [master],
        rounding=rounding,
        param_ids=[param_id],
        impl=impl,
    )


def lion_ema(exp_avg: Tensor, grad: Tensor, *, beta: Scalar, grad_scale: Scalar = 1.0) -> Tensor:
    """Return the moving average ``fl(fl(beta*exp_avg) + fl((1-beta)*grad_scale*grad))`` in fp32 (rule 1).

    With beta1 this is c, whose sign is the vote; with beta2 the next momentum.

    Two products and a sum, each an operation of its own on every device, so nothing is fused; the bits are those of
    `lion_encode` and `lion_apply_`. Takes fp32, bf16 or fp16 tensors of one shape, changes neither.
    """
    check_float("grad", grad)
    check_float("exp_avg", exp_avg)
    check_same_storage_order("exp_avg", exp_avg, "grad", grad)
    kept, new = mix_of(float_scalar("beta", beta, 0.0, 1.0), float_scalar("grad_scale", grad_scale))
    return torch.add(kept * exp_avg.float(), new * grad.float())


def foreach_lion_apply_(
    param: Sequence[Tensor],
    packed: Tensors,
    *,
    bits: int = 1,
    step: int = 2,
    offset: int = 1,
    divisor: int = 1,
    lr: Scalar,
    weight_decay: Scalar,
    grad: Sequence[Tensor] | None = None,
    exp_avg: Tensors | None = None,
    beta2: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    active: Tensor | None = None,
    master: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
    param_ids: Sequence[int] | None = None,
    stream_starts: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`lion_apply_` of lists on one device. With ``starts`` codes and momentum are flat.

    Where int32[n] ``active`` is zero, a parameter and its momentum stay as they are. ``param_ids`` select the streams
    to round by; they are the places in the list unless given. ``stream_starts``, multiples of 4, are the elements of
    whole parameters at which these begin: a shard is then rounded as the whole is. They are 0 unless given.
    ``master`` has a tensor for each bf16 and fp16 parameter; fp32 ones, for which it has none, move themselves.
    """
    check_all_or_none(grad=grad, exp_avg=exp_avg, beta2=beta2)
    lists: dict[str, object] = {"param": param}
    flats: dict[str, object] = {"packed": packed}
    if beta2 is None:
        (x, codes), b2 = tensor_lists(lists, flats, starts), None
        g: Sequence[Tensor] = ()
        m: Sequence[Tensor] = ()
    else:
        x, g, codes, m = tensor_lists({**lists, "grad": grad}, {**flats, "exp_avg": exp_avg}, starts)
        b2 = float_scalar("beta2", beta2, 0.0, 1.0)
    _check_format(bits, step, offset, divisor)
    masters = _masters_of(master, x, rounding)
    check_flat("active", active, torch.int32, len(x), "param", x[0] if x else None)
    rates, scale = rate_scalars(lr, weight_decay), float_scalar("grad_scale", grad_scale)
    how = NO_STREAM if rounding is None else rounding_arguments(rounding, param_ids, stream_starts, x)
    _APPLY(x, codes, bits, step, offset, divisor, *rates, g, m, b2, scale, active, masters, *how, starts, impl)


def foreach_lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Tensors,
    *,
    lr: Scalar,
    beta1: Scalar,
    beta2: Scalar,
    weight_decay: Scalar,
    grad_scale: Scalar = 1.0,
    active: Tensor | None = None,
    master: Sequence[Tensor] | None = None,
    rounding: Rounding | None = None,
    param_ids: Sequence[int] | None = None,
    stream_starts: Sequence[int] | None = None,
    starts: Sequence[int] | None = None,
    impl: str = "auto",
) -> None:
    """`lion_step_` of lists; ``active``, ``master``, ids and starts as in `foreach_lion_apply_`."""
    x, g, m = tensor_lists({"param": param, "grad": grad}, {"exp_avg": exp_avg}, starts)
    masters = _masters_of(master, x, rounding)
    check_flat("active", active, torch.int32, len(x), "param", x[0] if x else None)
    rates, scale = rate_scalars(lr, weight_decay), float_scalar("grad_scale", grad_scale)
    betas = float_scalar("beta1", beta1, 0.0, 1.0), float_scalar("beta2", beta2, 0.0, 1.0)
    how = NO_STREAM if rounding is None else rounding_arguments(rounding, param_ids, stream_starts, x)
    _STEP(x, g, m, *rates, *betas, scale, active, masters, *how, starts, impl)


def _masters_of(
    master: Sequence[Tensor] | None, param: Sequence[Tensor], rounding: Rounding | None
) -> Sequence[Tensor]:
    """Return the masters as an op takes them. Raises ValueError where all are missing, or with ``rounding``."""
    if master is None:
        return ()
    if rounding is not None:
        raise ValueError(f"rounding: expected None with master, whose parameters go to nearest, got {rounding}")
    (masters,) = tensor_lists({"master": master}, {}, None)
    if not masters and any(x.dtype != torch.float32 for x in param):
        raise ValueError("master: expected a tensor for each bf16 or fp16 param, got none")
    return masters


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
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    beta2: Tensor | None,
    grad_scale: Tensor,
    active: Tensor | None,
    master: Sequence[Tensor],
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    param_ids: Sequence[int],
    stream_starts: Sequence[int],
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    places = None if starts is None else tuple(starts)
    x, g, m, mix = float_list("param", param), None, None, None
    if beta2 is not None:
        g, m = float_list("grad", grad, x), float_list("exp_avg", exp_avg, x, firsts_of(places, x.sizes))
        mix = mix_of(beta2, grad_scale)
    firsts = firsts_of(places, x.sizes, bits)
    codes = flat_list("packed", packed, torch.uint8, code_bytes(x.sizes, multiple=bits), x, firsts)
    own, masters = master_lists(master, x)
    check_lists_apart([x, *own] if m is None else [x, m, *own], [codes] if g is None else [codes, g])
    if param:
        rates = rates_of(lr, weight_decay, divisor)
        streams = None if rounding is None else streams_of(rounding, rounding_step, param_ids, stream_starts)
        run = backend(impl, param[0].device).lion_apply_
        run(x, codes, bits, step, offset, *rates, g, m, mix, active, streams, masters)
    mark_written(param, exp_avg, master)


def _step(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    grad_scale: Tensor,
    active: Tensor | None,
    master: Sequence[Tensor],
    rounding: Tensor | None,
    rounding_step: Tensor | None,
    param_ids: Sequence[int],
    stream_starts: Sequence[int],
    starts: Sequence[int] | None,
    impl: str,
) -> None:
    x = float_list("param", param)
    firsts = None if starts is None else firsts_of(tuple(starts), x.sizes)
    g, m = float_list("grad", grad, x), float_list("exp_avg", exp_avg, x, firsts)
    own, masters = master_lists(master, x)
    check_lists_apart([x, m, *own], [g])
    if param:
        rates, betas = rates_of(lr, weight_decay), (mix_of(beta1, grad_scale), mix_of(beta2, grad_scale))
        streams = None if rounding is None else streams_of(rounding, rounding_step, param_ids, stream_starts)
        backend(impl, param[0].device).lion_step_(x, g, m, *rates, *betas, active, streams, masters)
    mark_written(param, exp_avg, master)


_APPLY = register(
    "lion_apply_(Tensor(a!)[] param, Tensor[] packed, int bits, int step, int offset, int divisor, Tensor lr, "
    "Tensor weight_decay, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor? beta2, Tensor grad_scale, Tensor? active, "
    "Tensor(c!)[] master, Tensor? rounding, Tensor? rounding_step, int[] param_ids, int[] stream_starts, "
    "int[]? starts, str impl) -> ()",
    _apply,
)
_STEP = register(
    "lion_step_(Tensor(a!)[] param, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor lr, Tensor weight_decay, "
    "Tensor beta1, Tensor beta2, Tensor grad_scale, Tensor? active, Tensor(c!)[] master, Tensor? rounding, "
    "Tensor? rounding_step, int[] param_ids, int[] stream_starts, int[]? starts, str impl) -> ()",
    _step,
)
