"""majority_vote in Numba on rows at any address and distance, for every number of rows left over from eights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from lioncub.kernels import numba_cpu, reference


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64, 70, 130])
@pytest.mark.parametrize("offset", [0, 1, 3, 7])
@pytest.mark.parametrize("n_bytes", [1, 7, 8, 13, 512, 517, 1100])
def test_unaligned_rows_equal_the_reference(workers: int, offset: int, n_bytes: int) -> None:
    generator = torch.Generator().manual_seed(workers)
    memory = torch.randint(0, 256, (workers, n_bytes + offset + 5), dtype=torch.uint8, generator=generator)
    # columns on which all agree and columns that are tied where the number is even
    memory[:, ::3] = memory[0, ::3].clone()
    memory[::2, 1::3], memory[1::2, 1::3] = 0xFF, 0x00
    packed = memory[:, offset : offset + n_bytes]
    assert packed.data_ptr() % 8 == offset
    for parity in (0, 1):
        results = []
        for impl in (numba_cpu, reference):
            around = torch.full((n_bytes + 9,), 0xA5, dtype=torch.uint8)
            counts = torch.tensor([100, 200])
            impl.majority_vote(packed, parity, around[offset : offset + n_bytes], counts)
            results.append((around, counts))
        (actual, counted), (expected, expected_counts) = results
        # what lies before and behind out is compared too
        assert torch.equal(actual, expected)
        assert counted.tolist() == expected_counts.tolist()
