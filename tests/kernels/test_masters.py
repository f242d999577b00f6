"""fp32 masters of bf16 and fp16 parameters: the same bits in every implementation, and what is written counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import SIZES, assert_same_bits, poisoned, sample
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import packed_bytes

RATES: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
LOW = (torch.bfloat16, torch.float16)
each_impl = pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
each_low = pytest.mark.parametrize("dtype", LOW, ids=str)


def values_of(param: Tensor, master: Tensor) -> Tensor:
    """Element by element: the master where it rounds to the parameter, else the parameter."""
    pairs = zip(master.tolist(), master.to(param.dtype).tolist(), param.tolist(), strict=True)
    return torch.tensor([m if rounded == x else x for m, rounded, x in pairs], dtype=torch.float32)


def written_into(dtype: torch.dtype, n: int) -> tuple[Tensor, Tensor]:
    """A parameter and its master; into a third of the elements something was written: any float over any other."""
    master = sample(n, torch.float32, n)
    param, other = master.to(dtype), sample(n, dtype, n + 1)
    is_written = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.33
    return torch.where(is_written, other, param), master


def move(op: str, x: list[Tensor], g: list[Tensor], m: list[Tensor], **options: Any) -> None:
    if op == "step":
        kernels.foreach_lion_step_(x, g, m, beta1=0.9, beta2=0.99, **RATES, **options)
        return
    bits = int(op[0]) if op != "16 bits" else 16
    form = {"bits": bits, "step": 2, "offset": 1, "divisor": 3}
    generator = torch.Generator().manual_seed(3)
    codes = [
        torch.randint(0, 256, (bits * packed_bytes(each.numel()),), generator=generator, dtype=torch.uint8)
        for each in x
    ]
    moves = {"grad": g, "exp_avg": m, "beta2": 0.99} if op != "1 bit, votes alone" else {}
    kernels.foreach_lion_apply_(x, codes, **form, **moves, **RATES, **options)


@pytest.mark.parametrize("op", ["step", "1 bit", "1 bit, votes alone", "4 bits", "16 bits"])
@each_low
@each_impl
def test_masters_move_as_fp32_parameters(impl: str, dtype: torch.dtype, op: str) -> None:
    sizes = SIZES if op in ("step", "1 bit") else (65, 1009)
    # an fp32 parameter among them has no master
    made = [written_into(dtype, n) for n in sizes]
    grads = [sample(n, dtype, n + 2) for n in (*sizes, 70)]
    # momentum in fp32 or in 16 bits
    momenta = [sample(n, dtype if n % 2 else torch.float32, n + 3) for n in (*sizes, 70)]
    params, masters = [x.clone() for x, _ in made] + [sample(70, torch.float32, 1)], [m.clone() for _, m in made]
    wanted = [values_of(x, m) for x, m in made] + [params[-1].clone()]
    state = [m.clone() for m in momenta]
    move(op, wanted, grads, state, impl="reference")
    move(op, params, grads, momenta, master=masters, impl=impl)
    for i, value in enumerate(wanted):
        assert_same_bits(params[i], value.to(params[i].dtype), f"parameter of {value.numel()}")
        assert_same_bits(momenta[i], state[i], f"momentum of {value.numel()}")
        if i < len(masters):
            assert_same_bits(masters[i], value, f"master of {value.numel()}")


@each_impl
def test_nothing_is_written_where_a_parameter_is_not_active(impl: str) -> None:
    made = [written_into(torch.bfloat16, n) for n in (65, 130)]
    x, masters = [p.clone() for p, _ in made], [m.clone() for _, m in made]
    grads = [torch.ones(n, dtype=torch.bfloat16) for n in (65, 130)]
    active = torch.tensor([0, 1], dtype=torch.int32)
    for op in ("step", "1 bit"):
        move(op, x, grads, [torch.zeros(65), torch.zeros(130)], master=masters, active=active, impl=impl)
    assert_same_bits(x[0], made[0][0], "parameter")
    assert_same_bits(masters[0], made[0][1], "master")
    assert not torch.equal(masters[1].nan_to_num(), made[1][1].nan_to_num())


@each_impl
def test_zeros_are_one_and_nan_counts(impl: str) -> None:
    master = torch.tensor([-2e-8, 2e-8, 2e-8, float("nan"), 1.0, -0.0])
    x = torch.tensor([0.0, -0.0, 0.0, 1.0, float("nan"), 0.0], dtype=torch.float16)
    still = torch.zeros(6, dtype=torch.float16)
    options: dict[str, Any] = {"lr": 0.0, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "impl": impl}
    kernels.lion_step_(x, still, still.clone(), master=master, **options)
    # what is below the least fp16 is not lost
    assert_same_bits(master, torch.tensor([-2e-8, 2e-8, 2e-8, 1.0, float("nan"), -0.0]))
    assert_same_bits(x, master.half())


@each_impl
def test_masters_of_any_storage_order_beside_flat_momentum(impl: str) -> None:
    x, master = written_into(torch.bfloat16, 91)
    wanted, g, state = values_of(x, master), sample(91, torch.bfloat16, 5), sample(91, torch.float32, 6)
    momentum = poisoned(192, torch.float32)
    momentum[64:155] = state
    x, master, turned = (each.view(13, 7).t() for each in (x, master, g.clone()))
    kernels.foreach_lion_step_(
        [x], [turned], momentum, starts=[64], master=[master], beta1=0.9, beta2=0.99, impl=impl, **RATES
    )
    move("step", [wanted], [g], [state], impl="reference")
    assert_same_bits(master.t().flatten(), wanted, "master")
    assert_same_bits(x.t().flatten(), wanted.bfloat16(), "parameter")
    assert_same_bits(momentum[64:155], state, "momentum")
