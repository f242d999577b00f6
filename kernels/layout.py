"""Wire layout of packed codes: how many bytes n codes take and where parameters start.

Codes of b bits (1, 2, 4 or 8) are little-endian: code i stands in byte i*b//8, from bit (i*b) % 8 up. Messages
are padded with zero codes to 8 bytes per chunk, so that whole 64-bit words travel and are voted on.
Pure arithmetic, shared by kernels, collectives, cost model and tests.
"""

from __future__ import annotations

CODE_BITS = (1, 2, 4, 8)
WORD_BYTES = 8
WORD_SIGNS = 64


def packed_bytes(n: int, bits: int = 1, chunks: int = 1) -> int:
    """Bytes of ``n`` codes of ``bits`` bits, cut into ``chunks`` equal chunks of a multiple of 8 bytes.

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


def largest_level(bits: int) -> int:
    """K, the largest level of a signed ``bits``-bit code: levels are -K..K, stored as level + K."""
    return (1 << (bits - 1)) - 1
