"""Random words (rule 8), and stochastic rounding of what is stored in bf16 or fp16 by them.

The generator is Philox-4x32-10 (Salmon et al., SC 2011), the same words everywhere. Element j of a stream takes word
j % 4 of the block whose counter is (j // 4, step, param_id, worker), under the 64-bit seed as key. A shard that is a
run of a whole tensor takes the words from its first element on, where that is a multiple of 4. Nothing is stored, so
there is nothing to checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from lioncub.kernels.checks import check_integer
from lioncub.kernels.scalars import count_scalar

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MAX_ELEMENTS = 2**34
# of a block
WORDS = 4
_MASK = 0xFFFFFFFF
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


class Stream(NamedTuple):
    """What a stream of random words is a pure function of; each is taken modulo its width (seed 64 bits, others 32).

    ``start``, a multiple of 4, is the element whose word comes first.
    """

    seed: int
    worker: int
    step: int
    param_id: int
    start: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.seed & _MASK, (self.seed >> 32) & _MASK


def random_words(stream: Stream, n: int, device: torch.device) -> Tensor:
    """int64[n] of random integers in 0 .. 2^32 - 1."""
    first = stream.start // WORDS
    c0 = torch.arange(first, first - (-n // WORDS), dtype=torch.int64, device=device)
    c1, c2, c3 = (torch.full_like(c0, part & _MASK) for part in (stream.step, stream.param_id, stream.worker))
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


@dataclass(frozen=True)
class Rounding:
    """Round what is stored in bf16 or fp16 stochastically: to either neighbour, so that its mean is the value.

    Random words are a function of (seed, step, param_id, element): the same on all workers for parameters.

    Args:
        seed: any integer, taken modulo 2^64.
        step: the step counter, modulo 2^32; or a 0-dim int64 tensor on the parameters' device.
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
    """The random streams of a list of tensors: those of its parameters, which no worker owns, and those of a worker.

    ``worker`` is None where only parameters are rounded. ``starts`` are the elements of whole tensors at which these
    begin; where it is empty, all begin at 0.
    """

    seed: int
    step: int | Tensor
    worker: int | None
    param_ids: Sequence[int]
    starts: Sequence[int] = ()

    def of_param(self, i: int) -> Stream:
        """Return the stream of parameter i; it waits for a device that has the step."""
        return Stream(self.seed, PARAM_WORKER, int(self.step), self.param_ids[i], self.starts[i] if self.starts else 0)

    def of_worker(self, i: int) -> Stream | None:
        """Return the worker's stream for tensor i, as in `of_param`."""
        return None if self.worker is None else self.of_param(i)._replace(worker=self.worker)

    @property
    def keys(self) -> tuple[int, ...]:
        """Return each tensor's id and, above it, its first block of words: both of 32 bits, in one int64 of a table."""
        if not self.starts:
            return tuple(self.param_ids)
        return tuple(
            [
                _signed(start // WORDS << 32 | param_id & _MASK)
                for param_id, start in zip(self.param_ids, self.starts, strict=True)
            ]
        )


# a registered op's arguments: int64 [seed, worker], the step, the parameters' ids and where they start, empty where all
# do at 0; streams_of is the inverse
Arguments = tuple[Tensor | None, Tensor | None, Sequence[int], Sequence[int]]
NO_STREAM: Arguments = (None, None, (), ())


def rounding_arguments(
    rounding: Rounding | None,
    param_ids: Sequence[int] | None,
    stream_starts: Sequence[int] | None,
    param: Sequence[Tensor],
) -> Arguments:
    """Return the streams to round by as a registered op takes them; ``param_ids`` are places in ``param`` unless given.

    Raises TypeError or ValueError for arguments that are impossible.
    """
    if rounding is None:
        return NO_STREAM
    if not isinstance(rounding, Rounding):
        raise TypeError(f"rounding: expected None or Rounding(...), got {type(rounding).__name__}")
    worker = _NEAREST if rounding.rank is None else MOMENTUM_WORKERS + rounding.rank
    return stream_arguments("rounding", rounding.seed, worker, rounding.step, param_ids, stream_starts, param)


def stream_arguments(
    name: str,
    seed: int,
    worker: int,
    step: int | Tensor,
    param_ids: Sequence[int] | None,
    stream_starts: Sequence[int] | None,
    like: Sequence[Tensor],
) -> Arguments:
    """Return a stream for each tensor of ``like`` as a registered op takes them; ``name`` is the option that asks."""
    ids: Sequence[int] = range(len(like)) if param_ids is None else param_ids
    if len(ids) != len(like):
        raise ValueError(f"param_ids: expected {len(like)} numbers, one per tensor, got {len(ids)}")
    for i, param_id in enumerate(ids):
        if type(param_id) is not int:
            check_integer("param_id" if len(ids) == 1 else f"param_ids[{i}]", param_id, least=None)
    check_integer("worker", worker, least=None)
    check_integer("seed", seed, least=None)
    longest = max([tensor.numel() for tensor in like], default=0)
    if longest > MAX_ELEMENTS:
        raise ValueError(f"{name}: expected at most 2^34 elements in a stream, got {longest}")
    # any integer is taken modulo 2^64, so that a seed from os.urandom is as good as a small one
    if not isinstance(step, Tensor):
        check_integer("step", step, least=None)
        step = _signed(step)
    words = torch.tensor([_signed(seed), _signed(worker)], dtype=torch.int64, device="cpu")
    starts = _checked_starts(stream_starts, like)
    return words, count_scalar("step", step), [int(param_id) & _MASK for param_id in ids], starts


def _checked_starts(stream_starts: Sequence[int] | None, like: Sequence[Tensor]) -> Sequence[int]:
    """Return the starts of streams, none where all are 0. Raises TypeError or ValueError for impossible ones."""
    if stream_starts is None:
        return ()
    if len(stream_starts) != len(like):
        raise ValueError(f"stream_starts: expected {len(like)} numbers, one per tensor, got {len(stream_starts)}")
    if not any(stream_starts):
        return ()
    for i, (start, tensor) in enumerate(zip(stream_starts, like, strict=True)):
        check_integer(f"stream_starts[{i}]", start, most=MAX_ELEMENTS - tensor.numel())
        if start % WORDS:
            raise ValueError(f"stream_starts[{i}]: expected a multiple of {WORDS}, got {start}")
    return [int(start) for start in stream_starts]


def _signed(number: int) -> int:
    """Return the integer in the range of int64 that is equal modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63


def streams_of(
    words: Tensor | None, step: Tensor | None, param_ids: Sequence[int], starts: Sequence[int]
) -> Streams | None:
    """Return what `stream_arguments` was given, within a registered op; a step on a device is not waited for."""
    if words is None or step is None:
        return None
    seed, worker = words.tolist()
    now = int(step) if step.is_cpu else step
    return Streams(seed, now, None if worker == _NEAREST else worker, param_ids, starts)


def current_values(param: Tensor, master: Tensor) -> Tensor:
    """Return the fp32 values of a bf16 or fp16 parameter: its master or, where that does not round to it, its own.

    Both zeros are equal, so that a zero of the other sign does not cost what the master has below the least magnitude;
    a NaN in either is not.
    """
    value = param.float()
    return torch.where(master.to(param.dtype).float() == value, master, value)


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
