"""Inputs of benchmarks: the tensors of one size and dtype, and a call that is ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lioncub.kernels import add_codes, count_votes, packed_bytes

SIZES = {"64Ki": 2**16, "1Mi": 2**20, "16Mi": 2**24}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# of ops on packed codes, which have no other
PACKED = "packed"
LR, DECAY, BETA1, BETA2 = 1e-4, 0.1, 0.9, 0.99


@dataclass(frozen=True)
class Call:
    """A call that can be repeated, and the tensors that it must move: once for each time that they are named."""

    run: Callable[[], object]
    reads: tuple[Tensor, ...]
    writes: tuple[Tensor, ...]

    @property
    def bytes_moved(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.reads, *self.writes))


def new(n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Stands for a tensor that a call allocates by itself, to count its bytes."""
    return torch.empty(n, dtype=dtype, device="meta")


@dataclass
class Data:
    """Tensors of n elements, a multiple of 4096, made on the device when they are first used."""

    n: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    momentum_dtype: torch.dtype = torch.float32
    # of lists for the foreach ops
    parts: int = 64
    _voters: dict[int, Tensor] = field(default_factory=dict)
    _codes: dict[int, Tensor] = field(default_factory=dict)

    def _normal(self, seed: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(self.n, generator=generator, device=self.device).to(self.dtype)

    @cached_property
    def param(self) -> Tensor:
        return self._normal(0)

    @cached_property
    def grad(self) -> Tensor:
        return self._normal(1)

    @cached_property
    def exp_avg(self) -> Tensor:
        return self._normal(2).to(self.momentum_dtype)

    @cached_property
    def master(self) -> Tensor:
        return self.param.float()

    @cached_property
    def nonfinite(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    @cached_property
    def counts(self) -> Tensor:
        return torch.zeros(2, dtype=torch.int64, device=self.device)

    @cached_property
    def scale(self) -> Tensor:
        return torch.full((1,), 0.8, device=self.device)

    def codes(self, bits: int = 1) -> Tensor:
        """Random bytes of n codes, which ops may overwrite."""
        if bits not in self._codes:
            self._codes[bits] = self._bytes(self.n * bits // 8)
        return self._codes[bits]

    def voters(self, count: int) -> Tensor:
        """One-bit codes of that many voters, a row for each."""
        if count not in self._voters:
            self._voters[count] = self._bytes(count * packed_bytes(self.n)).view(count, -1)
        return self._voters[count]

    @cached_property
    def planes(self) -> Tensor:
        """Counts of two groups of 8 voters."""
        return torch.stack([count_votes(self.voters(8))] * 2)

    def fields(self, bits: int) -> Tensor:
        """The number of ones of 8 voters, in fields of so many bits; of other widths than 4, random bytes."""
        return self._sums if bits == 4 else self.codes(bits)

    @cached_property
    def _sums(self) -> Tensor:
        return add_codes(self.voters(8), bits=1, field_bits=4)

    def _bytes(self, n: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(3)
        return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator, device=self.device)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """A list for the foreach ops."""
        return list(tensor.view(self.parts, -1).unbind())
