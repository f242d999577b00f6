"""Random words of rows of 8 elements, and what is rounded by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.random_bits import Stream
from lioncub.kernels.rounding import PARAM_WORKER, Streams
from lioncub.kernels.triton_gpu.arithmetic import narrow_stochastic
from lioncub.kernels.triton_gpu.rows import ROW, store, store_elements, value_of

# arguments that are never specialized, since a step or a seed must not compile anything anew
ROUNDING_ARGUMENTS = ["seed_low", "seed_high", "rounding_step", "momentum_worker"]
# how a kernel rounds: everything to nearest, parameters stochastically, or momentum too
NEAREST, PARAM, PARAM_AND_MOMENTUM = 0, 1, 2
PARAM_STREAM = tl.constexpr(PARAM_WORKER)


def signed_words(*words: int) -> tuple[int, ...]:
    """int32 of the same low 32 bits, so that each has one type at launch."""
    return tuple((word + 2**31) % 2**32 - 2**31 for word in words)


def rounding_arguments(rounding: Streams | None) -> tuple[tuple[Any, ...], int]:
    """Values of `ROUNDING_ARGUMENTS`, and how to round; a step that stands on the device is passed as it is."""
    if rounding is None:
        return (0, 0, 0, 0), NEAREST
    worker = rounding.momentum_worker
    seed_low, seed_high, momentum_worker = signed_words(*Stream(rounding.seed, 0, 0, 0).key, worker or 0)
    step: Any = rounding.step if isinstance(rounding.step, Tensor) else signed_words(rounding.step)[0]
    return (seed_low, seed_high, step, momentum_worker), PARAM if worker is None else PARAM_AND_MOMENTUM


def stream_number(rounding: Streams | None, i: int) -> int:
    """The number of tensor i's stream, as `signed_words`; 0 where there is none."""
    return 0 if rounding is None else signed_words(rounding.numbers[i])[0]


def numbers_of(rounding: Streams | None) -> Sequence[int] | None:
    """The numbers of all streams, where there are any."""
    return None if rounding is None else rounding.numbers


@triton.jit
def random_rows(rows, seed_low, seed_high, step, tensor, worker):
    """uint32[rows, 8] words of a stream (rule 8): a row takes two Philox blocks of four words."""
    blocks = (rows[:, None] * 2 + tl.arange(0, 2)[None, :]).to(tl.uint32)
    zero = tl.zeros_like(blocks)
    w0, w1, w2, w3 = tl.random.philox_impl(
        blocks,
        zero + step.to(tl.uint32),
        zero + tensor.to(tl.uint32),
        zero + tl.cast(worker, tl.uint32),
        zero + seed_low.to(tl.uint32),
        zero + seed_high.to(tl.uint32),
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(words, (rows.shape[0], ROW))


@triton.jit
def store_rounded(x_ptr, offsets, n_elements, value, rows, stream, worker, STOCHASTIC: tl.constexpr):
    """`store_elements` of ``rows``; with STOCHASTIC bf16 and fp16 take either neighbour.

    ``stream`` is (seed_low, seed_high, step, tensor).
    """
    if STOCHASTIC and (x_ptr.dtype.element_ty != tl.float32):
        seed_low, seed_high, step, tensor = stream
        words = random_rows(rows, seed_low, seed_high, value_of(step), tensor, worker)
        rounded = narrow_stochastic(value, x_ptr.dtype.element_ty, tl.reshape(words, value.shape))
        store(x_ptr + offsets, rounded, offsets, n_elements)
    else:
        store_elements(x_ptr, offsets, n_elements, value)
