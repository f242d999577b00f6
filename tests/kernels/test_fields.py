"""Fields and their sums: spread codes add up field by field, come out as integers, and are voted on packed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from samples import assert_same_bits, poisoned
from torch import Tensor

from lioncub.kernels import field_bits, majority_of_fields, majority_vote, spread_codes
from lioncub.kernels.layout import CODE_BITS, FIELD_BITS

ALL_IMPLS = ("reference", "cpu", "triton")
VOTERS = (1, 2, 3, 4, 7, 16, 33)
WIDTHS = [(bits, wide) for bits in CODE_BITS for wide in FIELD_BITS if wide >= bits]

each_impl = pytest.mark.parametrize("impl", ALL_IMPLS)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _numbers(packed: Tensor, bits: int) -> np.ndarray:
    """The fields of ``bits`` bits as int64, taken apart bit by bit."""
    places = np.unpackbits(packed.contiguous().numpy(), bitorder="little").reshape(-1, bits).astype(np.int64)
    return (places << np.arange(bits)).sum(axis=1)


def _add(total: Tensor, fields: Tensor, bits: int) -> None:
    """What a native sum does: bytes, or 32-bit words for fields of 16 bits."""
    if bits == 16:
        total.view(torch.int32).add_(fields.view(torch.int32))
    else:
        total.add_(fields)


def _spread_sum(rows: Tensor, bits: int, wide: int, impl: str) -> Tensor:
    total = torch.zeros(rows.shape[1] * wide // bits, dtype=torch.uint8)
    for row in rows:
        _add(total, spread_codes(row, bits=bits, field_bits=wide, impl=impl), wide)
    return total


def _unaligned(packed: Tensor, first: int) -> Tensor:
    moved = torch.empty(packed.numel() + first, dtype=torch.uint8)[first:]
    return moved.copy_(packed)


@pytest.mark.parametrize(
    ("largest_code", "workers", "expected"),
    [
        *(
            (1, 1, 1),
            (1, 2, 2),
            (1, 3, 2),
            (1, 4, 4),
            (1, 15, 4),
            (1, 16, 8),
            (1, 255, 8),
            (1, 256, 16),
            (1, 65535, 16),
        ),
        *(
            (2, 1, 2),
            (2, 2, 4),
            (2, 7, 4),
            (2, 8, 8),
            (14, 1, 4),
            (14, 2, 8),
            (14, 18, 8),
            (14, 19, 16),
            (254, 258, 16),
        ),
    ],
)
def test_the_narrowest_field_is_taken(largest_code: int, workers: int, expected: int) -> None:
    assert field_bits(largest_code, workers) == expected
    for explicit in FIELD_BITS:
        if explicit >= expected:
            assert field_bits(largest_code, workers, explicit) == explicit
        else:
            with pytest.raises(ValueError, match=f"field_bits: expected at least {expected} for .*, got {explicit}$"):
                field_bits(largest_code, workers, explicit)


@each_impl
@pytest.mark.parametrize(("bits", "wide"), WIDTHS)
def test_spread_codes_keeps_every_code(impl: str, bits: int, wide: int) -> None:
    for n_bytes, first in ((0, 0), (8, 0), (8, 3), (64, 1), (72, 2), (1032, 4), (9000, 0)):
        packed = _random(n_bytes + first, seed=bits)[first:]
        size = n_bytes * wide // bits
        around = poisoned(size + first + 3)
        out = around[first : first + size]
        assert spread_codes(packed, bits=bits, field_bits=wide, out=out, impl=impl) is out
        np.testing.assert_array_equal(_numbers(out, wide), _numbers(packed, bits))
        assert (around[:first] == 0x5B).all()
        assert (around[first + size :] == 0x5B).all()
        assert_same_bits(spread_codes(packed, bits=bits, field_bits=wide, impl=impl), out.clone())


@each_impl
@pytest.mark.parametrize("voters", VOTERS)
def test_sums_of_signs(impl: str, voters: int) -> None:
    rows = _random(voters, 72, seed=voters)
    rows[:, ::3] = rows[0, ::3].clone()
    rows[::2, 1::3], rows[1::2, 1::3] = 0xFF, 0x00
    ones = sum(_numbers(row, 1) for row in rows)
    for wide in FIELD_BITS:
        if voters >= 2**wide:
            continue
        total = _spread_sum(rows, 1, wide, impl)
        np.testing.assert_array_equal(_numbers(total, wide), ones)
        for parity in (0, 1):
            counts, expected_counts = torch.tensor([[3, 4], [3, 4]])
            voted = majority_of_fields(total, field_bits=wide, voters=voters, parity=parity, counts=counts, impl=impl)
            assert_same_bits(voted, majority_vote(rows, parity=parity, counts=expected_counts, impl="reference"))
            assert counts.tolist() == expected_counts.tolist()


@each_impl
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("workers", VOTERS)
def test_sums_of_levels(impl: str, bits: int, workers: int) -> None:
    level = 2 ** (bits - 1) - 1
    # codes 0 to 2K, K more often than not at an end, so that sums reach the ends of their fields
    generator = torch.Generator().manual_seed(workers)
    codes = torch.randint(-1, 2 * level + 2, (workers, 256), generator=generator).clamp(0, 2 * level)
    codes[:, :8], codes[:, 8:16] = 2 * level, 0
    shifts = torch.arange(0, 8, bits)
    rows = (codes.reshape(workers, -1, 8 // bits) << shifts).sum(dim=2).to(torch.uint8)
    wide = field_bits(2 * level, workers)
    total = _spread_sum(rows, bits, wide, impl)
    np.testing.assert_array_equal(_numbers(total, wide), codes.sum(dim=0).numpy())


@each_impl
@pytest.mark.parametrize("wide", FIELD_BITS)
def test_majority_of_fields_of_any_content_and_place(impl: str, wide: int) -> None:
    for n_bytes, first in ((0, 0), (1, 0), (3, 1), (7, 0), (8, 2), (33, 3), (64, 0), (519, 0), (1100, 1)):
        fields = _unaligned(_random(n_bytes * wide, seed=wide), first)
        numbers = _numbers(fields, wide)
        for voters in {1, 2 ** (wide - 1), 2**wide - 1, max(2**wide - 2, 1)}:
            counts, around = torch.zeros(2, dtype=torch.int64), poisoned(n_bytes + first + 2)
            out = around[first : first + n_bytes]
            majority_of_fields(fields, field_bits=wide, voters=voters, parity=1, out=out, counts=counts, impl=impl)
            tied = 2 * numbers == voters
            won = np.where(tied, (np.arange(8 * n_bytes) + 1) & 1, 2 * numbers > voters)
            assert_same_bits(out, torch.from_numpy(np.packbits(won.astype(np.uint8), bitorder="little")))
            assert counts.tolist() == [tied.sum(), ((numbers == 0) | (numbers == voters)).sum()]
            assert (around[:first] == 0x5B).all()
            assert (around[first + n_bytes :] == 0x5B).all()


def test_threads_give_the_same_bytes() -> None:
    before, packed = torch.get_num_threads(), _random(600_000)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            fields, counts = spread_codes(packed, bits=1, field_bits=4, impl="cpu"), torch.zeros(2, dtype=torch.int64)
            voted = majority_of_fields(fields, field_bits=4, voters=2, counts=counts, impl="cpu")
            results.append((fields, voted, counts))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert_same_bits(one, other)
    np.testing.assert_array_equal(_numbers(results[0][0], 4), _numbers(packed, 1))


def test_the_reference_needs_neither_triton_nor_numba() -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['numba'] = None\n"
        "import torch; from lioncub import kernels as k\n"
        "rows = torch.full((3, 8), 0xF0, dtype=torch.uint8)\n"
        "planes = k.count_votes(rows, impl='reference')\n"
        "fields = sum(k.spread_codes(row, bits=1, field_bits=2, impl='reference') for row in rows)\n"
        "assert k.majority_of_counts(planes[None], voters=3, impl='reference').tolist() == [0xF0] * 8\n"
        "assert k.majority_of_fields(fields, field_bits=2, voters=3, impl='reference').tolist() == [0xF0] * 8\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
