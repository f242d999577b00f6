"""Lists whose momentum and codes are flat buffers: the bits of lists, nothing written between the tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import assert_same_bits, listed, poisoned, sample
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import Rounding, packed_bytes
from lioncub.kernels.quantization import foreach_lion_scale, scale_count, scale_starts

ALL_IMPLS = ("reference", "cpu", "triton")
SHAPES = [(7, 13), (0,), (65,), (2, 3, 4, 5), (1009,)]
SIZES = [torch.Size(shape).numel() for shape in SHAPES]
# with gaps of one word and more
STARTS = [0, 128, 192, 384, 512]
N = 1664
RATES: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
each_impl = pytest.mark.parametrize("impl", ALL_IMPLS)


def strided(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """One of each shape, those of several axes in another order than that of the axes."""
    made = []
    for i, shape in enumerate(SHAPES):
        flat = sample(SIZES[i], dtype, seed + i, finite=True)
        made.append(flat.view(shape[::-1]).permute(*range(len(shape) - 1, -1, -1)))
    return made


def flattened(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.as_strided((tensor.numel(),), (1,)).clone() for tensor in tensors]


def parts(buffer: Tensor, bits: int = 0, sizes: list[int] = SIZES) -> list[Tensor]:
    """Copies of each tensor's part of a flat buffer, of momentum or of codes of ``bits``."""
    if not bits:
        return [buffer[first : first + n].clone() for first, n in zip(STARTS, sizes, strict=True)]
    return [
        buffer[first * bits // 8 :][: packed_bytes(n, bits)].clone() for first, n in zip(STARTS, sizes, strict=True)
    ]


def between(buffer: Tensor, bits: int = 0) -> Tensor:
    """What belongs to no tensor."""
    mask = torch.ones(len(buffer), dtype=torch.bool)
    for first, n in zip(STARTS, SIZES, strict=True):
        mask[first * (bits or 8) // 8 :][: packed_bytes(n, bits) if bits else n] = False
    return buffer[mask]


def check_parts(buffer: Tensor, expected: list[Tensor], before: Tensor, what: str, bits: int = 0) -> None:
    for i, (got, wanted) in enumerate(zip(parts(buffer, bits), expected, strict=True)):
        assert_same_bits(got, wanted, f"{what} of tensor {i}")
    assert_same_bits(between(buffer, bits), between(before, bits), f"{what} between the tensors")


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encode(impl: str, dtype: torch.dtype) -> None:
    grads, momentum = strided(0, dtype), sample(N, torch.float32, 9, finite=True)
    grads[3][0, 1, 2, 3] = float("nan")
    out, flags = poisoned(N // 8), torch.zeros(len(SHAPES), dtype=torch.int32)
    before, kept = out.clone(), momentum.clone()
    options: dict[str, Any] = {"beta1": 0.9, "parity": 1, "grad_scale": -0.5}
    kernels.foreach_lion_encode(momentum, grads, out=out, nonfinite=flags, starts=STARTS, impl=impl, **options)
    expected = [poisoned(packed_bytes(n)) for n in SIZES]
    kernels.foreach_lion_encode(parts(momentum), flattened(grads), out=expected, impl="reference", **options)
    check_parts(out, expected, before, "codes", bits=1)
    assert flags.tolist() == [0, 0, 0, 1, 0]
    assert_same_bits(momentum, kept, "momentum was changed")


@each_impl
@pytest.mark.parametrize("bits", [1, 2, 8, 16])
@pytest.mark.parametrize("rounding", [None, Rounding(3, 5, 1)])
def test_apply(impl: str, bits: int, rounding: Rounding | None) -> None:
    x, g, m = strided(0, torch.bfloat16), strided(10, torch.bfloat16), sample(N, torch.bfloat16, 9, finite=True)
    packed = torch.randint(0, 256, (N * bits // 8,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected, expected_m, before = flattened(x), parts(m), m.clone()
    active = torch.tensor([1, 1, 0, 1, 1], dtype=torch.int32)
    form = {"bits": bits, "step": 2, "offset": 1, "divisor": 3, "param_ids": [7, 1, 2, 3, 2**31]}
    options: dict[str, Any] = {"beta2": 0.99, "active": active, "rounding": rounding, **form, **RATES}
    kernels.foreach_lion_apply_(x, packed, grad=g, exp_avg=m, starts=STARTS, impl=impl, **options)
    whole = [bits * packed_bytes(n) for n in SIZES]
    codes = [packed[first * bits // 8 :][:n].clone() for first, n in zip(STARTS, whole, strict=True)]
    kernels.foreach_lion_apply_(expected, codes, grad=flattened(g), exp_avg=expected_m, impl="reference", **options)
    for i, (got, wanted) in enumerate(zip(flattened(x), expected, strict=True)):
        assert_same_bits(got, wanted, f"parameter {i}")
    check_parts(m, expected_m, before, "momentum")


@each_impl
def test_step(impl: str) -> None:
    x, g, m = strided(0, torch.float16), strided(10, torch.float16), sample(N, torch.float32, 9, finite=True)
    expected, expected_m, before = flattened(x), parts(m), m.clone()
    options: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "rounding": Rounding(3, 5, 1), **RATES}
    # a gradient may be in storage order already
    kernels.foreach_lion_step_(x, [*g[:3], *flattened(g)[3:]], m, starts=STARTS, impl=impl, **options)
    kernels.foreach_lion_step_(expected, flattened(g), expected_m, impl="reference", **options)
    for i, (got, wanted) in enumerate(zip(flattened(x), expected, strict=True)):
        assert_same_bits(got, wanted, f"parameter {i}")
    check_parts(m, expected_m, before, "momentum")


@each_impl
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("block", [None, 8, 256])
def test_quantize(impl: str, bits: int, block: int | None) -> None:
    grads, momentum = strided(0, torch.float32), sample(N, torch.bfloat16, 9, finite=True)
    out = poisoned(N * bits // 8)
    before, counts = out.clone(), [scale_count(n, block or 0) for n in SIZES]
    how: dict[str, Any] = {"beta1": 0.9, "norm": "linf", "block": block, "grad_scale": -1.0}
    (scale,) = foreach_lion_scale(momentum, grads, starts=STARTS, impl=impl, **how)
    expected_scale = foreach_lion_scale(parts(momentum), flattened(grads), impl="reference", **how)
    own = [scale[first : first + count] for first, count in zip(scale_starts(counts), counts, strict=False)]
    for i, (got, wanted) in enumerate(zip(own, expected_scale, strict=True)):
        assert_same_bits(got, wanted, f"scale of tensor {i}")
    how |= {"bits": bits, "stochastic": True, "seed": 3, "worker": 2, "param_ids": [5, 4, 3, 2, 1]}
    expected = [poisoned(packed_bytes(n, bits)) for n in SIZES]
    kernels.foreach_lion_quantize(
        parts(momentum), flattened(grads), scale=expected_scale, step=7, out=expected, impl="reference", **how
    )
    # computed, one buffer, or a list
    for given in (None, scale, own):
        kernels.foreach_lion_quantize(
            momentum, grads, scale=given, step=torch.tensor(7), out=out, starts=STARTS, impl=impl, **how
        )
        check_parts(out, expected, before, "codes", bits)
        out.copy_(before)


def test_a_step_on_the_device_is_read_there() -> None:
    triton_gpu = pytest.importorskip("lioncub.kernels.triton_gpu")
    from lioncub.kernels.rounding import Streams
    from lioncub.kernels.scalars import Mix

    grads, momenta = flattened(strided(0, torch.float32)), flattened(strided(20, torch.float32))
    scale, found = [torch.ones(1)] * len(SHAPES), {}
    for step in (2**33 + 5, torch.tensor(2**33 + 5)):
        out = [poisoned(packed_bytes(n, 2)) for n in SIZES]
        lists = (listed(momenta), listed(grads), Mix(0.5, 0.5), listed(scale), 0.5, 0, 2)
        triton_gpu.lion_quantize(*lists, Streams(3, step, 1, range(len(SHAPES))), listed(out), None)
        found[type(step)] = torch.cat(out)
    assert torch.equal(found[int], found[Tensor])
