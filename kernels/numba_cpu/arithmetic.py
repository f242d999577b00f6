"""What kernels compute from values, apart from where these are loaded and stored: Lion, roundings, random words.

bf16 and fp16 are converted in integers, exact and without branches, so that loops over them vectorize. `widen` reads an
element of any storage dtype as float32; `narrow` rounds a float32 to one, half to even, and `narrow_stochastic` up or
down by a random word. A NaN stays a NaN; its payload is not kept. Random words are those of `lioncub.kernels.rounding`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from lioncub.kernels.numba_cpu.compiling import device_function
from lioncub.kernels.rounding import KEY_INCREMENTS, MULTIPLIERS, ROUNDS

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_MULTIPLIER_0, _MULTIPLIER_1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_INCREMENT_0, _INCREMENT_1 = (np.uint32(increment) for increment in KEY_INCREMENTS)


@device_function
def ema(kept: np.float32, new: np.float32, state: np.float32, incoming: np.float32) -> np.float32:
    """fl(fl(kept*state) + fl(new*incoming)) in fp32 (rule 1): two products, one sum, never fused."""
    return np.float32(np.float32(kept * state) + np.float32(new * incoming))


@device_function
def decayed(x: np.float32, step: np.float32, decay: np.float32) -> np.float32:
    return np.float32(np.float32(x * decay) - step)


@device_function
def signed_step(update: np.float32, lr: np.float32) -> np.float32:
    """lr with the update's sign, 0 for zero and NaN."""
    up = lr if update > np.float32(0.0) else np.float32(0.0)
    down = lr if update < np.float32(0.0) else np.float32(0.0)
    return np.float32(up - down)


def widen(element: Any) -> Any:
    """float32 value of an element: a float32, a bf16 held as uint16 or an fp16 held as int16."""
    raise NotImplementedError("widen: runs in compiled code alone")


def narrow(value: Any, dtype: Any) -> Any:
    """``value``, a float32, rounded to a storage dtype."""
    raise NotImplementedError("narrow: runs in compiled code alone")


def narrow_stochastic(value: Any, dtype: Any, word: Any) -> Any:
    """``value`` rounded to a storage dtype as in `lioncub.kernels.rounding.round_stochastic`, by a uint32."""
    raise NotImplementedError("narrow_stochastic: runs in compiled code alone")


def is_rounded(dtype: Any) -> Any:
    """Whether float32 values are rounded when they are stored as ``dtype``."""
    raise NotImplementedError("is_rounded: runs in compiled code alone")


@device_function
def current_value(master: np.float32, element: Any, dtype: Any) -> np.float32:
    """Return an element's fp32 value: its master or, where that does not round to it, its own (both zeros are one)."""
    value = widen(element)
    return master if widen(narrow(master, dtype)) == value else value


@device_function
def is_finite(value: np.float32) -> bool:
    return bool(np.int32(np.float32(value).view(np.int32) & np.int32(0x7FFFFFFF)) < np.int32(0x7F800000))


@device_function
def bf16_to_float32(element: np.uint16) -> np.float32:
    return np.uint32(np.uint32(element) << np.uint32(16)).view(np.float32)


@device_function
def float32_to_bf16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.uint16(0x7FC0) if value != value else np.uint16(rounded)


@device_function
def fp16_to_float32(element: np.int16) -> np.float32:
    half = np.uint32(np.uint16(element))
    sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
    magnitude = np.uint32(half & np.uint32(0x7FFF))
    # the exponent's bias grows by 112; that of Inf and NaN by twice as much
    bias = np.uint32(0x70000000) if magnitude >= np.uint32(0x7C00) else np.uint32(0x38000000)
    normal = np.uint32(np.uint32(magnitude << np.uint32(13)) + bias)
    # below 2^-14 the value is a count of 2^-24, which float32 holds as a normal number
    subnormal = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24)).view(np.uint32)
    return np.uint32((subnormal if magnitude < np.uint32(0x0400) else normal) | sign).view(np.float32)


@device_function
def float32_to_fp16(value: np.float32) -> np.int16:
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32((bits & np.uint32(0x80000000)) >> np.uint32(16))
    magnitude = np.uint32(bits & _MAGNITUDE)
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    # 0xC8000FFF takes 112 from the exponent and adds half a unit, less one, of the fp16 mantissa
    normal = np.uint32(np.uint32(magnitude + np.uint32(0xC8000FFF) + odd) >> np.uint32(13))
    # 0.5 has its last bit at 2^-24, the spacing of subnormals, so the sum rounds to a count of them
    count = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5)).view(np.uint32)
    subnormal = np.uint32(count - np.uint32(0x3F000000))
    half = subnormal if magnitude < np.uint32(0x38800000) else normal
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x47800000) else half
    half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
    return np.uint16(half | sign).view(np.int16)


@device_function
def float32_to_bf16_stochastic(value: np.float32, word: np.uint32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint16(np.uint32(bits + np.uint32(word & np.uint32(0xFFFF))) >> np.uint32(16))
    is_past_largest = np.uint32(bits & _MAGNITUDE) > np.uint32(0x7F7F0000)
    return float32_to_bf16(value) if is_past_largest else rounded


@device_function
def float32_to_fp16_stochastic(value: np.float32, word: np.uint32) -> np.int16:
    bits = np.float32(value).view(np.uint32)
    sign = np.uint32((bits & np.uint32(0x80000000)) >> np.uint32(16))
    magnitude = np.uint32(bits & _MAGNITUDE)
    # the exponent's bias shrinks by 112
    cut = np.uint32(np.uint32(magnitude + np.uint32(word & np.uint32(0x1FFF))) - np.uint32(0x38000000))
    is_normal = magnitude >= np.uint32(0x38800000)
    small = np.uint32(np.uint32(0) if is_normal else magnitude).view(np.float32)
    count = np.float32(small * np.float32(2.0**24))
    whole = np.int32(count)
    uniform = np.float32(np.float32(np.int32(word >> np.uint32(8))) * np.float32(2.0**-24))
    one_more = np.uint32(1) if uniform < np.float32(count - np.float32(whole)) else np.uint32(0)
    subnormal = np.uint32(np.uint32(whole) + one_more)
    half = np.uint32(cut >> np.uint32(13)) if is_normal else subnormal
    rounded = np.uint16(half | sign).view(np.int16)
    return float32_to_fp16(value) if magnitude > np.uint32(0x477FE000) else rounded


@overload(widen)
def _widen(element: Any) -> Any:
    convert = {types.float32: _same, types.uint16: bf16_to_float32, types.int16: fp16_to_float32}[element]

    # numba compares the annotations of both functions
    def implementation(element: Any) -> Any:
        return convert(element)

    return implementation


@overload(narrow)
def _narrow(value: Any, dtype: Any) -> Any:
    convert = {types.float32: _same, types.uint16: float32_to_bf16, types.int16: float32_to_fp16}[dtype.dtype]

    def implementation(value: Any, dtype: Any) -> Any:
        return convert(value)

    return implementation


@device_function
def _same(value: np.float32) -> np.float32:
    return value


@overload(narrow_stochastic)
def _narrow_stochastic(value: Any, dtype: Any, word: Any) -> Any:
    functions = {types.uint16: float32_to_bf16_stochastic, types.int16: float32_to_fp16_stochastic}
    convert = {types.float32: _itself, **functions}[dtype.dtype]

    def implementation(value: Any, dtype: Any, word: Any) -> Any:
        return convert(value, word)

    return implementation


@device_function
def _itself(value: np.float32, word: np.uint32) -> np.float32:
    return value


@overload(is_rounded)
def _is_rounded(dtype: Any) -> Any:
    answer = dtype.dtype != types.float32

    def implementation(dtype: Any) -> Any:
        return answer

    return implementation


@device_function
def random_words(stream: tuple[int, int, int, int], tensor: int, start: int, words: Any) -> None:
    """words[64] = the random words of elements start to start + 63, start a multiple of 4.

    ``stream`` is both words of the seed, then worker and step, each taken modulo 2^32; ``tensor`` is one of
    `Streams.keys`.
    """
    first_key, second_key = np.uint32(stream[0]), np.uint32(stream[1])
    worker, step, param_id = np.uint32(stream[2]), np.uint32(stream[3]), np.uint32(tensor)
    block = np.uint32((start >> 2) + (tensor >> 32))
    for i in range(16):
        c0, c1, c2, c3 = np.uint32(block + np.uint32(i)), step, param_id, worker
        k0, k1 = first_key, second_key
        for _ in range(ROUNDS):
            product0, product1 = _MULTIPLIER_0 * np.uint64(c0), _MULTIPLIER_1 * np.uint64(c2)
            c0, c1 = np.uint32(_high(product1) ^ c1 ^ k0), np.uint32(product1)
            c2, c3 = np.uint32(_high(product0) ^ c3 ^ k1), np.uint32(product0)
            k0, k1 = np.uint32(k0 + _INCREMENT_0), np.uint32(k1 + _INCREMENT_1)
        words[4 * i] = c0
        words[4 * i + 1] = c1
        words[4 * i + 2] = c2
        words[4 * i + 3] = c3


@device_function
def _high(product: np.uint64) -> np.uint32:
    return np.uint32(product >> np.uint64(32))
