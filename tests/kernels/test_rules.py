"""Properties that hold for every implementation: votes against a count, randomness, ops as torch.library sees them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import assert_same_bits
from torch.library import opcheck

from lioncub import kernels
from lioncub.kernels import dequantize, majority_vote, quantize
from lioncub.kernels.rounding import Stream, random_words

ALL_IMPLS = ("reference", "cpu", "triton")


def _naive_majority(bits: np.ndarray, parity: int) -> np.ndarray:
    workers, n = bits.shape
    voted = []
    for j in range(n):
        ones = sum(int(bit) for bit in bits[:, j])
        voted.append((j + parity) % 2 if 2 * ones == workers else int(2 * ones > workers))
    return np.packbits(np.array(voted, dtype=np.uint8), bitorder="little")


@pytest.mark.parametrize("impl", ALL_IMPLS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    workers=st.integers(1, 70),
    n_bytes=st.integers(1, 33),
    bias=st.sampled_from([0.1, 0.5, 0.9]),
    parity=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_vote_against_a_naive_count(impl: str, workers: int, n_bytes: int, bias: float, parity: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.random((workers, 8 * n_bytes)) < bias
    # rows that stand apart, and start at odd addresses
    packed = torch.zeros(workers, n_bytes + 3, dtype=torch.uint8)[:, 1 : 1 + n_bytes]
    packed.copy_(torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")))
    counts = torch.zeros(2, dtype=torch.int64)
    voted = majority_vote(packed, parity=parity, counts=counts, impl=impl)
    assert_same_bits(voted, torch.from_numpy(_naive_majority(bits, parity)))
    ones = bits.sum(axis=0)
    assert counts.tolist() == [int((2 * ones == workers).sum()), int(((ones == 0) | (ones == workers)).sum())]


def test_stochastic_rounding_is_unbiased() -> None:
    """Of the reference, whose codes the others have bit for bit."""
    x, scale, seeds = torch.linspace(-1.9, 1.9, 1000), torch.tensor([1.0]), 400
    total = torch.zeros(1000)
    for seed in range(seeds):
        packed, _ = quantize(x, scale=scale, stochastic=True, seed=seed, impl="reference")
        total += dequantize(packed, scale, 1000, impl="reference")
    # a code is 2*Bernoulli(|x|/2): standard error <= 1/sqrt(seeds); 5 of them for the worst of 1000 elements
    assert (total / seeds - x).abs().max() < 5 / seeds**0.5
    assert (total / seeds - x).mean().abs() < 5 / (seeds * 1000) ** 0.5


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize(
    ("bits", "norm", "scale", "levels"),
    [
        # by hand: gain * K * x / scale of x = -4, -1.5, -1, 0, 0.5, 1, 4, rounded half to even
        (2, "l1", 1.0, [-1, -1, 0, 0, 0, 0, 1]),
        (2, "l2", 1.0, [-1, -1, 0, 0, 0, 0, 1]),
        (2, "linf", 4.0, [-1, 0, 0, 0, 0, 0, 1]),
        (4, "l1", 3.5, [-4, -2, -1, 0, 0, 1, 4]),
        (4, "linf", 7.0, [-4, -2, -1, 0, 0, 1, 4]),
        (8, "l2", 63.5, [-4, -2, -1, 0, 0, 1, 4]),
        (8, "linf", 4.0, [-127, -48, -32, 0, 16, 32, 127]),
    ],
)
def test_levels_are_those_of_the_formula(impl: str, bits: int, norm: str, scale: float, levels: list[int]) -> None:
    x = torch.tensor([-4.0, -1.5, -1.0, 0.0, 0.5, 1.0, 4.0])
    packed, _ = quantize(x, bits=bits, norm=norm, scale=torch.tensor([scale]), impl=impl)
    codes = [
        int(code) for byte in packed.tolist() for code in (byte >> shift & (2**bits - 1) for shift in range(0, 8, bits))
    ]
    assert [code - (2 ** (bits - 1) - 1) for code in codes[:7]] == levels
    assert not any(codes[7:])


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_scales_are_the_norms(impl: str) -> None:
    x = torch.tensor([3.0, -4.0, 0.0, 0.0])
    scales = {norm: quantize(x, norm=norm, impl=impl)[1].item() for norm in ("l1", "l2", "linf")}
    assert scales == {"l1": 1.75, "l2": 2.5, "linf": 4.0}


@pytest.mark.parametrize("part", ["seed", "worker", "step", "param_id"])
def test_streams_are_independent(part: str) -> None:
    n = 20000
    one, other = (
        random_words(Stream(**{"seed": 1, "worker": 2, "step": 3, "param_id": 4, part: value}), n, torch.device("cpu"))
        for value in (5, 6)
    )
    correlation = torch.corrcoef(torch.stack([one, other]).double())[0, 1]
    assert abs(correlation) < 5 / n**0.5
    assert int((one == other).sum()) <= 1


def test_random_words_are_philox() -> None:
    """Known answer of Random123's philox4x32-10: counter and key all zero."""
    words = random_words(Stream(0, 0, 0, 0), 4, torch.device("cpu"))
    assert [f"{word:08x}" for word in words.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _op_arguments(impl: str) -> dict[str, tuple[Any, ...]]:
    """Of every op, as its name and, behind a colon, the way in which it is called."""
    n = 70
    x, g, m = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    bits, fields, fours = (torch.zeros(size, dtype=torch.uint8) for size in (16, 24, 64))
    flag, scale = torch.zeros(1, dtype=torch.int32), torch.ones(1)
    counts = torch.zeros(2, dtype=torch.int64)
    one, parity, active = _scalar(1.0), torch.tensor(3), torch.ones(1, dtype=torch.int32)
    low, nearest, starts = x.bfloat16(), (None, None, [], []), [0, 128]
    stochastic = (torch.tensor([7, 2**31 + 1]), torch.tensor(5), [9], [4])
    twice = (*stochastic[:2], [9, 8], [])
    flat, codes, flags = torch.zeros(256), torch.zeros(64, dtype=torch.uint8), torch.ones(2, dtype=torch.int32)
    # dense in another order than that of the axes
    turned = [torch.zeros(14, 5).t(), torch.zeros(70)]
    b1, b2, lr, wd = _scalar(0.9), _scalar(0.99), _scalar(0.1), _scalar(0.01)
    two, four = (2, 1, 1, 1), (4, 1, 7, 7)
    return {
        "lion_encode:values": ([x], [], None, parity, [bits], None, None, None, impl),
        "unpack_signs": (bits, x, impl),
        "lion_encode": ([m], [g], b1, parity, [bits], flag, one, None, impl),
        "lion_encode:flat": ([flat], turned, b1, parity, [codes], flags, one, starts, impl),
        "lion_encode_": ([m], [g], b1, b2, parity, [bits], flag, impl),
        "majority_vote": (torch.zeros(3, 16, dtype=torch.uint8), parity, bits, counts, impl),
        "count_votes": (*(torch.zeros(n, 20, dtype=torch.uint8)[:, :16] for n in (3, 2)), impl),
        "majority_of_counts": (torch.zeros(2, 2, 16, dtype=torch.uint8), 5, parity, bits, counts, impl),
        "majority_of_fields": (torch.zeros(64, dtype=torch.uint8), 4, 3, parity, bits, counts, impl),
        "add_codes": (torch.zeros(3, 16, dtype=torch.uint8), 1, 4, fours, impl),
        "ternary_of_fields": (fours[:32], 4, 2, 3, 3, bits, counts, impl),
        "lion_apply_": ([low], [fours[:32]], *two, lr, wd, [], [], None, one, None, [], *stochastic, None, impl),
        "lion_apply_:masters": ([low], [fours], *four, lr, wd, [g], [m], b2, one, active, [x], *nearest, None, impl),
        "lion_apply_:momentum": ([x], [fours], *four, lr, wd, [g], [m], b2, one, active, [], *nearest, None, impl),
        "lion_apply_:flat": (turned, [codes], *two, lr, wd, [m, m], [flat], b2, one, flags, [], *twice, starts, impl),
        "lion_step_": ([low], [g], [m], lr, wd, b1, b2, one, active, [], *stochastic, None, impl),
        "lion_step_:masters": ([low], [g], [m], lr, wd, b1, b2, one, active, [x], *nearest, None, impl),
        "lion_step_:flat": (turned, [m, m], [flat], lr, wd, b1, b2, one, flags, [], *twice, starts, impl),
        "lion_block_scale:values": ([x], [], None, None, [scale], "l1", 0, None, impl),
        "lion_block_scale": ([m], [g], b1, one, [scale], "l2", 0, None, impl),
        "lion_block_scale:flat": ([flat], turned, b1, one, [torch.ones(8)], "l2", 64, starts, impl),
        "lion_quantize:values": (
            *([x], [], None, None, [scale], *stochastic, [fields]),
            *(None, 2, "l1", 0, None, impl),
        ),
        "lion_quantize": ([m], [g], b1, one, [scale], *nearest, [fields], flag, 2, "l1", 0, None, impl),
        "lion_quantize:flat": (
            *([flat], turned, b1, one, [torch.ones(8)], *twice),
            *([codes], flags, 2, "l1", 64, starts, impl),
        ),
        "dequantize": (fields, scale, 0.5, 0, 2, x, impl),
    }


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("name", sorted(_op_arguments("reference")))
def test_opcheck(name: str, impl: str) -> None:
    passed = opcheck(getattr(torch.ops.lioncub, name.split(":")[0]).default, _op_arguments(impl)[name])
    assert set(passed.values()) == {"SUCCESS"}


def test_every_registered_op_is_checked() -> None:
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lioncub::")
    }
    assert registered == {name.split(":")[0] for name in _op_arguments("reference")}


class Exchange(torch.nn.Module):
    """What a worker says and hears, by single-tensor ops."""

    def forward(self, x: torch.Tensor, m: torch.Tensor, parity: torch.Tensor) -> tuple[torch.Tensor, ...]:
        said = kernels.lion_encode(m, x, beta1=0.9, parity=parity)
        voted = majority_vote(torch.stack([said, kernels.pack_signs(m), kernels.pack_signs(-x)]), parity=parity)
        codes, scale = quantize(x, bits=4, stochastic=True, seed=3)
        kernels.lion_apply_(m, voted, lr=0.1, weight_decay=0.1)
        return voted, m, dequantize(codes, scale, x.numel(), bits=4)


def test_exported_programs_hold_the_ops_and_give_the_same_bits() -> None:
    x, m = (torch.randn(130, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    program = torch.export.export(Exchange(), (x, m.clone(), torch.tensor(1)))
    found = {str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("lioncub.")}
    assert found >= {"lion_encode", "majority_vote", "lion_quantize", "lion_apply_", "dequantize"}
    expected = Exchange()(x, m.clone(), torch.tensor(0))
    for got, wanted in zip(program.module()(x, m.clone(), torch.tensor(0)), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_compiled_step_does_not_recompile_when_lr_changes() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=counting)
    def step(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, lr: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        packed = kernels.lion_encode(m, g, beta1=0.9, parity=t)
        kernels.lion_apply_(p, packed, lr=lr, weight_decay=0.1, grad=g, exp_avg=m, beta2=0.99)
        return packed

    p, g, m = (torch.randn(130, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    plain = p.clone(), m.clone()
    for t, lr in enumerate((0.1, 0.05, 0.01)):
        step(p, g, m, _scalar(lr), torch.tensor(t))
        packed = kernels.lion_encode(plain[1], g, beta1=0.9, parity=t)
        kernels.lion_apply_(plain[0], packed, lr=lr, weight_decay=0.1, grad=g, exp_avg=plain[1], beta2=0.99)
    assert graphs == 1
    assert_same_bits(p, plain[0], "param")
    assert_same_bits(m, plain[1], "exp_avg")


def test_numbers_that_change_compile_too() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def step(p: torch.Tensor, packed: torch.Tensor, lr: float) -> None:
        kernels.lion_apply_(p, packed, lr=lr, weight_decay=0.1)

    p, packed = torch.ones(64), kernels.pack_signs(torch.ones(64))
    plain = p.clone()
    for lr in (0.5, 0.25, 0.125):
        step(p, packed, lr)
        kernels.lion_apply_(plain, packed, lr=lr, weight_decay=0.1)
    assert_same_bits(p, plain)


def test_writes_are_seen_by_autograd() -> None:
    m, p = torch.zeros(9), torch.zeros(9)
    versions = m._version, p._version
    kernels.lion_step_(p, torch.ones(9), m, lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.0)
    assert m._version > versions[0]
    assert p._version > versions[1]
