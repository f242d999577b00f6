"""Codes of several bits: everyone's added up, the signs of their sums, and a step by them, against numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from samples import DTYPES, SIZES, assert_same_bits, poisoned, sample
from torch import Tensor

from lioncub.kernels import (
    add_codes,
    foreach_lion_apply_,
    foreach_lion_quantize,
    lion_apply_,
    lion_ema,
    lion_quantize,
    pack_signs,
    packed_bytes,
    ternary_of_fields,
)
from lioncub.kernels.layout import FIELD_BITS

ALL_IMPLS = ("reference", "cpu", "triton")
WIDTHS = [(bits, wide) for bits in FIELD_BITS for wide in FIELD_BITS if wide >= bits]
# every dtype with the codes of ternary votes, every width with fp32
APPLIED = [(2, dtype, dtype) for dtype in DTYPES] + [(bits, torch.float32, torch.float32) for bits in (1, 4, 8, 16)]
APPLIED += [(2, torch.bfloat16, torch.float32), (16, torch.float16, torch.float32)]
# of an update, below which "linf" levels of this scale are not 1 or -1
SMALLEST = 2.0**-126

each_impl = pytest.mark.parametrize("impl", ALL_IMPLS)
each_width = pytest.mark.parametrize("bits", FIELD_BITS)


def _pack(numbers: np.ndarray, bits: int) -> Tensor:
    """Whole numbers in fields of ``bits`` bits, bit by bit."""
    places = (numbers.reshape(-1, 1) >> np.arange(bits)) & 1
    return torch.from_numpy(np.packbits(places.astype(np.uint8).reshape(-1), bitorder="little"))


def _codes_for(numbers: np.ndarray, bits: int) -> Tensor:
    """The codes of a tensor of len(numbers) elements, with pads that must not matter."""
    around = np.full(8 * packed_bytes(len(numbers)), 2**bits - 1)
    around[: len(numbers)] = numbers
    return _pack(around, bits)


def _rows(workers: int, n: int, bits: int, wide: int) -> np.ndarray:
    """Codes whose sums fit their fields, and fill some of them."""
    draw, room = np.random.default_rng(workers), np.full(n, 2**wide - 1)
    rows = np.minimum(draw.integers(0, 2**bits + 1, (workers, n)), 2**bits - 1)
    rows[:, ::3] = 2**bits - 1
    for row in rows:
        row[:] = np.minimum(row, room)
        room -= row
    return rows


def _rounded(value: float) -> np.float32:
    return np.float32(value)


@each_impl
@pytest.mark.parametrize(("bits", "wide"), WIDTHS)
def test_add_codes(impl: str, bits: int, wide: int) -> None:
    for n_bytes, workers, first in ((0, 2, 0), (8, 3, 1), (8, 1, 0), (72, 5, 3), (2056, 2, 4)):
        codes = _rows(workers, n_bytes * 8 // bits, bits, wide)
        # bytes between the rows that are no codes
        memory = poisoned(workers * (n_bytes + first + 4)).reshape(workers, -1)
        packed = memory[:, first : first + n_bytes]
        packed.copy_(torch.stack([_pack(row, bits) for row in codes]))
        size = n_bytes * wide // bits
        around = poisoned(first + size + 3)
        out = around[first : first + size]
        assert add_codes(packed, bits=bits, field_bits=wide, out=out, impl=impl) is out
        assert_same_bits(out.clone(), _pack(codes.sum(axis=0), wide), f"{n_bytes} bytes of {workers}")
        assert (around[:first] == 0x5B).all()
        assert (around[first + size :] == 0x5B).all()
    codes = _rows(2, 64 // bits, bits, wide)
    packed = torch.stack([_pack(row, bits) for row in codes])
    assert_same_bits(add_codes(packed, bits=bits, field_bits=wide, impl=impl), _pack(codes.sum(axis=0), wide))


@each_impl
def test_many_rows_and_the_same_row_again(impl: str) -> None:
    codes = np.random.default_rng(0).integers(0, 16, (70, 144))
    packed = torch.stack([_pack(row, 4) for row in codes])
    assert_same_bits(add_codes(packed, bits=4, field_bits=16, impl=impl), _pack(codes.sum(axis=0), 16))
    again = packed[:1].expand(17, -1)
    assert_same_bits(add_codes(again, bits=4, field_bits=8, impl=impl), _pack(17 * codes[0], 8))


@each_impl
@each_width
def test_ternary_of_fields(impl: str, bits: int) -> None:
    most = 2**bits - 1
    rules = ((0, 1, 0), (3, 1, most // 2), (0, 2, most), (1, 3, 3 * most), (0, 1, 2**31 - 1 - most))
    for n in (0, 32, 64, 96, 1056, 16416):
        numbers = np.random.default_rng(n).integers(0, most + 1, n)
        numbers[: n // 4 : 3], numbers[1 : n // 4 : 3] = most, most // 2
        for first, step, offset in rules if n == 96 else rules[1:3]:
            fields = torch.cat([poisoned(first), _pack(numbers, bits)])[first:]
            sums = step * numbers - offset
            largest = most // 2
            around, counts = poisoned(first + n // 4 + 3), torch.tensor([5, 7])
            out = around[first : first + n // 4]
            options: dict[str, Any] = {"field_bits": bits, "step": step, "offset": offset, "largest": largest}
            assert ternary_of_fields(fields, **options, out=out, counts=counts, impl=impl) is out
            assert_same_bits(out.clone(), _pack(1 + np.sign(sums), 2), f"n={n} {step}*field - {offset}")
            ends = (numbers == 0) | (numbers == largest)
            assert counts.tolist() == [5 + (sums == 0).sum(), 7 + ends.sum()]
            assert (around[:first] == 0x5B).all()
            assert (around[first + n // 4 :] == 0x5B).all()
    fields = _pack(np.arange(32) % 2 * most, bits)
    signs = ternary_of_fields(fields, field_bits=bits, step=2, offset=most, largest=most, impl=impl)
    assert_same_bits(signs, _pack(np.arange(32) % 2 * 2, 2))


@each_impl
def test_fields_of_a_sum_with_an_odd_number_of_signs(impl: str) -> None:
    """The majority with ties from added bits: 2*ones - workers is never zero for an odd number of workers."""
    rows = np.random.default_rng(1).integers(0, 2, (3, 64))
    total = add_codes(torch.stack([_pack(row, 1) for row in rows]), bits=1, field_bits=2, impl=impl)
    counts = torch.zeros(2, dtype=torch.int64)
    voted = ternary_of_fields(total, field_bits=2, step=2, offset=3, largest=3, counts=counts, impl=impl)
    ones = rows.sum(axis=0)
    assert_same_bits(voted, _pack(np.where(ones >= 2, 2, 0), 2))
    assert counts.tolist() == [0, ((ones == 0) | (ones == 3)).sum()]


@each_impl
@pytest.mark.parametrize(("bits", "dtype", "momentum"), APPLIED, ids=str)
def test_apply_codes(impl: str, bits: int, dtype: torch.dtype, momentum: torch.dtype) -> None:
    most = 2**bits - 1
    for n in SIZES:
        p, g, m = sample(n, dtype, seed=n), sample(n, dtype, seed=n + 1), sample(n, momentum, seed=n + 2)
        numbers = np.random.default_rng(n).integers(0, most + 1, n)
        packed = _codes_for(numbers, bits)
        with np.errstate(all="ignore"):
            moves = (2 * numbers - most).astype(np.float32) * _rounded(0.01 / 3)
            stepped = torch.from_numpy(p.float().numpy() * _rounded(1 - 0.01 * 0.1) - moves)
            kept, new = _rounded(0.99), _rounded(float(_rounded(1 - 0.99)) * -0.3)
            averaged = torch.from_numpy(kept * m.float().numpy() + new * g.float().numpy())
        options: dict[str, Any] = {"bits": bits, "step": 2, "offset": most, "divisor": 3, "lr": 0.01, "impl": impl}
        before = packed.clone()
        if n in (9, 64, 1009):
            x = p.clone()
            lion_apply_(x, packed, weight_decay=0.1, **options)
            assert_same_bits(x, stepped.to(dtype), f"param n={n}")
        x, mine = p.clone(), m.clone()
        advance = {"grad": g, "exp_avg": mine, "beta2": 0.99, "grad_scale": -0.3}
        lion_apply_(x, packed, weight_decay=0.1, **options, **advance)
        assert_same_bits(x, stepped.to(dtype), f"param n={n}, with momentum")
        assert_same_bits(mine, averaged.to(momentum), f"exp_avg n={n}")
        assert_same_bits(mine, lion_ema(m, g, beta=0.99, grad_scale=-0.3).to(momentum), f"lion_ema n={n}")
        assert_same_bits(packed, before, "packed was changed")


@each_impl
def test_ternary_votes_without_zeros_are_sign_votes(impl: str) -> None:
    for dtype in DTYPES:
        for n, weight_decay in ((1, 0.1), (65, 0.0), (1009, 0.1), (16411, 0.1)):
            p, g, m = (sample(n, dtype, seed=n + i) for i in range(3))
            up = np.random.default_rng(n).integers(0, 2, n)
            signs = pack_signs(torch.from_numpy(2 * up - 1).float(), impl="reference")
            results = []
            for packed, form in ((signs, {}), (_codes_for(2 * up, 2), {"bits": 2, "step": 1, "offset": 1})):
                x, mine = p.clone(), m.clone()
                advance = {"grad": g, "exp_avg": mine, "beta2": 0.99}
                lion_apply_(x, packed, lr=0.01, weight_decay=weight_decay, impl=impl, **form, **advance)
                results.append((x, mine))
            assert_same_bits(results[1][0], results[0][0], f"param n={n}")
            assert_same_bits(results[1][1], results[0][1], f"exp_avg n={n}")


@each_impl
def test_a_code_of_zero_only_decays(impl: str) -> None:
    p = torch.tensor([4.0, -4.0, 0.0, -0.0])
    options: dict[str, Any] = {"bits": 2, "step": 1, "offset": 1, "lr": 0.5, "impl": impl}
    lion_apply_(p, _codes_for(np.array([1, 1, 1, 1]), 2), weight_decay=0.5, **options)
    assert_same_bits(p, torch.tensor([3.0, -3.0, 0.0, -0.0]))
    lion_apply_(p, _codes_for(np.array([0, 2, 2, 0]), 2), weight_decay=0.0, **options)
    assert p.tolist() == [3.5, -3.5, -0.5, 0.5]


@each_impl
def test_lists_and_storage_order(impl: str) -> None:
    shapes = [(0,), (5, 13), (130,), (1,)]
    p, g, m = ([torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for shape in shapes] for i in range(3))
    packed = [_codes_for(np.random.default_rng(i).integers(0, 16, t.numel()), 4) for i, t in enumerate(p)]
    options: dict[str, Any] = {"bits": 4, "step": 1, "offset": 7, "divisor": 7, "lr": 0.1, "weight_decay": 0.1}
    options |= {"beta2": 0.9, "impl": impl}
    turned = [[t.clone().t() if t.dim() == 2 else t.clone() for t in tensors] for tensors in (p, g, m)]
    for x, codes, grad, exp_avg in zip(turned[0], packed, turned[1], turned[2], strict=True):
        lion_apply_(x, codes, grad=grad, exp_avg=exp_avg, **options)
    flat = [[t.view(-1) for t in tensors] for tensors in (p, g, m)]
    foreach_lion_apply_(flat[0], packed, grad=flat[1], exp_avg=flat[2], **options)
    for i, shape in enumerate(shapes):
        for j in (0, 2):
            found = turned[j][i].t() if len(shape) == 2 else turned[j][i]
            assert_same_bits(found, (p, g, m)[j][i], f"tensor {i}")


def test_threads_give_the_same_bytes() -> None:
    before = torch.get_num_threads()
    rows = torch.randint(0, 256, (3, 300_000), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    start, codes = torch.randn(600_001, generator=torch.Generator().manual_seed(1)), rows.reshape(-1)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            counts, x = torch.zeros(2, dtype=torch.int64), start.clone()
            total = add_codes(rows, bits=1, field_bits=2, impl="cpu")
            voted = ternary_of_fields(total, field_bits=2, step=2, offset=3, largest=3, counts=counts, impl="cpu")
            used = codes[: 2 * packed_bytes(x.numel())]
            lion_apply_(x, used, bits=2, step=1, offset=1, lr=0.1, weight_decay=0.1, impl="cpu")
            results.append((total, voted, counts, x))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        for one, other in zip(found, results[0], strict=True):
            assert_same_bits(one, other)


def _updates(dtype: torch.dtype) -> Tensor:
    """Every kind of float: ends of the normal and the subnormal range, infinities, NaN, zeros, and random bits."""
    edges = [2.0**-126, 2.0**-126 * (1 + 2.0**-7), 2.0**-149, 2.0**-133, 2.0**-127, 2.0**-24, 1.0, 6e4]
    special = torch.tensor([sign * edge for edge in edges for sign in (1, -1)])
    special = torch.cat([special, torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])])
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    size = torch.iinfo(kind)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(size.min, size.max + 1, (2000,), generator=generator).to(kind).view(dtype)
    small = torch.randint(-(2**24), 2**24, (500,), generator=generator).to(torch.float32) * 2.0**-149
    return torch.cat([special.to(dtype), drawn, small.to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("beta1", "grad_scale"), [(1.0, 1.0), (0.0, -1.0), (0.5, 0.5), (0.9, 0.3)])
def test_a_tiny_scale_makes_signs(dtype: torch.dtype, beta1: float, grad_scale: float) -> None:
    values = _updates(dtype)
    m, g = values, values.flip(0) if beta1 else values
    n, scale = values.numel(), torch.full((1,), SMALLEST)
    kept, new = _rounded(beta1), _rounded(float(_rounded(1 - beta1)) * grad_scale)
    with np.errstate(all="ignore"):
        update = kept * m.float().numpy() + new * g.float().numpy()
        large = np.abs(update) >= SMALLEST
        sign = np.where(np.isnan(update), 0, np.sign(update))
    found = {}
    for impl in ALL_IMPLS:
        status = torch.zeros(1, dtype=torch.int32)
        options: dict[str, Any] = {"beta1": beta1, "bits": 2, "norm": "linf", "scale": scale, "nonfinite": status}
        codes, used = lion_quantize(m, g, **options, grad_scale=grad_scale, impl=impl)
        assert used is scale
        found[impl] = np.unpackbits(codes.numpy(), bitorder="little").reshape(-1, 2) @ np.array([1, 2])
        assert not found[impl][n:].any()
        certain = large | np.isnan(update) | (update == 0)
        np.testing.assert_array_equal(found[impl][:n][certain], 1 + sign[certain], impl)
        assert bool(status) == (not np.isfinite(update).all())
    for impl in ALL_IMPLS[1:]:
        np.testing.assert_array_equal(found[impl], found["reference"], impl)


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("block", [None, 8, 1024, 32768])
@pytest.mark.parametrize(("bits", "norm"), [(2, "l1"), (4, "linf"), (8, "l2")])
def test_quantization_of_lists(impl: str, block: int | None, bits: int, norm: str) -> None:
    """Mixed sizes and dtypes at once are what each is alone, for the reference; codes for the same scale bit by bit."""
    sizes = (0, 1, 63, 65, 1009, 16384, 40000)
    m = [sample(n, (torch.float32, torch.bfloat16)[i % 2], seed=n, finite=True) for i, n in enumerate(sizes)]
    g = [sample(n, DTYPES[i % 3], seed=n + 1, finite=True) for i, n in enumerate(sizes)]
    g[3][5], g[5][-1] = float("nan"), float("inf")
    how = {"bits": bits, "norm": norm, "block": block, "beta1": 0.9, "seed": 5, "worker": 1, "step": 3}
    for stochastic in (False, True):
        numbers = [2**32 - 1 - i for i in range(len(sizes))]
        status, out = torch.zeros(len(sizes), dtype=torch.int32), [poisoned(packed_bytes(n, bits)) for n in sizes]
        scales = foreach_lion_quantize(
            m, g, stochastic=stochastic, param_ids=numbers, out=out, nonfinite=status, impl=impl, **how
        )
        assert status.nonzero().flatten().tolist() == [3, 5]
        for i, number in enumerate(numbers):
            alone = {**how, "stochastic": stochastic, "param_id": number, "impl": "reference"}
            expected, _ = lion_quantize(m[i], g[i], scale=scales[i], **alone)
            assert_same_bits(out[i], expected, f"codes of {sizes[i]}")
            _, scale = lion_quantize(m[i], g[i], **alone)
            torch.testing.assert_close(scales[i], scale, rtol=1e-6, atol=0, equal_nan=True)


@each_impl
@pytest.mark.parametrize("grad_scale", [1.0, -1.0, 0.25])
def test_grad_scale_of_lion_quantize(impl: str, grad_scale: float) -> None:
    """Exact for powers of two: the same as a gradient multiplied beforehand."""
    m, g = (sample(1009, torch.float32, seed=i, finite=True) for i in range(2))
    for norm in ("l1", "linf"):
        options: dict[str, Any] = {"beta1": 0.9, "bits": 4, "norm": norm, "block": 64, "impl": impl}
        packed, scale = lion_quantize(m, g, grad_scale=grad_scale, **options)
        expected, expected_scale = lion_quantize(m, g * grad_scale, **options)
        assert_same_bits(packed, expected, norm)
        assert_same_bits(scale, expected_scale, norm)
