"""count_votes and majority_of_counts: whatever the groups, strides and sizes, the majority of all voters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same_bits, poisoned
from torch import Tensor

from lioncub.kernels import count_votes, counter_planes, majority_of_counts, majority_vote

ALL_IMPLS = ("reference", "cpu", "triton")
VOTERS = (1, 2, 3, 5, 8, 9, 17, 64, 100)
# bytes: words, parts of words, several blocks
SIZES = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1009, 4608)

each_impl = pytest.mark.parametrize("impl", ALL_IMPLS)


def _rows(voters: int, n_bytes: int, first: int = 0) -> Tensor:
    """uint8[voters, n_bytes], rows apart, at any address; some columns are unanimous, and some tied."""
    generator = torch.Generator().manual_seed(voters + 1000 * n_bytes)
    memory = torch.randint(0, 256, (voters, n_bytes + first + 4), dtype=torch.uint8, generator=generator)
    memory[:, ::3] = memory[0, ::3].clone()
    memory[::2, 1::3], memory[1::2, 1::3] = 0xFF, 0x00
    return memory[:, first : first + n_bytes]


def _ones(packed: Tensor) -> np.ndarray:
    """Number of ones of each code of uint8[N, B]: int[8*B]."""
    return np.unpackbits(packed.numpy(), axis=1, bitorder="little").sum(axis=0, dtype=np.int64)


def _number(planes: Tensor) -> np.ndarray:
    """The numbers whose bits uint8[P, B] holds: int[8*B]."""
    bits = np.unpackbits(planes.contiguous().numpy(), axis=1, bitorder="little").astype(np.int64)
    return sum(plane << k for k, plane in enumerate(bits))


def _planes(parts: list[Tensor], impl: str) -> Tensor:
    """Each group's counts, in as many planes as the largest needs, at strides of their own."""
    most = counter_planes(max(len(part) for part in parts))
    n_bytes = parts[0].shape[1]
    planes = torch.zeros(most, len(parts), n_bytes + 5, dtype=torch.uint8).transpose(0, 1)[..., 1 : n_bytes + 1]
    for group, part in zip(planes, parts, strict=True):
        count_votes(part, out=group[: counter_planes(len(part))], impl=impl)
    return planes


def test_planes_of_a_count() -> None:
    assert [counter_planes(n) for n in (0, 1, 2, 3, 4, 7, 8, 2**20)] == [0, 1, 2, 2, 3, 3, 4, 21]
    with pytest.raises(ValueError, match="n: expected a count >= 0, got -1"):
        counter_planes(-1)


@each_impl
@pytest.mark.parametrize("voters", VOTERS)
def test_planes_hold_the_number_of_ones(impl: str, voters: int) -> None:
    for n_bytes, first in ((1, 0), (9, 3), (64, 0), (65, 1), (517, 4)):
        packed = _rows(voters, n_bytes, first)
        planes = counter_planes(voters)
        around = torch.stack([poisoned(n_bytes + first + 3)] * planes)
        out = around[:, first : first + n_bytes]
        assert count_votes(packed, out=out, impl=impl) is out
        np.testing.assert_array_equal(_number(out), _ones(packed))
        out.fill_(0x5B)
        assert (around == 0x5B).all(), "something was written around out"
        assert_same_bits(count_votes(packed, impl=impl), count_votes(packed, impl="reference"))


@each_impl
@pytest.mark.parametrize("n_bytes", SIZES)
def test_every_size(impl: str, n_bytes: int) -> None:
    packed = _rows(7, n_bytes)
    planes = count_votes(packed, impl=impl)
    assert planes.shape == (3, n_bytes)
    np.testing.assert_array_equal(_number(planes), _ones(packed))
    counts, expected_counts = torch.tensor([[5, 6], [5, 6]])
    groups = torch.stack([planes, count_votes(_rows(7, n_bytes, 1), impl=impl)])
    out = poisoned(n_bytes)
    assert majority_of_counts(groups, voters=14, parity=1, out=out, counts=counts, impl=impl) is out
    everyone = torch.cat([packed, _rows(7, n_bytes, 1)])
    expected = majority_vote(everyone, parity=1, counts=expected_counts, impl="reference")
    assert_same_bits(out, expected)
    assert counts.tolist() == expected_counts.tolist()


@each_impl
@pytest.mark.parametrize("voters", VOTERS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_partition_gives_the_majority_of_all(impl: str, voters: int, data: Any) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, voters - 1), max_size=6))) if voters > 1 else []
    n_bytes, first = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 7))
    parity = data.draw(st.integers(0, 3))
    packed = _rows(voters, n_bytes, first)
    parts = [packed[a:b] for a, b in zip([0, *cuts], [*cuts, voters], strict=True)]
    counts, expected_counts = torch.zeros(2, 2, dtype=torch.int64)
    out = poisoned(n_bytes + first + 2)[first : first + n_bytes]
    majority_of_counts(_planes(parts, impl), voters=voters, parity=parity, out=out, counts=counts, impl=impl)
    assert_same_bits(out, majority_vote(packed, parity=parity, counts=expected_counts, impl="reference"))
    assert counts.tolist() == expected_counts.tolist()


@each_impl
@pytest.mark.parametrize(("groups", "planes"), [(1, 1), (2, 3), (3, 4), (5, 2), (2, 5), (3, 7), (2, 21)])
def test_planes_of_any_content(impl: str, groups: int, planes: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    content = torch.randint(0, 256, (groups, planes, 70), dtype=torch.uint8, generator=generator)
    total = sum(_number(group) for group in content)
    for voters in {1, min(groups * (2**planes - 1), 2**20), min(groups * 2 ** (planes - 1), 2**20)}:
        counts = torch.zeros(2, dtype=torch.int64)
        voted = majority_of_counts(content, voters=voters, counts=counts, impl=impl)
        majority = np.where(2 * total == voters, np.arange(560) & 1, 2 * total > voters)
        assert_same_bits(voted, torch.from_numpy(np.packbits(majority.astype(np.uint8), bitorder="little")))
        assert counts.tolist() == [(2 * total == voters).sum(), ((total == 0) | (total == voters)).sum()]


def test_a_million_voters() -> None:
    everyone = 2**20
    number = torch.tensor([everyone // 2 - 1, everyone // 2, everyone // 2 + 1, everyone, 0, 1, 2, 3])
    bits = (number[None, :] >> torch.arange(21)[:, None]) & 1
    planes = torch.from_numpy(np.packbits(bits.numpy().astype(np.uint8), axis=1, bitorder="little"))
    for impl in ALL_IMPLS:
        counts = torch.zeros(2, dtype=torch.int64)
        for parity, expected in ((0, 0b1110), (1, 0b1100)):
            voted = majority_of_counts(planes[None], voters=everyone, parity=parity, counts=counts, impl=impl)
            assert voted.tolist() == [expected], impl
        assert counts.tolist() == [2, 4], impl


@pytest.mark.parametrize("impl", ["cpu"])
def test_threads_give_the_same_bytes(impl: str) -> None:
    before = torch.get_num_threads()
    packed = _rows(9, 40_003)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            planes, counts = count_votes(packed, impl=impl), torch.zeros(2, dtype=torch.int64)
            results.append((planes, majority_of_counts(planes[None], voters=9, counts=counts, impl=impl), counts))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert_same_bits(one, other)
    np.testing.assert_array_equal(_number(results[0][0]), _ones(packed))
