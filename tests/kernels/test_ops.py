"""Every op, implementation, dtype and size against the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from samples import DTYPES, SIZES, assert_same_bits, poisoned, sample
from torch import Tensor

from lioncub.kernels import (
    dequantize,
    lion_apply_,
    lion_encode,
    lion_encode_,
    lion_quantize,
    lion_step_,
    majority_vote,
    pack_signs,
    packed_bytes,
    quantize,
    unpack_signs,
)

IMPLS = ("cpu", "triton")
# tails of every kind, and more than one tile
FEW_SIZES = (0, 1, 9, 63, 65, 1009, 16411)
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]

each_impl = pytest.mark.parametrize("impl", IMPLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_size = pytest.mark.parametrize("n", SIZES)
each_pair = pytest.mark.parametrize(("dtype", "momentum"), PAIRS, ids=str)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@each_size
def test_pack_signs_is_packbits(impl: str, n: int) -> None:
    x = sample(n, torch.float32, seed=n).nan_to_num()
    x[x == 0] = -1
    bits = np.packbits(x.numpy() > 0, bitorder="little")
    expected = torch.zeros(packed_bytes(n), dtype=torch.uint8)
    expected[: len(bits)] = torch.from_numpy(bits)
    assert_same_bits(pack_signs(x, impl=impl), expected)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("parity", [0, 1, 6, 7])
def test_zero_and_nan_take_the_parity_bit(impl: str, parity: int) -> None:
    n = 200
    x = torch.tensor([0.0, -0.0, float("nan")]).repeat(67)[:n]
    expected = torch.from_numpy(np.packbits((np.arange(n) + parity) % 2 == 1, bitorder="little"))
    assert_same_bits(pack_signs(x, parity=parity, impl=impl)[: len(expected)], expected)


@each_impl
@each_dtype
@each_size
def test_pack_and_unpack(impl: str, dtype: torch.dtype, n: int) -> None:
    x = sample(n, dtype, seed=n)
    for parity in (0, 1):
        packed = pack_signs(x, parity=parity, impl=impl)
        assert_same_bits(packed, pack_signs(x, parity=parity, impl="reference"), f"parity {parity}")
        got = unpack_signs(packed, n, dtype=dtype, impl=impl)
        assert_same_bits(got, unpack_signs(packed, n, dtype=dtype, impl="reference"))
        decided = (x > 0) | (x < 0)
        assert torch.equal(got[decided], x[decided].sign())


@each_impl
@each_pair
@each_size
def test_lion_encode(impl: str, dtype: torch.dtype, momentum: torch.dtype, n: int) -> None:
    for finite in (True, False):
        m, g = sample(n, momentum, seed=n + 1, finite=finite), sample(n, dtype, seed=n + 2, finite=finite)
        before = m.clone(), g.clone()
        results = []
        for name in (impl, "reference"):
            out, status = poisoned(packed_bytes(n)), torch.zeros(1, dtype=torch.int32)
            returned = lion_encode(m, g, beta1=0.9, parity=n, out=out, nonfinite=status, impl=name)
            assert returned is out
            results.append((out, status))
        assert_same_bits(results[0][0], results[1][0])
        assert bool(results[0][1]) == bool(results[1][1]) == (not (0.9 * m.float() + g.float()).isfinite().all())
        assert_same_bits(m, before[0], "exp_avg was changed")
        assert_same_bits(g, before[1], "grad was changed")


@each_impl
@each_pair
@each_size
def test_lion_encode_that_advances(impl: str, dtype: torch.dtype, momentum: torch.dtype, n: int) -> None:
    m, g = sample(n, momentum, seed=n + 1), sample(n, dtype, seed=n + 2)
    results = []
    for name in (impl, "reference"):
        mine, status, out = m.clone(), torch.zeros(1, dtype=torch.int32), poisoned(packed_bytes(n))
        lion_encode_(mine, g, beta1=0.9, beta2=0.99, parity=1, out=out, nonfinite=status, impl=name)
        results.append((mine, out, status))
    assert_same_bits(results[0][0], results[1][0], "exp_avg")
    assert_same_bits(results[0][1], results[1][1], "packed")
    assert bool(results[0][2]) == bool(results[1][2])
    assert_same_bits(results[0][1], lion_encode(m, g, beta1=0.9, parity=1, impl=impl), "lion_encode")
    kept = ~(0.9 * m.float() + 0.1 * g.float()).isfinite()
    assert_same_bits(results[0][0][kept], m[kept], "elements that are not finite")


@each_impl
@each_pair
@each_size
def test_apply_votes(impl: str, dtype: torch.dtype, momentum: torch.dtype, n: int) -> None:
    p, g, m = sample(n, dtype, seed=n), sample(n, dtype, seed=n + 1), sample(n, momentum, seed=n + 2)
    packed = pack_signs(torch.randn(n, generator=torch.Generator().manual_seed(n)), impl="reference")
    for advance in (False, True):
        results = []
        for name in (impl, "reference"):
            x, mine = p.clone(), m.clone()
            more = {"grad": g, "exp_avg": mine, "beta2": 0.99} if advance else {}
            lion_apply_(x, packed, lr=0.01, weight_decay=0.1, impl=name, **more)
            results.append((x, mine))
        assert_same_bits(results[0][0], results[1][0], "param")
        assert_same_bits(results[0][1], results[1][1], "exp_avg")
        if not advance:
            assert_same_bits(results[0][1], m, "exp_avg was changed")


@each_impl
@each_pair
@each_size
def test_lion_step(impl: str, dtype: torch.dtype, momentum: torch.dtype, n: int) -> None:
    p, g, m = sample(n, dtype, seed=n), sample(n, dtype, seed=n + 1), sample(n, momentum, seed=n + 2)
    results = []
    for name in (impl, "reference"):
        x, mine = p.clone(), m.clone()
        lion_step_(x, g, mine, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, impl=name)
        results.append((x, mine))
    assert_same_bits(results[0][0], results[1][0], "param")
    assert_same_bits(results[0][1], results[1][1], "exp_avg")


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_lion_step_is_the_papers_algorithm(impl: str) -> None:
    """In exact arithmetic: all numbers are small dyadic fractions."""
    p, g, m = (
        torch.tensor([4.0, 4.0, 4.0, 0.0]),
        torch.tensor([2.0, -2.0, -2.0, 0.0]),
        torch.tensor([2.0, -6.0, 2.0, 0.0]),
    )
    lion_step_(p, g, m, lr=0.5, beta1=0.5, beta2=0.75, weight_decay=0.5, impl=impl)
    assert p.tolist() == [3.0 - 0.5, 3.0 + 0.5, 3.0, 0.0]
    assert m.tolist() == [2.0, -5.0, 1.0, 0.0]


@each_impl
@pytest.mark.parametrize("workers", [1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("n", FEW_SIZES)
def test_majority_vote(impl: str, workers: int, n: int) -> None:
    rows = torch.stack(
        [pack_signs(sample(n, torch.float32, seed=100 * w + n), parity=1, impl="reference") for w in range(workers)]
    )
    results = []
    for name in (impl, "reference"):
        out, counts = poisoned(packed_bytes(n)), torch.tensor([5, 7])
        majority_vote(rows, parity=1, out=out, counts=counts, impl=name)
        results.append((out, counts))
    assert_same_bits(results[0][0], results[1][0], "vote")
    assert torch.equal(results[0][1], results[1][1])
    without = majority_vote(rows, parity=1, impl=impl)
    assert_same_bits(without, results[1][0], "vote without counts")


# every width with every norm, and with every kind of block: one, one per word and more, one per row of 8
FORMS = [(2, "l1", None), (4, "l1", 64), (8, "l1", 8), (2, "l2", 256), (4, "l2", 8), (8, "l2", None)]
FORMS += [(2, "linf", 64), (4, "linf", None), (8, "linf", 256), (2, "linf", 8)]


@each_impl
@pytest.mark.parametrize(("bits", "norm", "block"), FORMS)
@each_dtype
def test_quantize(impl: str, dtype: torch.dtype, bits: int, norm: str, block: int | None) -> None:
    # a scale of more than one piece
    for n in (*FEW_SIZES, 70001) if block is None else FEW_SIZES:
        x = sample(n, dtype, seed=n, finite=True)
        options = {"bits": bits, "norm": norm, "block": block}
        packed, scale = quantize(x, impl="reference", **options)
        own_packed, own_scale = quantize(x, impl=impl, **options)
        assert_same_bits(own_packed, quantize(x, scale=own_scale, impl="reference", **options)[0], "own scale")
        assert_same_bits(quantize(x, scale=scale, impl=impl, **options)[0], packed, f"n={n}")
        torch.testing.assert_close(own_scale, scale, rtol=1e-6, atol=0)
        got = dequantize(packed, scale, n, dtype=dtype, impl=impl, **options)
        assert_same_bits(got, dequantize(packed, scale, n, dtype=dtype, impl="reference", **options), f"n={n}")


@each_impl
@pytest.mark.parametrize("bits", [2, 4, 8])
@each_dtype
def test_stochastic_quantize(impl: str, dtype: torch.dtype, bits: int) -> None:
    for n in FEW_SIZES:
        x = sample(n, dtype, seed=n)
        scale = torch.tensor([0.7])
        options = {
            "bits": bits,
            "scale": scale,
            "stochastic": True,
            "seed": -(2**40) + n,
            "worker": 3,
            "step": 2**33 + 1,
        }
        got, _ = quantize(x, param_id=9, impl=impl, **options)
        assert_same_bits(got, quantize(x, param_id=9, impl="reference", **options)[0], f"n={n}")


@each_impl
@pytest.mark.parametrize("stochastic", [False, True])
@each_pair
def test_lion_quantize(impl: str, dtype: torch.dtype, momentum: torch.dtype, stochastic: bool) -> None:
    for n in FEW_SIZES:
        for finite in (True, False):
            m, g = sample(n, momentum, seed=n + 1, finite=finite), sample(n, dtype, seed=n + 2, finite=finite)
            update = (torch.tensor(0.9) * m.float()) + torch.tensor(1 - 0.9) * g.float()
            status = torch.zeros(1, dtype=torch.int32)
            got, scale = lion_quantize(m, g, beta1=0.9, stochastic=stochastic, seed=n, nonfinite=status, impl=impl)
            expected, _ = quantize(update, scale=scale, stochastic=stochastic, seed=n, impl="reference")
            assert_same_bits(got, expected, f"n={n}")
            assert bool(status) == (not update.isfinite().all())
            if finite:
                _, reference_scale = lion_quantize(m, g, beta1=0.9, impl="reference")
                torch.testing.assert_close(scale, reference_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_blocks_of_zeros_have_level_zero(impl: str, norm: str) -> None:
    x = torch.zeros(192)
    x[64:128] = 3.0
    packed, scale = quantize(x, bits=4, norm=norm, block=64, impl=impl)
    assert scale.tolist() == [0.0, 3.0, 0.0]
    values = dequantize(packed, scale, 192, bits=4, norm=norm, block=64, impl=impl)
    assert not values[:64].any()
    assert not values[128:].any()
    assert values[64:128].gt(0).all()


def _strided(shape: tuple[int, ...], seed: int) -> Tensor:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return base.to(memory_format=torch.channels_last) if len(shape) == 4 else base.t()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (31, 9)])
def test_dense_strides_are_taken_in_storage_order(impl: str, shape: tuple[int, ...]) -> None:
    p, g, m = (_strided(shape, seed) for seed in range(3))
    flat = [t.as_strided((t.numel(),), (1,)).clone() for t in (p, g, m)]
    packed = lion_encode(m, g, beta1=0.9, impl=impl)
    assert_same_bits(packed, lion_encode(flat[2], flat[1], beta1=0.9, impl="reference"))
    lion_apply_(p, packed, lr=0.1, weight_decay=0.1, grad=g, exp_avg=m, beta2=0.99, impl=impl)
    lion_step_(p, g, m, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, impl=impl)
    lion_apply_(flat[0], packed, lr=0.1, weight_decay=0.1, grad=flat[1], exp_avg=flat[2], beta2=0.99, impl="reference")
    lion_step_(*flat, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, impl="reference")
    assert_same_bits(p.as_strided((p.numel(),), (1,)), flat[0], "param")
    assert_same_bits(m.as_strided((m.numel(),), (1,)), flat[2], "exp_avg")
