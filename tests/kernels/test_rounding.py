"""Stochastic rounding within the kernels: the same bits in every implementation, and no bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from samples import DTYPES, SIZES, assert_same_bits, fields_of, listed, sample
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import Rounding, packed_bytes
from lioncub.kernels.rounding import (
    MAX_ELEMENTS,
    MOMENTUM_WORKERS,
    PARAM_WORKER,
    Streams,
    random_words,
    round_stochastic,
)

ALL_IMPLS = ("reference", "cpu", "triton")
# the interpreter takes as long for one element as for a tile
FEW = (0, 1, 65, 1009)
LOW = (torch.bfloat16, torch.float16)
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
each_impl = pytest.mark.parametrize("impl", ALL_IMPLS)
ROUNDING = Rounding(seed=-(2**50) + 3, step=2**31 + 5, rank=3)


def codes_of(params: Sequence[Tensor], bits: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [bits * packed_bytes(x.numel()) for x in params]
    return [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in sizes]


RATES = {"lr": 0.01, "weight_decay": 0.1, "beta2": 0.99}
OPS: dict[str, Callable[..., None]] = {
    "votes": lambda x, g, m, **options: kernels.foreach_lion_apply_(
        x, codes_of(x), grad=g, exp_avg=m, **RATES, **options
    ),
    "codes": lambda x, g, m, **options: kernels.foreach_lion_apply_(
        x, codes_of(x, 2), bits=2, step=1, offset=1, grad=g, exp_avg=m, **RATES, **options
    ),
    "16-bit codes": lambda x, g, m, **options: kernels.foreach_lion_apply_(
        x, codes_of(x, 16), bits=16, step=2, offset=3, divisor=3, grad=g, exp_avg=m, **RATES, **options
    ),
    "step": lambda x, g, m, **options: kernels.foreach_lion_step_(x, g, m, beta1=0.9, **RATES, **options),
}
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def lists_of(dtype: torch.dtype, momentum: torch.dtype, sizes: Sequence[int] = FEW) -> Lists:
    return (
        [sample(n, dtype, seed=n) for n in sizes],
        [sample(n, dtype, seed=n + 1) for n in sizes],
        [sample(n, momentum, seed=n + 2) for n in sizes],
    )


def moved(op: str, lists: Lists, **options: Any) -> list[Tensor]:
    x, g, m = lists
    x, m = [each.clone() for each in x], [each.clone() for each in m]
    OPS[op](x, g, m, **options)
    return [*x, *m]


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize(("dtype", "momentum"), PAIRS, ids=str)
def test_every_implementation_takes_the_same_neighbour(op: str, dtype: torch.dtype, momentum: torch.dtype) -> None:
    lists = lists_of(dtype, momentum, SIZES if op == "step" and momentum in LOW else FEW)
    options = {"rounding": ROUNDING, "param_ids": [2**20 + i for i in range(len(lists[0]))]}
    expected = moved(op, lists, impl="reference", **options)
    for impl in ("cpu", "triton"):
        for got, wanted in zip(moved(op, lists, impl=impl, **options), expected, strict=True):
            assert_same_bits(got, wanted, f"{impl} {op} of {got.numel()} elements")


@each_impl
def test_one_tensor_is_rounded_as_in_a_list(impl: str) -> None:
    x, g, m = lists_of(torch.bfloat16, torch.bfloat16)
    listed = moved("step", (x, g, m), rounding=ROUNDING, param_ids=range(100, 100 + len(x)), impl=impl)
    for i, n in enumerate(FEW):
        p, state = x[i].clone(), m[i].clone()
        kernels.lion_step_(p, g[i], state, beta1=0.9, rounding=ROUNDING, param_id=100 + i, impl=impl, **RATES)
        assert_same_bits(p, listed[i], f"parameter of {n}")
        assert_same_bits(state, listed[len(x) + i], f"momentum of {n}")
    (votes,), (fours,) = codes_of([x[-1]]), codes_of([x[-1]], 2)
    for op, packed in (("votes", votes), ("codes", fours)):
        p, state = x[-1].clone(), m[-1].clone()
        form = {} if op == "votes" else {"bits": 2, "step": 1, "offset": 1}
        kernels.lion_apply_(
            p, packed, grad=g[-1], exp_avg=state, rounding=ROUNDING, param_id=9, impl=impl, **form, **RATES
        )
        expected = moved(op, ([x[-1]], [g[-1]], [m[-1]]), rounding=ROUNDING, param_ids=[9], impl="reference")
        assert_same_bits(p, expected[0], op)
        assert_same_bits(state, expected[1], op)


@each_impl
def test_mixed_dtypes_and_shut_gates(impl: str) -> None:
    x, g, m = ([sample(65, DTYPES[i % 3], seed=10 * k + i) for i in range(6)] for k in range(3))
    m = [each.float() if i < 3 else each for i, each in enumerate(m)]
    everything = moved("step", (x, g, m), rounding=ROUNDING, param_ids=range(6), impl="reference")
    gate = torch.tensor([1, 0, 1, 1, 1, 0], dtype=torch.int32)
    got = moved("step", (x, g, m), rounding=ROUNDING, param_ids=range(6), active=gate, impl=impl)
    for i, is_open in enumerate(gate.tolist() * 2):
        assert_same_bits(got[i], everything[i] if is_open else [*x, *m][i], f"tensor {i}")


@each_impl
def test_fp32_and_momentum_without_a_rank_are_rounded_to_nearest(impl: str) -> None:
    for dtype, momentum, rank in ((torch.float32, torch.float32, 3), (torch.bfloat16, torch.bfloat16, None)):
        lists = lists_of(dtype, momentum)
        nearest = moved("step", lists, impl=impl)
        stochastic = moved("step", lists, rounding=Rounding(1, 2, rank), impl=impl)
        for got, expected in zip(stochastic[len(FEW) :], nearest[len(FEW) :], strict=True):
            assert_same_bits(got, expected, "momentum")
        if dtype == torch.float32:
            for got, expected in zip(stochastic, nearest, strict=True):
                assert_same_bits(got, expected, "parameter")


@pytest.mark.parametrize(
    ("dtype", "value", "move"),
    [
        (torch.bfloat16, 1.0, 1e-3),
        (torch.bfloat16, -1.0, 1e-5),
        (torch.bfloat16, 3e-39, 1.3e-38),
        (torch.float16, 1.0, 1e-4),
        (torch.float16, -0.3, 1e-5),
        (torch.float16, 2.0**-20, 1.3e-8),
        (torch.float16, -(2.0**-14), 2e-8),
        (torch.float16, 0.0, 1e-9),
    ],
)
@each_impl
def test_the_mean_of_roundings_is_the_value(impl: str, dtype: torch.dtype, value: float, move: float) -> None:
    n = 20_000
    # both signs; half of the elements move up, half down
    up = torch.arange(n) % 2 == 0
    packed = kernels.pack_signs(torch.where(up, 1.0, -1.0), impl="reference")
    for sign in (1, -1):
        x = torch.full((n,), sign * value, dtype=dtype)
        start = x.float()
        kernels.lion_apply_(x, packed, lr=move, weight_decay=0.0, rounding=Rounding(7, 1), param_id=2, impl=impl)
        for half in (up, ~up):
            exact = (start - torch.where(up, torch.tensor(move), -torch.tensor(move)))[half][0].item()
            found = x[half].double()
            neighbours = found.unique()
            assert len(neighbours) == 2
            assert neighbours[0] < exact < neighbours[1]
            error = found.std() / found.numel() ** 0.5
            assert abs(found.mean() - exact) < 5 * error, f"{found.mean()} is not {exact}"


@each_impl
def test_the_mean_of_rounded_momentum_is_its_value(impl: str) -> None:
    n = 20_000
    for dtype, start in ((torch.bfloat16, 1.0), (torch.float16, 2.0**-15)):
        x, g, m = torch.ones(n), torch.full((n,), 0.3 * start), torch.full((n,), start, dtype=dtype)
        kernels.foreach_lion_step_([x], [g], [m], beta1=0.9, rounding=Rounding(7, 1, rank=0), impl=impl, **RATES)
        exact = 0.99 * start + 0.01 * 0.3 * start
        error = m.double().std() / n**0.5
        assert len(m.unique()) == 2
        assert abs(m.double().mean() - exact) < 5 * error


@pytest.mark.parametrize("dtype", LOW)
def test_what_needs_no_rounding_stays_and_what_has_none_goes_to_nearest(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for _ in range(3):
        words = torch.randint(0, 2**32, every.shape, generator=generator)
        assert_same_bits(round_stochastic(every.float(), dtype, words), every, "representable")
    largest = torch.finfo(dtype).max
    past = torch.tensor([largest * 1.001, 3.4e38, float("inf"), float("nan")])
    for values in (past, -past):
        for word in (0, 2**32 - 1):
            got = round_stochastic(values, dtype, torch.full(values.shape, word))
            assert_same_bits(got, values.to(dtype), f"word {word}")
    inside = torch.tensor([largest * 0.9999, -largest * 0.9999])
    assert round_stochastic(inside, dtype, torch.full((2,), 2**32 - 1)).tolist() == [largest, -largest]


def cut(tensors: Sequence[Tensor], multiple: int) -> tuple[list[Tensor], list[int], list[int]]:
    """Pieces of flat tensors, cut near a third and at the end of what ``multiple`` allows; of which, and where from."""
    pieces, whole, firsts = [], [], []
    for i, tensor in enumerate(tensors):
        n = len(tensor)
        bounds = [0, n // 3 // multiple * multiple, n // multiple * multiple, n]
        for first, last in pairwise(bounds):
            pieces.append(tensor[first:last].clone())
            whole.append(i)
            firsts.append(first)
    return pieces, whole, firsts


@each_impl
@pytest.mark.parametrize("dtype", LOW)
def test_pieces_are_rounded_as_the_whole(impl: str, dtype: torch.dtype) -> None:
    x, g, m = lists_of(dtype, dtype, SIZES)
    ids = [2**32 - 1 - i for i in range(len(SIZES))]
    expected = moved("step", (x, g, m), rounding=ROUNDING, param_ids=ids, impl="reference")
    pieces, whole, firsts = cut(x, 4)
    got = moved(
        "step",
        (pieces, cut(g, 4)[0], cut(m, 4)[0]),
        rounding=ROUNDING,
        param_ids=[ids[i] for i in whole],
        stream_starts=firsts,
        impl=impl,
    )
    for k, piece in enumerate(cut(expected[: len(x)], 4)[0] + cut(expected[len(x) :], 4)[0]):
        assert_same_bits(got[k], piece, f"piece {k % len(whole)} of {SIZES[whole[k % len(whole)]]} elements")


@each_impl
def test_pieces_are_moved_by_votes_as_the_whole(impl: str) -> None:
    x, g, m = lists_of(torch.bfloat16, torch.bfloat16, (1009,))
    (votes,), options = codes_of(x), {"rounding": ROUNDING, "param_ids": [7], **RATES}
    # codes of a piece begin with a word
    rest = [[each[0][64:].clone()] for each in (x, g, m)]
    kernels.foreach_lion_apply_(x, [votes], grad=g, exp_avg=m, impl="reference", **options)
    kernels.foreach_lion_apply_(
        rest[0], [votes[8:].clone()], grad=rest[1], exp_avg=rest[2], stream_starts=[64], impl=impl, **options
    )
    assert_same_bits(rest[0][0], x[0][64:], "parameter")
    assert_same_bits(rest[2][0], m[0][64:], "momentum")


@each_impl
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pieces_have_the_codes_of_the_whole(impl: str, bits: int) -> None:
    _, g, m = lists_of(torch.float32, torch.float32, SIZES)
    ids, how = list(range(5, 5 + len(g))), {"beta1": 0.9, "bits": bits, "stochastic": True, "seed": 3, "step": 7}
    scale = torch.tensor([0.5])

    def codes(momenta: list[Tensor], grads: list[Tensor], impl: str, **options: Any) -> list[Tensor]:
        out = [torch.empty(packed_bytes(len(each), bits), dtype=torch.uint8) for each in grads]
        given = [scale] * len(grads)
        kernels.foreach_lion_quantize(momenta, grads, scale=given, out=out, impl=impl, **how, **options)
        return [fields_of(each, bits)[: len(grad)] for each, grad in zip(out, grads, strict=True)]

    pieces, whole, firsts = cut(g, 4)
    expected = cut(codes(m, g, "reference", param_ids=ids), 4)[0]
    got = codes(cut(m, 4)[0], pieces, impl, param_ids=[ids[i] for i in whole], stream_starts=firsts)
    for k, piece in enumerate(expected):
        assert_same_bits(got[k], piece, f"piece {k} of {SIZES[whole[k]]} elements")


@each_impl
def test_the_last_elements_of_a_stream(impl: str) -> None:
    """Their counter is 32 ones, by which a table's number is negative."""
    lists = lists_of(torch.bfloat16, torch.bfloat16, (4,))
    options = {"rounding": ROUNDING, "param_ids": [2**32 - 1], "stream_starts": [MAX_ELEMENTS - 4]}
    expected = moved("step", lists, impl="reference", **options)
    for got, wanted in zip(moved("step", lists, impl=impl, **options), expected, strict=True):
        assert_same_bits(got, wanted)


def test_streams_keep_apart() -> None:
    streams = Streams(seed=1, step=2, worker=MOMENTUM_WORKERS + 3, param_ids=[4])
    mine = [streams.of_param(0), streams.of_worker(0)]
    quantization = mine[0]._replace(worker=3)
    assert mine[0].worker == PARAM_WORKER == 2**32 - 1
    words = [random_words(stream, 1000, torch.device("cpu")) for stream in (*mine, quantization)]
    for i, one in enumerate(words):
        for other in words[:i]:
            assert int((one == other).sum()) <= 1


def test_seed_step_tensor_and_rank_change_the_words() -> None:
    lists = lists_of(torch.bfloat16, torch.bfloat16)

    def results(rounding: Rounding, first: int = 0) -> tuple[Tensor, Tensor]:
        found = moved("step", lists, rounding=rounding, param_ids=range(first, first + len(FEW)), impl="cpu")
        return found[len(FEW) - 1].nan_to_num(), found[-1].nan_to_num()

    base = results(Rounding(1, 2, 3))
    assert all(torch.equal(a, b) for a, b in zip(base, results(Rounding(1 + 2**64, 2 + 2**32, 3)), strict=True))
    for other in (results(Rounding(9, 2, 3)), results(Rounding(1, 9, 3)), results(Rounding(1, 2, 3), 50)):
        assert not torch.equal(base[0], other[0])
        assert not torch.equal(base[1], other[1])
    other = results(Rounding(1, 2, 4))
    assert torch.equal(base[0], other[0]), "parameters are rounded alike on all workers"
    assert not torch.equal(base[1], other[1])


def test_the_step_can_stand_on_the_device() -> None:
    triton_gpu = pytest.importorskip("lioncub.kernels.triton_gpu")
    x, g, m = lists_of(torch.bfloat16, torch.bfloat16)
    expected = moved("step", (x, g, m), rounding=Rounding(7, 2**33 + 5, 1), impl="reference")
    step = torch.tensor(2**33 + 5)
    streams = Streams(7, step, MOMENTUM_WORKERS + 1, range(len(x)))
    betas = [kernels.scalars.mix_of(torch.tensor(beta, dtype=torch.float64)) for beta in (0.9, 0.99)]
    lr, wd = (torch.tensor(value, dtype=torch.float64) for value in (0.01, 0.1))
    lists = [listed(each) for each in (x, g, m)]
    triton_gpu.lion_step_(*lists, *kernels.scalars.rates_of(lr, wd), *betas, rounding=streams)
    for got, wanted in zip([*x, *m], expected, strict=True):
        assert_same_bits(got, wanted)


def test_a_compiled_step_does_not_recompile_when_the_step_changes() -> None:
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=counting)
    def step(p: Tensor, g: Tensor, m: Tensor, t: Tensor) -> None:
        kernels.lion_step_(p, g, m, beta1=0.9, rounding=Rounding(3, t, rank=0), param_id=4, **RATES)

    p, g, m = (torch.randn(130, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in range(3))
    plain = p.clone(), m.clone()
    for t in range(3):
        step(p, g, m, torch.tensor(t))
        kernels.lion_step_(plain[0], g, plain[1], beta1=0.9, rounding=Rounding(3, t, rank=0), param_id=4, **RATES)
    assert graphs == 1
    assert_same_bits(p, plain[0], "param")
    assert_same_bits(m, plain[1], "exp_avg")
