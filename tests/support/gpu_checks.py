"""What is checked on a GPU, as functions of a device: on the CPU, Triton's interpreter runs the same kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from optimizers import LionCub
from samples import DTYPES, assert_same_bits, sample
from torch import Tensor, nn

from lioncub import kernels
from lioncub.kernels.layout import packed_bytes

Op = Callable[[int, torch.dtype, torch.device, str], list[Tensor]]


def _codes(n: int, device: torch.device, bits: int = 1, rows: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    shape = (rows, bits * packed_bytes(n)) if rows else (bits * packed_bytes(n),)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8, device="cpu").to(device)


def _floats(n: int, dtype: torch.dtype, device: torch.device, *, finite: bool = False) -> list[Tensor]:
    return [sample(n, dtype, seed, finite=finite).to(device) for seed in range(3)]


def _encode(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    m, g, _ = _floats(n, dtype, device)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    return [kernels.lion_encode(m, g, beta1=0.9, parity=3, nonfinite=status, impl=impl), status]


def _encode_advancing(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    m, g, _ = _floats(n, dtype, device)
    return [kernels.lion_encode_(m, g, beta1=0.9, beta2=0.99, impl=impl), m]


def _apply(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    x, g, m = _floats(n, dtype, device)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "beta2": 0.99, "impl": impl}
    kernels.lion_apply_(x, _codes(n, device), grad=g, exp_avg=m, **options)
    return [x, m]


def _apply_codes(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    x, g, m = _floats(n, dtype, device)
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "beta2": 0.99, "impl": impl}
    form = {"bits": 4, "step": 2, "offset": 5, "divisor": 5}
    kernels.lion_apply_(x, _codes(n, device, 4), grad=g, exp_avg=m, **form, **options)
    return [x, m]


def _step(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    x, g, m = _floats(n, dtype, device)
    kernels.lion_step_(x, g, m, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, impl=impl)
    return [x, m]


def _list(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    x, g, m = ([t, t[1:].clone(), t[n // 2 :]] for t in _floats(n + 1, dtype, device))
    # views of one tensor overlap: the last only takes what the first leaves
    x[0], m[0], g[0] = x[0][: n // 2], m[0][: n // 2], g[0][: n // 2]
    gate = torch.tensor([1, 1, 0], dtype=torch.int32, device=device)
    options: dict[str, Any] = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "impl": impl}
    kernels.foreach_lion_step_(x, g, m, active=gate, **options)
    return [*x, *m]


def _quantize(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    x = _floats(n, dtype, device, finite=True)[0]
    found = []
    for stochastic in (False, True):
        scale = torch.full((1,), 0.5, dtype=torch.float32, device=device)
        options: dict[str, Any] = {
            "scale": scale,
            "stochastic": stochastic,
            "seed": 1,
            "worker": 2,
            "step": 3,
            "param_id": 4,
        }
        codes, _ = kernels.quantize(x, bits=2, norm="l1", impl=impl, **options)
        found += [codes, kernels.dequantize(codes, scale, n, bits=2, norm="l1", impl=impl)]
    return found


def _packing(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    codes = kernels.pack_signs(_floats(n, dtype, device)[0], parity=1, impl=impl)
    return [codes, kernels.unpack_signs(codes, n, impl=impl)]


def _vote(n: int, dtype: torch.dtype, device: torch.device, impl: str) -> list[Tensor]:
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    ballots = _codes(n, device, rows=6)
    planes = kernels.count_votes(ballots, impl=impl)
    fields = kernels.add_codes(ballots, bits=1, field_bits=4, impl=impl)
    return [
        kernels.majority_vote(ballots, parity=1, counts=counts, impl=impl),
        counts,
        kernels.majority_of_counts(planes[None], voters=6, parity=1, impl=impl),
        kernels.majority_of_fields(fields, field_bits=4, voters=6, parity=1, impl=impl),
        kernels.ternary_of_fields(fields, field_bits=4, step=2, offset=6, largest=6, impl=impl),
        kernels.spread_codes(ballots[0], bits=1, field_bits=4, impl=impl),
    ]


OPS: dict[str, Op] = {
    "encode": _encode,
    "encode that advances": _encode_advancing,
    "apply": _apply,
    "apply codes": _apply_codes,
    "step": _step,
    "list": _list,
    "quantize": _quantize,
    "pack": _packing,
    "vote": _vote,
}


def check_op(name: str, device: torch.device, sizes: tuple[int, ...]) -> None:
    """The kernels on ``device`` give the reference's bits, for every dtype."""
    for dtype in DTYPES:
        for n in sizes:
            expected = OPS[name](n, dtype, torch.device("cpu"), "reference")
            found = OPS[name](n, dtype, device, "triton")
            for i, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert_same_bits(a.cpu(), b, f"{name}, {dtype}, {n} elements, result {i}")


def check_far_offsets(device: torch.device, n: int) -> None:
    """Elements at the end of a bf16 tensor of ``n`` elements are encoded and moved."""
    m, g = (torch.full((n,), value, dtype=torch.bfloat16, device=device) for value in (0.0, -1.0))
    g[-3:] = 1.0
    codes = kernels.lion_encode(m, g, beta1=0.9, impl="triton")
    tail = kernels.unpack_signs(codes[-packed_bytes(64) :], 64, impl="triton")[: n - (n - 1) // 64 * 64]
    assert tail[-3:].tolist() == [1.0] * 3
    assert tail[:-3].eq(-1.0).all()
    kernels.lion_apply_(m, codes, lr=0.5, weight_decay=0.0, impl="triton")
    assert m[-3:].tolist() == [-0.5] * 3
    assert int((m == 0.5).sum(dtype=torch.int64)) == n - 3


def two_optimizers(device: torch.device, impl: str) -> tuple[list[nn.Parameter], list[nn.Parameter], LionCub, LionCub]:
    """Equal parameters, an ordinary and a capturable optimizer of them, lr as a tensor on the device."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in ((33, 17), (64,), (5, 3))]
    ones, others = ([nn.Parameter(v.to(device, copy=True)) for v in values] for _ in range(2))
    lr = torch.tensor(0.01, dtype=torch.float64, device=device)
    one = LionCub(ones, lr=lr, weight_decay=0.1, impl=impl)
    return ones, others, one, LionCub(others, lr=lr, weight_decay=0.1, capturable=True, impl=impl)


def fill_gradients(params: list[nn.Parameter], step: int) -> None:
    """In place, where there is a gradient already: graphs hold its address."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.device)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)
