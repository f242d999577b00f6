"""Lion's update in a few integer levels: quantized as it is computed, never stored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lioncub.kernels.backends import backend
from lioncub.kernels.checks import (
    check_float,
    check_same_storage_order,
    check_status,
    packed_out,
    storage_order_view,
)
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.list_checks import check_code_list, check_float_lists, check_list_types, check_scale_list
from lioncub.kernels.overlaps import check_lists_apart
from lioncub.kernels.quantization import (
    GAINS,
    check_fields,
    check_format,
    check_scale,
    empty_scales,
    scale_count,
    stream_tensor,
    streams_of,
)
from lioncub.kernels.registry import mark_written, register
from lioncub.kernels.rounding import stream_numbers
from lioncub.kernels.scalars import Scalar, beta_scalar, factor_scalar, mix_of
from lioncub.kernels.tensor_lists import TensorList


def lion_quantize(
    exp_avg: Tensor,
    grad: Tensor,
    *,
    beta1: Scalar,
    bits: int = 2,
    norm: str = "l1",
    scale: Tensor | None = None,
    stochastic: bool = False,
    seed: int = 0,
    worker: int = 0,
    step: int = 0,
    tensor: int = 0,
    block: int | None = None,
    out: Tensor | None = None,
    status: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`quantize` of Lion's update ``beta1*exp_avg + (1-beta1)*grad_scale*grad``, which is never stored.

    One pass over exp_avg and grad, two where the scale is not given. Mutates only ``out`` and ``status``, int32[1],
    set to 1 where any element of grad, exp_avg or the update is not finite.
    """
    check_float("grad", grad)
    check_float("exp_avg", exp_avg)
    check_same_storage_order("exp_avg", exp_avg, "grad", grad)
    check_status(status, grad)
    m, g = storage_order_view("exp_avg", exp_avg), storage_order_view("grad", grad)
    size = check_fields(bits, norm, block, g.numel(), stochastic)
    if scale is not None:
        check_scale(scale, g, size)
    out = packed_out(out, packed_bytes(g.numel(), bits), "grad", grad)
    (scale,) = foreach_lion_quantize(
        [m],
        [g],
        beta1=beta1,
        bits=bits,
        norm=norm,
        scale=None if scale is None else [scale],
        stochastic=stochastic,
        seed=seed,
        worker=worker,
        step=step,
        tensors=[tensor],
        block=block,
        out=[out],
        status=status,
        grad_scale=grad_scale,
        impl=impl,
    )
    return out, scale


def foreach_lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    bits: int = 2,
    norm: str = "l1",
    scale: Sequence[Tensor] | None = None,
    stochastic: bool = False,
    seed: int = 0,
    worker: int = 0,
    step: int = 0,
    tensors: Sequence[int] | None = None,
    block: int | None = None,
    out: Sequence[Tensor],
    status: Tensor | None = None,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> list[Tensor]:
    """`lion_quantize` of lists; gives their scales. ``status`` is int32 with one element per tensor.

    ``tensors`` are the numbers of the random streams, the tensors' places unless given.
    """
    check_list_types(exp_avg=exp_avg, grad=grad, out=out, scale=() if scale is None else scale)
    check_status(status, None, len(grad))
    size = check_fields(bits, norm, block, max([g.numel() for g in grad], default=0), stochastic)
    b1, multiplier = beta_scalar("beta1", beta1), factor_scalar("grad_scale", grad_scale)
    scales = list(scale or ())
    if scale is None:
        scales = foreach_lion_scale(
            exp_avg, grad, beta1=beta1, norm=norm, block=block, grad_scale=grad_scale, impl=impl
        )
    stream = stream_tensor(seed, worker, step)
    numbers = stream_numbers(range(len(grad)) if tensors is None else tensors)
    if len(numbers) != len(grad):
        raise ValueError(f"tensors: expected {len(grad)} numbers, one per tensor, got {len(numbers)}")
    how = (bits, norm, size, stochastic, impl)
    _LION_QUANTIZE(exp_avg, grad, b1, multiplier, scales, stream, numbers, out, status, *how)
    return scales


def foreach_lion_scale(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    *,
    beta1: Scalar,
    norm: str = "l1",
    block: int | None = None,
    grad_scale: Scalar = 1.0,
    impl: str = "auto",
) -> list[Tensor]:
    """The scales of Lion's updates, fp32[blocks] of each, as `foreach_lion_quantize` takes them."""
    check_list_types(exp_avg=exp_avg, grad=grad)
    check_format(2, norm, block)
    scales = empty_scales(grad, block or 0)
    b1, multiplier = beta_scalar("beta1", beta1), factor_scalar("grad_scale", grad_scale)
    _LION_SCALE(exp_avg, grad, b1, multiplier, scales, norm, block or 0, impl)
    return scales


def _lion_scale(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    grad_scale: Tensor,
    scale: Sequence[Tensor],
    norm: str,
    block: int,
    impl: str,
) -> None:
    exp_avg, grad, scale = map(TensorList, (exp_avg, grad, scale))
    check_float_lists(grad=grad, exp_avg=exp_avg)
    check_scale_list(scale, [scale_count(size, block) for size in grad.sizes], "grad", grad)
    check_lists_apart({"scale": scale}, {"grad": grad, "exp_avg": exp_avg})
    if grad:
        run = backend(impl, grad[0].device)
        run.lion_block_scale(exp_avg, grad, mix_of(beta1, grad_scale), norm, block, scale)
    for g, of_none in zip(grad, scale, strict=True):
        if not g.numel():
            of_none.zero_()
    mark_written(scale)


def _lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor,
    grad_scale: Tensor,
    scale: Sequence[Tensor],
    stream: Tensor,
    numbers: Sequence[int],
    out: Sequence[Tensor],
    status: Tensor | None,
    bits: int,
    norm: str,
    block: int,
    stochastic: bool,
    impl: str,
) -> None:
    exp_avg, grad, scale, out = map(TensorList, (exp_avg, grad, scale, out))
    check_float_lists(grad=grad, exp_avg=exp_avg)
    check_scale_list(scale, [scale_count(size, block) for size in grad.sizes], "grad", grad)
    check_code_list("out", out, [packed_bytes(size, bits) for size in grad.sizes], "grad", grad)
    check_status(status, grad[0] if grad else None, len(grad))
    check_lists_apart({"out": out}, {"grad": grad, "exp_avg": exp_avg, "scale": scale})
    if grad:
        run = backend(impl, grad[0].device)
        streams = streams_of(stream, numbers) if stochastic else None
        mix = mix_of(beta1, grad_scale)
        run.lion_quantize(exp_avg, grad, mix, scale, GAINS[norm], block, bits, streams, out, status)
    mark_written(out, status)


_LION_SCALE = register(
    "lion_block_scale(Tensor[] exp_avg, Tensor[] grad, Tensor beta1, Tensor grad_scale, Tensor(a!)[] scale, str norm, "
    "int block, str impl) -> ()",
    _lion_scale,
)
_LION_QUANTIZE = register(
    "lion_quantize(Tensor[] exp_avg, Tensor[] grad, Tensor beta1, Tensor grad_scale, Tensor[] scale, Tensor stream, "
    "int[] numbers, Tensor(a!)[] out, Tensor(b!)? status, int bits, str norm, int block, bool stochastic, str impl) "
    "-> ()",
    _lion_quantize,
)
