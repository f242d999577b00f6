"""Wire layout of packed codes: how many bytes n codes take and where parameters start.

Codes of b bits (1, 2, 4 or 8) are little-endian: code i stands in byte i*b//8, from bit (i*b) % 8 up. Messages
are padded with zero codes to 8 bytes per chunk, so that whole 64-bit words travel and are voted on. Fields that a
native sum adds up are laid out alike; those of 16 bits are little-endian pairs of bytes.
Pure arithmetic, shared by kernels, collectives, cost model and tests.
"""

from __future__ import annotations

import functools

CODE_BITS = (1, 2, 4, 8)
FIELD_BITS = (1, 2, 4, 8, 16)
WORD_BYTES = 8
WORD_SIGNS = 64


def packed_bytes(n: int, bits: int = 1, chunks: int = 1) -> int:
    """Return bytes of ``n`` codes of ``bits`` bits, cut into ``chunks`` equal chunks of a multiple of 8 bytes.

    Raises ValueError for n < 0, chunks < 1 or bits not in {1, 2, 4, 8}.
    """
    if n < 0:
        raise ValueError(f"n: expected a count >= 0, got {n}")
    if chunks < 1:
        raise ValueError(f"chunks: expected a count >= 1, got {chunks}")
    if bits not in CODE_BITS:
        raise ValueError(f"bits: expected one of {CODE_BITS}, got {bits}")
    words = -(-n * bits // (8 * WORD_BYTES))
    return -(-words // chunks) * chunks * WORD_BYTES


@functools.lru_cache(maxsize=256)
def code_bytes(sizes: tuple[int, ...], bits: int = 1, multiple: int = 1) -> tuple[int, ...]:
    """Return a ``multiple`` of `packed_bytes` for each of a list of tensors."""
    return tuple([multiple * packed_bytes(size, bits) for size in sizes])


def largest_level(bits: int) -> int:
    """K, the largest level of a signed ``bits``-bit code: levels are -K..K, stored as level + K."""
    return (1 << (bits - 1)) - 1


def counter_planes(n: int) -> int:
    """Bit planes of a count 0..n: ceil(log2(n + 1)). Raises ValueError for n < 0."""
    if n < 0:
        raise ValueError(f"n: expected a count >= 0, got {n}")
    return n.bit_length()


def field_bits(largest_code: int, workers: int, explicit: int | None = None) -> int:
    """Return the narrowest field of `FIELD_BITS` for the sum of ``workers`` codes of 0..largest_code (rule 9).

    Codes of levels -K..K have largest_code ``2*K``, one-bit codes 1. Raises ValueError where no field is wide enough,
    and where ``explicit`` is not in `FIELD_BITS` or is too narrow; an explicit field that is wide enough is returned.
    """
    if largest_code < 0:
        raise ValueError(f"largest_code: expected a number >= 0, got {largest_code}")
    if workers < 1:
        raise ValueError(f"workers: expected a count >= 1, got {workers}")
    if explicit is not None and explicit not in FIELD_BITS:
        raise ValueError(f"field_bits: expected one of {FIELD_BITS}, got {explicit}")
    total = largest_code * workers
    wide_enough = [bits for bits in FIELD_BITS if total < 2**bits]
    if not wide_enough:
        raise ValueError(
            f"field_bits: no field is wide enough: expected a sum below 2^{FIELD_BITS[-1]}, "
            f"got {workers} workers of codes up to {largest_code}, {total} in all"
        )
    if explicit is None:
        return wide_enough[0]
    if explicit < wide_enough[0]:
        raise ValueError(
            f"field_bits: expected at least {wide_enough[0]} for {workers} workers of codes up to {largest_code}, "
            f"{total} in all, got {explicit}"
        )
    return explicit
