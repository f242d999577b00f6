"""majority_vote in Numba: votes counted in bit planes, which are compared with half the voters, block by block."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels.numba_cpu.compiling import kernel
from lioncub.kernels.numba_cpu.planes import (
    BLOCK,
    ROW,
    add_tally,
    block_slices,
    count_unanimous,
    count_voters,
    decide,
)
from lioncub.kernels.numba_cpu.signs import parity_word
from lioncub.kernels.numba_cpu.threads import run_slices


def majority_vote(packed: Tensor, parity: int, out: Tensor, counts: Tensor | None) -> None:
    """out[B] = majority bit of each column of packed[N, B]; counts[2] += (ties, unanimous codes), pads included."""
    words, tail = divmod(out.numel(), 8)
    if words:
        _vote(packed, words, parity, out, counts, 0)
    if tail:
        # the last bytes are voted on in words of their own, whose pad codes are unanimous but not counted
        padded = torch.zeros(packed.shape[0], 8, dtype=torch.uint8, device="cpu")
        padded[:, :tail] = packed[:, 8 * words :]
        voted = torch.empty(8, dtype=torch.uint8, device="cpu")
        _vote(padded, 1, parity, voted, counts, 64 - 8 * tail)
        out[8 * words :] = voted[:tail]


def _vote(packed: Tensor, words: int, parity: int, out: Tensor, counts: Tensor | None, pads: int) -> None:
    source = (packed.data_ptr(), packed.stride(0), packed.shape[0])
    counted = run_slices(_vote_kernel, block_slices(words), *source, out.data_ptr(), parity, counts is not None)
    add_tally(counts, counted, pads)


@kernel
def _vote_kernel(
    first: int, last: int, packed_ptr: int, stride: int, workers: int, out_ptr: int, parity: int, counting: bool
) -> tuple[int, int]:
    levels = 0
    while workers >> levels:
        levels += 1
    # as addresses, since arrays that own memory are counted by atomic operations whenever they are passed on
    memory = np.zeros((max(levels, 4) + 4 + 3) * BLOCK, np.uint64)
    planes = memory.ctypes.data
    group = planes + max(levels, 4) * ROW
    spare = group + 4 * ROW
    undecided = parity_word(parity)
    ties, unanimous = 0, 0
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        count_voters(packed_ptr + 8 * start, stride, workers, levels, n, planes, group, spare)
        ties += decide(planes, workers, levels, n, undecided, out_ptr + 8 * start, spare, counting)
        if counting:
            unanimous += count_unanimous(planes, workers, levels, n, spare)
    return ties, unanimous
