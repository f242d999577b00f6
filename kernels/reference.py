"""The specification: every op in plain torch, for any device. Imports neither triton nor numba.

Tensors are 1-d and contiguous (the public functions hand over storage-order views), checked, and written in
place; coefficients are float32 values. Each implementation module has these same functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, reduce
from torch import Tensor

from lioncub.kernels.layout import largest_level
from lioncub.kernels.rounding import Stream, Streams, current_values, random_words, round_stochastic
from lioncub.kernels.scalars import Mix, round_to_float32


def unpack_signs(packed: Tensor, out: Tensor) -> None:
    """out[n] = +1 where the bit is set, else -1."""
    out.copy_(_unpack_fields(packed, out.numel(), 1).to(torch.int8) * 2 - 1)


def lion_encode(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor] | None,
    beta1: Mix,
    parity: int,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
    beta2: Mix | None = None,
) -> None:
    """out[i] = one bit per element of tensor i's update: 1 where > 0, parity bit where 0 or NaN (rules 2, 3).

    Without ``grad`` the signs are those of exp_avg itself. nonfinite[i] = 1 where an element of the update is not
    finite. With ``beta2`` exp_avg advances too; an element whose update is not finite keeps its momentum.
    """
    for i, (m, packed) in enumerate(zip(exp_avg, out, strict=True)):
        update = m if grad is None else _ema(beta1, m, grad[i])
        _flag_nonfinite(update, nonfinite, i)
        _pack_fields(_sign_codes(update, parity), 1, packed)
        if beta2 is not None and grad is not None:
            m.copy_(torch.where(update.isfinite(), _ema(beta2, m, grad[i]), m.float()))


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of each column of packed[N, B]; counts[2] += (ties, unanimous codes), pads included."""
    _pack_majority(_count_ones(packed), packed.shape[0], parity, out, counts)


def count_votes(packed: Tensor, out: Tensor) -> None:
    """out[P, B] = bit planes of the number of ones in each code of packed[N, B]; plane k holds bit k."""
    ones = _count_ones(packed)
    for k, plane in enumerate(out):
        _pack_fields((ones >> k) & 1, 1, plane)


def majority_of_counts(planes: Tensor, voters: int, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of the counts in planes[G, P, B], summed over G; counts as in majority_vote."""
    ones = sum(_count_ones(column) << k for k, column in enumerate(planes.unbind(1)))
    assert isinstance(ones, Tensor)
    _pack_majority(ones, voters, parity, out, counts)


def majority_of_fields(
    fields: Tensor, field_bits: int, voters: int, parity: int, out: Tensor, counts: Tensor | None
) -> None:
    """out[B] = majority bit of 8*B fields, each the number of ones of ``voters``; counts as in majority_vote."""
    ones = _unpack_fields(fields, 8 * out.numel(), field_bits).to(torch.int32)
    _pack_majority(ones, voters, parity, out, counts)


def add_codes(packed: Tensor, bits: int, field_bits: int, out: Tensor) -> None:
    """out[B*field_bits//bits] = the sum over rows of each code of packed[G, B], in a field of field_bits bits."""
    n = packed.shape[1] * 8 // bits
    total = torch.zeros(n, dtype=torch.int32, device=packed.device)
    for row in packed:
        total += _unpack_fields(row, n, bits)
    _pack_fields(total, field_bits, out)


def ternary_of_fields(
    fields: Tensor, field_bits: int, step: int, offset: int, largest: int, out: Tensor, counts: Tensor | None
) -> None:
    """out[n/4] = 1 + sign(step*field - offset) in 2 bits; counts[2] += (signs of 0, fields of 0 or ``largest``)."""
    codes = _unpack_fields(fields, 4 * out.numel(), field_bits).to(torch.int32)
    sign = (codes * step - offset).sign()
    _pack_fields((sign + 1).to(torch.uint8), 2, out)
    if counts is not None:
        counts += torch.stack([(sign == 0).sum(), ((codes == 0) | (codes == largest)).sum()])


def lion_apply_(
    param: Sequence[Tensor],
    packed: Sequence[Tensor],
    bits: int,
    step: int,
    offset: int,
    rate: float,
    decay: float,
    grad: Sequence[Tensor] | None,
    exp_avg: Sequence[Tensor] | None,
    beta2: Mix | None,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: Sequence[Tensor] | None = None,
) -> None:
    """param = param*decay - (step*code - offset)*rate; where given, exp_avg = beta2*exp_avg + (1-beta2)*grad.

    A tensor and its momentum stay as they are where int32[n] ``active`` is zero. With masters, whose entries for fp32
    parameters are not used, the others move as `current_values`, and are their masters rounded to nearest.
    """
    for i, (x, codes) in enumerate(zip(param, packed, strict=True)):
        if active is not None and not active[i]:
            continue
        direction = _unpack_fields(codes, x.numel(), bits).to(torch.int32) * step - offset
        _move(x, direction.float() * rate, decay, rounding, master, i)
        if grad is not None and exp_avg is not None and beta2 is not None:
            moved = _ema(beta2, exp_avg[i], grad[i])
            _store(exp_avg[i], moved, None if rounding is None else rounding.of_worker(i))


def lion_step_(
    param: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    lr: float,
    decay: float,
    beta1: Mix,
    beta2: Mix,
    active: Tensor | None = None,
    rounding: Streams | None = None,
    master: Sequence[Tensor] | None = None,
) -> None:
    """Take the whole Lion step of one worker; the sign of zero and of NaN is 0. The last three as in lion_apply_."""
    for i, (x, g, m) in enumerate(zip(param, grad, exp_avg, strict=True)):
        if active is not None and not active[i]:
            continue
        update = _ema(beta1, m, g)
        rate = torch.full_like(update, lr)
        step = torch.where(update > 0, rate, 0.0) - torch.where(update < 0, rate, 0.0)
        _move(x, step, decay, rounding, master, i)
        _store(m, _ema(beta2, m, g), None if rounding is None else rounding.of_worker(i))


def lion_block_scale(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor] | None,
    beta1: Mix,
    norm: str,
    block: int,
    scale: Sequence[Tensor],
) -> None:
    """scale[i] = norm of each block of |update i|: mean ("l1"), root mean square ("l2") or maximum ("linf").

    Without ``grad`` the norms are those of exp_avg itself. Those of an empty tensor are 0.
    """
    for i, (m, out) in enumerate(zip(exp_avg, scale, strict=True)):
        _store_norms(m if grad is None else _ema(beta1, m, grad[i]), norm, block, out)


def _store_norms(x: Tensor, norm: str, block: int, scale: Tensor) -> None:
    n, blocks = x.numel(), scale.numel()
    size = block or max(n, 1)
    magnitude = torch.zeros(blocks * size, dtype=torch.float64, device=x.device)
    magnitude[:n] = x.double().abs()
    magnitude = rearrange(magnitude, "(block element) -> block element", block=blocks)
    if norm == "linf":
        scale.copy_(magnitude.amax(dim=1))
        return
    filled = torch.full((blocks, 1), size, dtype=torch.float64, device=x.device)
    filled[-1] = max(n - (blocks - 1) * size, 1)
    power = magnitude if norm == "l1" else magnitude.square()
    mean = (power / filled).sum(dim=1)
    scale.copy_(mean if norm == "l1" else mean.sqrt())


def lion_quantize(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor] | None,
    beta1: Mix,
    scale: Sequence[Tensor],
    gain: float,
    block: int,
    bits: int,
    streams: Streams | None,
    out: Sequence[Tensor],
    nonfinite: Tensor | None,
) -> None:
    """out[i] = packed codes q + K of update i, q = gain*K*update/scale[i] rounded to even or, with streams, by its own.

    Without ``grad`` exp_avg itself is quantized. nonfinite[i] = 1 where an element of update i is not finite.
    """
    for i, (m, packed) in enumerate(zip(exp_avg, out, strict=True)):
        update = m if grad is None else _ema(beta1, m, grad[i])
        _flag_nonfinite(update, nonfinite, i)
        level = largest_level(bits)
        factor = torch.where(scale[i] == 0, 0.0, torch.full_like(scale[i], gain * level) / scale[i])
        ratio = update.float() * _per_element(factor, block, update.numel())
        ratio = torch.where(ratio.isnan(), 0.0, ratio).clamp(-level, level)
        q = _round_levels(ratio, None if streams is None else streams.of_worker(i))
        _pack_fields((q + level).to(torch.uint8), bits, packed)


def _round_levels(ratio: Tensor, stream: Stream | None) -> Tensor:
    if stream is None:
        return ratio.round()
    magnitude = ratio.abs()
    whole = magnitude.floor()
    uniform = (random_words(stream, ratio.numel(), ratio.device) >> 8).float() * 2.0**-24
    return torch.copysign(whole + (uniform < magnitude - whole), ratio)


def dequantize(packed: Tensor, scale: Tensor, gain: float, block: int, bits: int, out: Tensor) -> None:
    """out[n] = q * (scale / (gain*K))."""
    level = largest_level(bits)
    q = _unpack_fields(packed, out.numel(), bits).float() - level
    unit = scale / round_to_float32(gain * level)
    out.copy_(q * _per_element(unit, block, out.numel()))


def _ema(mix: Mix, state: Tensor, incoming: Tensor) -> Tensor:
    """fl(fl(kept*state) + fl(new*incoming)) in fp32 (rule 1): two products, one sum, never fused."""
    return mix.kept * state.float() + mix.new * incoming.float()


def _move(
    x: Tensor, step: Tensor, decay: float, rounding: Streams | None, master: Sequence[Tensor] | None, i: int
) -> None:
    """x = x*decay - step of the i-th parameter; one with a master takes the result from that."""
    if master is None or x.dtype == torch.float32:
        _store(x, x.float() * decay - step, None if rounding is None else rounding.of_param(i))
    else:
        master[i].copy_(current_values(x, master[i]) * decay - step)
        x.copy_(master[i])


def _store(out: Tensor, value: Tensor, stream: Stream | None) -> None:
    """out = fp32 ``value``, rounded to nearest or, with a stream, stochastically."""
    if stream is None or out.dtype == torch.float32:
        out.copy_(value)
    else:
        out.copy_(round_stochastic(value, out.dtype, random_words(stream, out.numel(), out.device)))


def _flag_nonfinite(update: Tensor, nonfinite: Tensor | None, i: int) -> None:
    # a gradient or momentum that is not finite makes the update not finite too, so one test sees all three
    if nonfinite is not None:
        nonfinite[i] |= (~update.isfinite()).any().to(torch.int32)


def _sign_codes(x: Tensor, parity: int) -> Tensor:
    undecided = ~((x > 0) | (x < 0))
    return torch.where(undecided, _parity_bits(x, parity), (x > 0).to(torch.uint8))


def _parity_bits(like: Tensor, parity: int) -> Tensor:
    """(j + t) & 1 of each flat index j (rule 3)."""
    index = torch.arange(like.numel(), dtype=torch.int64, device=like.device)
    return ((index + (parity & 1)) & 1).to(torch.uint8)


def _per_element(per_block: Tensor, block: int, n: int) -> Tensor:
    return per_block.repeat_interleave(block)[:n] if block else per_block.expand(n)


def _count_ones(packed: Tensor) -> Tensor:
    """int32[8*B]: the number of ones in each code of packed[N, B]."""
    bits = torch.stack([_unpack_fields(row, 8 * packed.shape[1], 1) for row in packed])
    ones: Tensor = reduce(bits.to(torch.int32), "worker code -> code", "sum")
    return ones


def _pack_majority(ones: Tensor, voters: int, parity: int, out: Tensor, counts: Tensor | None) -> None:
    tied = 2 * ones == voters
    majority = torch.where(tied, _parity_bits(ones, parity), (2 * ones > voters).to(torch.uint8))
    _pack_fields(majority, 1, out)
    if counts is not None:
        counts += torch.stack([tied.sum(), ((ones == 0) | (ones == voters)).sum()])


def _pack_fields(codes: Tensor, bits: int, out: Tensor) -> None:
    """Little-endian fields of ``bits`` bits; out beyond the last code is zero."""
    if bits == 16:
        codes, bits = torch.stack([codes & 0xFF, codes.to(torch.int32) >> 8], dim=1).flatten(), 8
    per_byte = 8 // bits
    padded = torch.zeros(out.numel() * per_byte, dtype=torch.uint8, device=codes.device)
    padded[: codes.numel()] = codes
    fields = rearrange(padded, "(byte field) -> byte field", field=per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    torch.sum(fields << shifts, dim=1, dtype=torch.uint8, out=out)


def _unpack_fields(packed: Tensor, n: int, bits: int) -> Tensor:
    """Return the first n codes of ``packed`` as uint8[n], those of 16 bits as int32[n]."""
    if bits == 16:
        low, high = rearrange(packed.to(torch.int32), "(code byte) -> byte code", byte=2)
        wide: Tensor = low | high << 8
        return wide[:n]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    fields = (rearrange(packed, "byte -> byte 1") >> shifts) & (2**bits - 1)
    codes: Tensor = rearrange(fields, "byte field -> (byte field)")
    return codes[:n]
