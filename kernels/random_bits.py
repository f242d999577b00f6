"""The counter-based generator of rule 8: Philox-4x32-10 (Salmon et al., SC 2011), the same words everywhere.

Element j of a stream takes word j % 4 of the block whose counter is (j // 4, step, tensor, worker), under the
64-bit seed as key. Nothing is stored, so there is nothing to checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MAX_ELEMENTS = 2**34
_MASK = 0xFFFFFFFF


class Stream(NamedTuple):
    """What a stream of random words is a pure function of; each is taken modulo its width (seed 64 bits, others 32)."""

    seed: int
    worker: int
    step: int
    tensor: int

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & _MASK, (self.seed >> 32) & _MASK


def random_words(stream: Stream, n: int, device: torch.device) -> Tensor:
    """int64[n] of random integers in 0 .. 2^32 - 1."""
    blocks = -(-n // 4)
    c0 = torch.arange(blocks, dtype=torch.int64, device=device)
    c1, c2, c3 = (torch.full_like(c0, part & _MASK) for part in (stream.step, stream.tensor, stream.worker))
    k0, k1 = stream.key
    for _ in range(ROUNDS):
        # int64 products wrap, but their low 64 bits are those of the unsigned product
        high0, low0 = _halves(c0 * MULTIPLIERS[0])
        high1, low1 = _halves(c2 * MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & _MASK, (k1 + KEY_INCREMENTS[1]) & _MASK
    return rearrange(torch.stack([c0, c1, c2, c3]), "word block -> (block word)")[:n]


def _halves(product: Tensor) -> tuple[Tensor, Tensor]:
    return (product >> 32) & _MASK, product & _MASK
