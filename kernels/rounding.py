"""Stochastic rounding of what is stored in bf16 or fp16: whose random words are taken, and the arithmetic (rule 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lioncub.kernels.checks import check_integer
from lioncub.kernels.random_bits import MAX_ELEMENTS, Stream
from lioncub.kernels.scalars import count_scalar, is_elsewhere

# replicas round parameters alike, so their stream is that of a worker that does not exist
PARAM_WORKER = 2**32 - 1
# momentum is a worker's own; ranks themselves are the workers of stochastic quantization
MOMENTUM_WORKERS = 2**31
_NEAREST = -1
_SIGN, _MAGNITUDE = 0x8000, 0x7FFFFFFF
# fp32 bits of the largest finite value, and mantissa bits that are dropped
_LARGEST = {torch.bfloat16: 0x7F7F0000, torch.float16: 0x477FE000}
_DROPPED = {torch.bfloat16: 16, torch.float16: 13}
# 2^-14, the least normal fp16, and how much larger a float32's exponent is, both in fp32 bits
_LEAST_NORMAL, _BIAS = 0x38800000, 0x38000000


@dataclass(frozen=True)
class Rounding:
    """Round what is stored in bf16 or fp16 stochastically: to either neighbour, so that its mean is the value.

    Random words are a function of (seed, step, tensor, element): the same on all workers for parameters.

    Args:
        seed: any integer, taken modulo 2^64.
        step: the step counter, modulo 2^32; a 0-dim int64 tensor may stand on the parameters' device.
        rank: this worker's, whose momentum is rounded stochastically too; None: momentum is rounded to nearest.
    """

    seed: int = 0
    step: int | Tensor = 0
    rank: int | None = None

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, least=None)
        if not isinstance(self.step, Tensor):
            check_integer("step", self.step, least=None)
        if self.rank is not None:
            check_integer("rank", self.rank, least=None)
        if self.rank is not None and not 0 <= self.rank < MOMENTUM_WORKERS:
            raise ValueError(f"rank: expected None or a rank in 0 .. 2^31 - 1, got {self.rank}")


class Streams(NamedTuple):
    """What a kernel over a list of tensors takes: a stream for each, by its number.

    ``momentum_worker`` is None where momentum is rounded to nearest.
    """

    seed: int
    step: int | Tensor
    momentum_worker: int | None
    numbers: Sequence[int]

    def of_param(self, i: int) -> Stream:
        """The stream of parameter i; it waits for a device that has the step."""
        return Stream(self.seed, PARAM_WORKER, int(self.step), self.numbers[i])

    def of_momentum(self, i: int) -> Stream | None:
        """The stream of momentum i, as in `of_param`."""
        if self.momentum_worker is None:
            return None
        return Stream(self.seed, self.momentum_worker, int(self.step), self.numbers[i])


# a registered op's arguments: int64 [seed, worker of momentum], the step, and the tensors' numbers
Arguments = tuple[Tensor | None, Tensor | None, Sequence[int]]


def rounding_arguments(rounding: Rounding | None, tensors: Sequence[int] | None, param: Sequence[Tensor]) -> Arguments:
    """What a registered op takes; ``tensors`` are the numbers of ``param``, their places unless given.

    Raises TypeError or ValueError for arguments that are impossible.
    """
    if rounding is None:
        return None, None, ()
    if not isinstance(rounding, Rounding):
        raise TypeError(f"rounding: expected None or Rounding(...), got {type(rounding).__name__}")
    numbers: Sequence[int] = range(len(param)) if tensors is None else tensors
    if len(numbers) != len(param):
        raise ValueError(f"tensors: expected {len(param)} numbers, one per tensor, got {len(numbers)}")
    longest = max([tensor.numel() for tensor in param], default=0)
    if longest > MAX_ELEMENTS:
        raise ValueError(f"rounding: expected at most 2^34 elements in a stream, got {longest}")
    worker = _NEAREST if rounding.rank is None else MOMENTUM_WORKERS + rounding.rank
    # any integer is taken modulo 2^64, so that a seed from os.urandom is as good as a small one
    seed = (rounding.seed + 2**63) % 2**64 - 2**63
    words = torch.tensor([seed, worker], dtype=torch.int64, device="cpu")
    return words, count_scalar("step", rounding.step), stream_numbers(numbers)


def stream_numbers(tensors: Sequence[int]) -> list[int]:
    """Numbers of tensors as a registered op takes them, modulo 2^32 as in a stream."""
    for i, number in enumerate(tensors):
        if type(number) is not int:
            check_integer(f"tensors[{i}]", number, least=None)
    return [int(number) & 0xFFFFFFFF for number in tensors]


def rounding_of(words: Tensor | None, step: Tensor | None) -> Rounding | None:
    """What `rounding_arguments` was given."""
    if words is None or step is None:
        return None
    seed, worker = words.tolist()
    return Rounding(seed, step, None if worker == _NEAREST else worker - MOMENTUM_WORKERS)


def streams_of(words: Tensor | None, step: Tensor | None, numbers: Sequence[int]) -> Streams | None:
    """The inverse of `rounding_arguments`, within a registered op; a step on a device is not waited for."""
    if words is None or step is None:
        return None
    seed, worker = words.tolist()
    return Streams(seed, step if is_elsewhere(step) else int(step), None if worker == _NEAREST else worker, numbers)


def round_stochastic(value: Tensor, dtype: torch.dtype, words: Tensor) -> Tensor:
    """fp32 ``value`` as ``dtype``, up or down at random so that the mean is the value; fp32 stays as it is.

    ``words`` are int64 in 0 .. 2^32 - 1.

    1. In the normal range (of bf16: everywhere) the low bits of the word, as many as the mantissa loses, are added to
       the magnitude's bits, which are then cut off.
    2. An fp16 magnitude below 2^-14 is a count of 2^-24: its whole part, and one more where u = (word >> 8) * 2^-24 is
       less than its fraction.
    3. What is past the largest finite value, or a NaN, goes to nearest, half to even.
    """
    if dtype == torch.float32:
        return value
    bits = value.view(torch.int32)
    magnitude = (bits & _MAGNITUDE).long()
    dropped = _DROPPED[dtype]
    sum_of_both = magnitude + (words & (2**dropped - 1))
    if dtype == torch.bfloat16:
        rounded = sum_of_both >> dropped
    else:
        count = torch.where(magnitude < _LEAST_NORMAL, value.abs(), 0.0) * 2.0**24
        uniform = (words >> 8).float() * 2.0**-24
        subnormal = count.floor().long() + (uniform < count - count.floor())
        rounded = torch.where(magnitude < _LEAST_NORMAL, subnormal, (sum_of_both - _BIAS) >> dropped)
    # 16 bits in two's complement
    stored = (rounded - torch.where(bits < 0, _SIGN, 0)).to(torch.int16).view(dtype)
    return torch.where(magnitude > _LARGEST[dtype], value.to(dtype), stored)
