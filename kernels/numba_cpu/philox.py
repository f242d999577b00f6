"""Philox-4x32-10 in Numba; the definition is lioncub.kernels.random_bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import device_function
from lioncub.kernels.random_bits import KEY_INCREMENTS, MULTIPLIERS, ROUNDS, Stream

_MULTIPLIER_0, _MULTIPLIER_1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
_INCREMENT_0, _INCREMENT_1 = (np.uint32(increment) for increment in KEY_INCREMENTS)


def stream_words(seed: int, worker: int, step: int | Tensor) -> tuple[int, int, int, int]:
    """What `random_words` takes, but the tensor's number: both words of the key, worker and step."""
    mask = 0xFFFFFFFF
    return (*Stream(seed, 0, 0, 0).key, worker & mask, int(step) & mask)


@device_function
def random_words(stream: tuple[int, int, int, int, int], start: int, words: Any) -> None:
    """words[64] = the random words of elements start to start + 63, start a multiple of 4.

    stream: both words of the key, then worker, step and tensor, each taken modulo 2^32.
    """
    first_key, second_key = np.uint32(stream[0]), np.uint32(stream[1])
    worker, step, tensor = np.uint32(stream[2]), np.uint32(stream[3]), np.uint32(stream[4])
    for i in range(16):
        c0, c1, c2, c3 = np.uint32((start >> 2) + i), step, tensor, worker
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
