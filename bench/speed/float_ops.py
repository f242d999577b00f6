"""Calls of the ops that read or write floats, one function per op, in the order of docs/composing.md."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import Rounding, packed_bytes
from speed.data import BETA1, BETA2, DECAY, LR, Call, Data, new

_RATES: dict[str, Any] = {"lr": LR, "weight_decay": DECAY}
_BETAS = {"beta1": BETA1, "beta2": BETA2}
TERNARY = {"bits": 2, "step": 1, "offset": 1}


def pack_signs(data: Data, impl: str) -> Call:
    return Call(lambda: kernels.pack_signs(data.param, impl=impl), (data.param,), (new(packed_bytes(data.n)),))


def unpack_signs(data: Data, impl: str) -> Call:
    codes = data.codes()
    return Call(
        lambda: kernels.unpack_signs(codes, data.n, dtype=data.dtype, impl=impl), (codes,), (new(data.n, data.dtype),)
    )


def lion_encode(data: Data, impl: str) -> Call:
    m, g, out, nonfinite = data.exp_avg, data.grad, data.codes(), data.nonfinite
    return Call(lambda: kernels.lion_encode(m, g, beta1=BETA1, out=out, nonfinite=nonfinite, impl=impl), (m, g), (out,))


def lion_encode_(data: Data, impl: str) -> Call:
    m, g, out, nonfinite = data.exp_avg, data.grad, data.codes(), data.nonfinite
    return Call(lambda: kernels.lion_encode_(m, g, **_BETAS, out=out, nonfinite=nonfinite, impl=impl), (m, g), (out, m))


def foreach_lion_encode(data: Data, impl: str) -> Call:
    tensors = data.exp_avg, data.grad, data.codes()
    m, g, out = map(data.split, tensors)
    return Call(
        lambda: kernels.foreach_lion_encode(m, g, beta1=BETA1, parity=0, out=out, impl=impl), tensors[:2], tensors[2:]
    )


def lion_ema(data: Data, impl: str) -> Call:
    assert impl == "torch"
    m, g = data.exp_avg, data.grad
    return Call(lambda: kernels.lion_ema(m, g, beta=BETA1), (m, g), (new(data.n, m.dtype),))


def lion_apply_(
    data: Data,
    impl: str,
    *,
    form: dict[str, int] | None = None,
    momentum: bool = False,
    rounding: Rounding | None = None,
) -> Call:
    x, codes, form = data.param, data.codes((form or {}).get("bits", 1)), form or {}
    options, m, g = _momentum(data) if momentum else ({}, (), ())
    return Call(
        lambda: kernels.lion_apply_(x, codes, **form, **_RATES, **options, rounding=rounding, impl=impl),
        (x, codes, *g, *m),
        (x, *m),
    )


def foreach_lion_apply_(data: Data, impl: str, *, form: dict[str, int] | None = None) -> Call:
    x, codes, g, m, form = data.param, data.codes((form or {}).get("bits", 1)), data.grad, data.exp_avg, form or {}
    lists = {"grad": data.split(g), "exp_avg": data.split(m), "beta2": BETA2}
    xs, packed = data.split(x), data.split(codes)
    return Call(
        lambda: kernels.foreach_lion_apply_(xs, packed, **form, **_RATES, **lists, impl=impl), (x, codes, g, m), (x, m)
    )


def lion_step_(data: Data, impl: str, *, rounding: Rounding | None = None) -> Call:
    x, g, m = data.param, data.grad, data.exp_avg
    return Call(
        lambda: kernels.lion_step_(x, g, m, **_RATES, **_BETAS, rounding=rounding, impl=impl), (x, g, m), (x, m)
    )


def foreach_lion_step_(data: Data, impl: str) -> Call:
    tensors = data.param, data.grad, data.exp_avg
    lists = list(map(data.split, tensors))
    return Call(
        lambda: kernels.foreach_lion_step_(*lists, **_RATES, **_BETAS, impl=impl), tensors, (data.param, data.exp_avg)
    )


def quantize(data: Data, impl: str, *, bits: int = 2, stochastic: bool = False, scaled: bool = True) -> Call:
    x, scale, out = (
        data.grad,
        data.scale if scaled else None,
        torch.empty(packed_bytes(data.n, bits), dtype=torch.uint8, device=data.device),
    )
    return Call(
        lambda: kernels.quantize(x, bits=bits, scale=scale, stochastic=stochastic, out=out, impl=impl),
        (x,) if scaled else (x, x),
        (out,),
    )


def lion_quantize(data: Data, impl: str, *, bits: int = 2, stochastic: bool = False, scaled: bool = True) -> Call:
    m, g, nonfinite, scale = data.exp_avg, data.grad, data.nonfinite, data.scale if scaled else None
    out = torch.empty(packed_bytes(data.n, bits), dtype=torch.uint8, device=data.device)
    return Call(
        lambda: kernels.lion_quantize(
            m, g, beta1=BETA1, bits=bits, scale=scale, stochastic=stochastic, out=out, nonfinite=nonfinite, impl=impl
        ),
        (m, g) if scaled else (m, g, m, g),
        (out,),
    )


def foreach_lion_quantize(data: Data, impl: str) -> Call:
    m, g = data.exp_avg, data.grad
    out = torch.empty(packed_bytes(data.n, 2), dtype=torch.uint8, device=data.device)
    ms, gs, outs, scales = data.split(m), data.split(g), data.split(out), [data.scale] * data.parts
    return Call(
        lambda: kernels.foreach_lion_quantize(ms, gs, beta1=BETA1, scale=scales, out=outs, impl=impl), (m, g), (out,)
    )


def dequantize(data: Data, impl: str, *, bits: int = 2) -> Call:
    codes, scale, out = data.codes(bits), data.scale, torch.empty(data.n, dtype=data.dtype, device=data.device)
    return Call(
        lambda: kernels.dequantize(codes, scale, data.n, bits=bits, dtype=data.dtype, out=out, impl=impl),
        (codes,),
        (out,),
    )


def _momentum(data: Data) -> tuple[dict[str, Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Options of the ops that advance the momentum, the momentum and the gradient."""
    options = {"grad": data.grad, "exp_avg": data.exp_avg, "beta2": BETA2}
    return options, (data.exp_avg,), (data.grad,)
