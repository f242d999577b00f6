"""Compressions: the code of each rank's update, and the code of their result."""

from __future__ import annotations

from dataclasses import dataclass

from lioncub.arguments import check_count, check_flag
from lioncub.collectives import CodeFormat
from lioncub.kernels.quantization import check_format


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Base of all compressions; each param group of `LionCub` has one."""

    @property
    def form(self) -> CodeFormat:
        """The format on the wire: bits per parameter of a rank's code, and of the result."""
        raise NotImplementedError

    @property
    def has_one_scale(self) -> bool:
        """Whether all elements of a parameter are quantized by one scale."""
        return False

    def wire_bits(self, workers: int) -> tuple[int, int]:
        """Return the bits per parameter up (a rank's code) and down (the result, where an algorithm sends it back)."""
        return self.form.bits, self.form.result_bits(workers)


@dataclass(frozen=True, kw_only=True)
class SignVote(Compression):
    """sign(c) in 1 bit up, the majority in 1 bit down (Distributed Lion's MaVo, arXiv 2404.00438); ties by parity."""

    @property
    def form(self) -> CodeFormat:
        """See `Compression.form`."""
        return CodeFormat(1, "majority")


@dataclass(frozen=True, kw_only=True)
class SignMean(Compression):
    """sign(c) in 1 bit up, the mean of all signs down (Distributed Lion's Avg): steps of lr times -1 to 1.

    The mean of N signs takes a field of 2, 4, 8 or 16 bits that holds 0..N.
    """

    @property
    def form(self) -> CodeFormat:
        """See `Compression.form`."""
        return CodeFormat(1, "sum")


@dataclass(frozen=True, kw_only=True)
class TernaryVote(Compression):
    """Signs that keep zero in 2 bits up, the sign of their sum in 2 bits down; where it is 0, x only decays.

    For what must not move: padding rows, pruned weights, rare rows of an embedding. A |c| below 2^-126, the least
    normal number, may count as zero.
    """

    @property
    def form(self) -> CodeFormat:
        """See `Compression.form`."""
        return CodeFormat(2, "ternary")


@dataclass(frozen=True, kw_only=True)
class Quantized(Compression):
    """c in levels -K..K of ``bits`` bits up, the sign of their sum in 1 bit down (arXiv 2411.16462, section 2).

    ``level = clip(round(gain*K*c/s), -K, K)`` with K = 2^(bits-1) - 1; gain is 1/2 for "l1" and "l2", 1 for "linf".
    Where the sum is zero, its parity bit decides.

    Args:
        bits: 2, 4 or 8.
        norm: s is the mean ("l1"), root mean square ("l2") or maximum ("linf") of |c|.
        stochastic: round up or down at random, with the fraction as probability, from a generator that is a function
            of (seed, worker, step, parameter, element).
        block: elements that share s, a power of two; those of a whole parameter unless given.
        seed: of the random numbers, the same on all workers.
        share_scales_every: steps between averages of s over workers, 4 bytes per block; the mean is kept in
            ``state[p]["scale"]`` and used from the next step on, so that a level means as much on every worker. Unless
            given, every worker has its own s.
    """

    bits: int = 2
    norm: str = "l1"
    stochastic: bool = False
    block: int | None = None
    seed: int = 0
    share_scales_every: int | None = None

    def __post_init__(self) -> None:
        check_flag("stochastic", self.stochastic)
        for name in ("bits", "block", "seed"):
            value = getattr(self, name)
            if (name, value) != ("block", None) and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
        check_format(self.bits, self.norm, self.block)
        if self.share_scales_every is not None:
            check_count("share_scales_every", self.share_scales_every, "None or a number of steps")

    @property
    def form(self) -> CodeFormat:
        """See `Compression.form`."""
        return CodeFormat(self.bits, "majority")

    @property
    def has_one_scale(self) -> bool:
        """See `Compression.has_one_scale`."""
        return self.block is None


# as good as the sum of c itself, where bytes are few
_FINE = Quantized(bits=8, norm="linf", share_scales_every=8)


@dataclass(frozen=True, kw_only=True)
class BySize:
    """Small tensors, which cost next to nothing, by one compression, and all others by another.

    Norms, biases and a small output layer lose most by signs, and are few bytes in any compression: docs/compression.md
    has the figures.

    Args:
        small: of tensors of at most ``max_numel`` elements; unless given, the sign of the sum of 8-bit levels.
        large: of all others.
        max_numel: elements, at least 1.
    """

    small: Compression = _FINE
    large: Compression = SignVote()
    max_numel: int = 1024

    def __post_init__(self) -> None:
        for name in ("small", "large"):
            _check_single(name, getattr(self, name))
        check_count("max_numel", self.max_numel, "a number of elements")

    def of(self, numel: int) -> Compression:
        """Return the compression of a tensor of ``numel`` elements."""
        return self.small if numel <= self.max_numel else self.large


AnyCompression = Compression | BySize


# of 8-bit levels, the sums of so many workers' fit into 16 bits
_MOST_FINE_WORKERS = 258


def default_compression(workers: int) -> AnyCompression:
    """Return what `LionCub` takes unless given: `BySize` where fields hold its sums and anything is sent."""
    return BySize() if 1 < workers <= _MOST_FINE_WORKERS else SignVote()


def compression_of(compression: AnyCompression, numel: int) -> Compression:
    """Return the compression of a tensor of ``numel`` elements."""
    return compression.of(numel) if isinstance(compression, BySize) else compression


def parts_of(compression: AnyCompression) -> tuple[Compression, ...]:
    """Return all compressions that a tensor can have."""
    return (compression.small, compression.large) if isinstance(compression, BySize) else (compression,)


def check_compression(value: object) -> AnyCompression:
    """Return ``value``. Raises TypeError unless it is a `Compression` or a `BySize`."""
    if isinstance(value, BySize):
        return value
    return _check_single("compression", value, " or BySize()")


def _check_single(name: str, value: object, more: str = "") -> Compression:
    if isinstance(value, type) and issubclass(value, Compression | BySize):
        raise TypeError(f"{name}: expected an object such as {value.__name__}(), got the class itself")
    if not isinstance(value, Compression):
        known = f"SignVote(), SignMean(), TernaryVote(){',' if more else ' or'} Quantized(){more}"
        raise TypeError(f"{name}: expected {known}, got {type(value).__name__} {value!r}")
    return value
