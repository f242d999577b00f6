"""Device functions on values alone: what the kernels compute, apart from where it is loaded and stored."""

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret

_INTERPRETED = tl.constexpr(INTERPRETED)
# adding 1.5 * 2^23 leaves no fraction bits, so the sum is rounded to an integer, half to even
_ROUNDING_SHIFT = tl.constexpr(12582912.0)


@triton.jit
def widen(value):
    """``value`` (fp32, bf16 or fp16) as fp32, exactly."""
    wide = value.to(tl.float32)
    if _INTERPRETED and value.dtype == tl.bfloat16:
        # the interpreter's own conversion loses bf16 denormals
        wide = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return wide


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """fp32 ``value`` rounded to ``dtype``, half to even."""
    narrowed = value.to(dtype)
    if _INTERPRETED and dtype == tl.bfloat16:
        # the interpreter's own conversion truncates
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        narrowed = tl.where(value == value, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return narrowed


@triton.jit
def narrow_stochastic(value, dtype: tl.constexpr, random_word):
    """fp32 ``value`` as bf16 or fp16 by a uint32, as in `lioncub.kernels.rounding.round_stochastic`."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        rounded = (bits + (random_word & 0xFFFF)) >> 16
        is_past_largest = magnitude > 0x7F7F0000
    else:
        is_normal = magnitude >= 0x38800000
        # the exponent's bias shrinks by 112
        normal = (magnitude + (random_word & 0x1FFF) - 0x38000000) >> 13
        # below 2^-14 a count of 2^-24
        count = tl.where(is_normal, 0.0, tl.abs(value)) * 16777216.0
        subnormal = round_stochastic(count, random_word).to(tl.uint32)
        rounded = tl.where(is_normal, normal, subnormal) | ((bits >> 16) & 0x8000)
        is_past_largest = magnitude > 0x477FE000
    nearest = narrow(value, dtype).to(tl.uint16, bitcast=True)
    return tl.where(is_past_largest, nearest, rounded.to(tl.uint16)).to(dtype, bitcast=True)


@triton.jit
def mix(kept, new, state, incoming):
    """fl(fl(kept*state) + fl(new*incoming)) of fp32 values (rule 1); kernels are launched with fusion off."""
    return kept * state + new * incoming


@triton.jit
def is_finite(value):
    """False for Inf and NaN."""
    return tl.abs(value) < float("inf")


@triton.jit
def is_up(value, parity_bit):
    """Return the one-bit code: True where value > 0, the parity bit where it is zero or NaN (rule 2)."""
    return (value > 0) | (parity_bit & ~(value < 0))


@triton.jit
def round_half_even(value):
    """int32 nearest to an fp32 |value| <= 2^22."""
    return ((value + _ROUNDING_SHIFT) - _ROUNDING_SHIFT).to(tl.int32)


@triton.jit
def round_stochastic(value, random_word):
    """int32 next to an fp32 |value| <= 2^22, away from zero with the fraction's probability (24 random bits)."""
    magnitude = tl.abs(value)
    whole = magnitude.to(tl.int32)
    uniform = (random_word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    rounded = whole + (uniform < magnitude - whole.to(tl.float32)).to(tl.int32)
    return tl.where(value < 0, -rounded, rounded)
