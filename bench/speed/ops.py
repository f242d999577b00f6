"""Calls of the ops, one function per op in the order of docs/composing.md; ``options`` go to the op, ``impl`` too."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import packed_bytes
from speed.data import BETA1, BETA2, DECAY, LR, Call, Data, new

_RATES: dict[str, Any] = {"lr": LR, "weight_decay": DECAY}
_BETAS: dict[str, Any] = {"beta1": BETA1, "beta2": BETA2}


def pack_signs(data: Data, **options: Any) -> Call:
    return Call(partial(kernels.pack_signs, data.param, **options), (data.param,), (new(packed_bytes(data.n)),))


def unpack_signs(data: Data, **options: Any) -> Call:
    codes, dtype = data.codes(), data.dtype
    return Call(partial(kernels.unpack_signs, codes, data.n, dtype=dtype, **options), (codes,), (new(data.n, dtype),))


def lion_encode(data: Data, **options: Any) -> Call:
    m, g, out = data.exp_avg, data.grad, data.codes()
    options |= {"out": out, "nonfinite": data.nonfinite}
    return Call(partial(kernels.lion_encode, m, g, beta1=BETA1, **options), (m, g), (out,))


def lion_encode_(data: Data, **options: Any) -> Call:
    m, g, out = data.exp_avg, data.grad, data.codes()
    options |= {"out": out, "nonfinite": data.nonfinite}
    return Call(partial(kernels.lion_encode_, m, g, **_BETAS, **options), (m, g), (out, m))


def foreach_lion_encode(data: Data, **options: Any) -> Call:
    m, g, out = data.exp_avg, data.grad, data.codes()
    options |= {"beta1": BETA1, "parity": 0, "out": data.split(out)}
    return Call(partial(kernels.foreach_lion_encode, data.split(m), data.split(g), **options), (m, g), (out,))


def lion_ema(data: Data, impl: str) -> Call:
    """Plain torch, so ``impl`` is "torch"."""
    m, g = data.exp_avg, data.grad
    return Call(partial(kernels.lion_ema, m, g, beta=BETA1), (m, g), (new(data.n, m.dtype),))


def majority_vote(data: Data, *, voters: int, counted: bool = False, **options: Any) -> Call:
    packed, out, counts = data.voters(voters), data.codes(), data.counts if counted else None
    return Call(partial(kernels.majority_vote, packed, out=out, counts=counts, **options), (packed,), (out,))


def count_votes(data: Data, **options: Any) -> Call:
    packed, out = data.voters(8), data.planes[0]
    return Call(partial(kernels.count_votes, packed, out=out, **options), (packed,), (out,))


def majority_of_counts(data: Data, **options: Any) -> Call:
    planes, out = data.planes, data.codes()
    return Call(partial(kernels.majority_of_counts, planes, voters=16, out=out, **options), (planes,), (out,))


def spread_codes(data: Data, *, bits: int = 1, field_bits: int = 4, **options: Any) -> Call:
    packed, out = data.codes(bits), data.codes(field_bits)
    options |= {"bits": bits, "field_bits": field_bits, "out": out}
    return Call(partial(kernels.spread_codes, packed, **options), (packed,), (out,))


def add_codes(data: Data, *, bits: int, field_bits: int, **options: Any) -> Call:
    # as many bytes as the one-bit codes of 8 voters
    packed, out = data.voters(8).view(8 // bits, -1), new(packed_bytes(data.n) * field_bits)
    return Call(partial(kernels.add_codes, packed, bits=bits, field_bits=field_bits, **options), (packed,), (out,))


def majority_of_fields(data: Data, *, field_bits: int = 4, **options: Any) -> Call:
    fields, out = data.fields(field_bits), data.codes()
    options |= {"field_bits": field_bits, "voters": min(8, 2**field_bits - 1), "out": out}
    return Call(partial(kernels.majority_of_fields, fields, **options), (fields,), (out,))


def ternary_of_fields(data: Data, *, field_bits: int = 4, **options: Any) -> Call:
    fields, out = data.fields(field_bits), data.codes(2)
    options |= {"field_bits": field_bits, "step": 2, "offset": 8, "largest": 8, "out": out}
    return Call(partial(kernels.ternary_of_fields, fields, **options), (fields,), (out,))


def lion_apply_(data: Data, *, momentum: bool = False, masters: bool = False, **options: Any) -> Call:
    x, codes, g, m = data.param, data.codes(options.get("bits", 1)), data.grad, data.exp_avg
    if masters:
        run = partial(kernels.lion_apply_, x, codes, master=data.master, **_RATES, **options)
        return Call(run, (x, codes, data.master), (x, data.master))
    if not momentum:
        return Call(partial(kernels.lion_apply_, x, codes, **_RATES, **options), (x, codes), (x,))
    options |= {"grad": g, "exp_avg": m, "beta2": BETA2}
    return Call(partial(kernels.lion_apply_, x, codes, **_RATES, **options), (x, codes, g, m), (x, m))


def foreach_lion_apply_(data: Data, **options: Any) -> Call:
    x, codes, g, m = data.param, data.codes(options.get("bits", 1)), data.grad, data.exp_avg
    options |= {"grad": data.split(g), "exp_avg": data.split(m), "beta2": BETA2}
    run = partial(kernels.foreach_lion_apply_, data.split(x), data.split(codes), **_RATES, **options)
    return Call(run, (x, codes, g, m), (x, m))


def lion_step_(data: Data, *, masters: bool = False, **options: Any) -> Call:
    tensors = data.param, data.grad, data.exp_avg
    if masters:
        x, g, m = tensors
        run = partial(kernels.lion_step_, x, g, m, master=data.master, **_RATES, **_BETAS, **options)
        return Call(run, (*tensors, data.master), (x, m, data.master))
    return Call(partial(kernels.lion_step_, *tensors, **_RATES, **_BETAS, **options), tensors, tensors[::2])


def foreach_lion_step_(data: Data, **options: Any) -> Call:
    tensors = data.param, data.grad, data.exp_avg
    run = partial(kernels.foreach_lion_step_, *map(data.split, tensors), **_RATES, **_BETAS, **options)
    return Call(run, tensors, tensors[::2])


def quantize(data: Data, *, scaled: bool = True, **options: Any) -> Call:
    x, options = data.grad, _levels(data, scaled, options)
    # without a scale the values are read twice
    return Call(partial(kernels.quantize, x, **options), (x,) if scaled else (x, x), (options["out"],))


def lion_quantize(data: Data, *, scaled: bool = True, **options: Any) -> Call:
    m, g, options = data.exp_avg, data.grad, _levels(data, scaled, options)
    run = partial(kernels.lion_quantize, m, g, beta1=BETA1, nonfinite=data.nonfinite, **options)
    return Call(run, (m, g) if scaled else (m, g, m, g), (options["out"],))


def foreach_lion_quantize(data: Data, **options: Any) -> Call:
    m, g, out = data.exp_avg, data.grad, _bytes(data, 2)
    options |= {"beta1": BETA1, "scale": [data.scale] * data.parts, "out": data.split(out)}
    return Call(partial(kernels.foreach_lion_quantize, data.split(m), data.split(g), **options), (m, g), (out,))


def dequantize(data: Data, *, bits: int = 2, **options: Any) -> Call:
    codes, out = data.codes(bits), torch.empty(data.n, dtype=data.dtype, device=data.device)
    options |= {"bits": bits, "dtype": data.dtype, "out": out}
    return Call(partial(kernels.dequantize, codes, data.scale, data.n, **options), (codes,), (out,))


def _levels(data: Data, scaled: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with a scale, or None where the op computes it, and with an output tensor."""
    return {**options, "scale": data.scale if scaled else None, "out": _bytes(data, options.get("bits", 2))}


def _bytes(data: Data, bits: int) -> Tensor:
    return torch.empty(packed_bytes(data.n, bits), dtype=torch.uint8, device=data.device)
