"""Bits beyond tests/test_gpu.py, against the reference: lists, mixed dtypes, rounding, levels, votes, compressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from samples import assert_same_bits, sample
from torch import Tensor, nn

import lioncub
from gpu.workbench import Workbench
from lioncub import LionCub, kernels
from lioncub.kernels import Rounding, packed_bytes
from lioncub.simulate import Workers

# what a device and an implementation find, by name, which must be the same on all
Found = dict[str, list[Tensor]]
Check = Callable[[torch.device, str], Found]
_F32, _B16, _F16 = torch.float32, torch.bfloat16, torch.float16
_PAIRS = ((_B16, _F32), (_F32, _F32), (_F16, _F32), (_B16, _B16), (_F16, _F16))
_NUMELS = (0, 1, 7, 8, 64, 65, 1009, 1024, 2048 + 5, 70001)
_GATE = (1, 1, 0, 1, 1, 1, 0, 1, 1, 1)
_ROUNDINGS = (None, Rounding(seed=3, step=2**33 + 1), Rounding(seed=3, step=2**33 + 1, rank=0))
# of codes: bits, step, offset, divisor
_FORMS = ((2, 1, 1, 1), (4, 2, 5, 5), (8, 1, 100, 3), (16, 1, 3000, 1000))
_RATES: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def _codes(n: int, bits: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (bits * packed_bytes(n),), generator=generator, dtype=torch.uint8).to(device)


def _lists(
    numels: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    shift: int,
    rounding: Rounding | None,
    device: torch.device,
    impl: str,
) -> Found:
    """Each op over a list, every other tensor of which begins ``shift`` elements into its memory."""

    def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
        found = [sample(n + shift, dtype, seed + i).to(device) for i, n in enumerate(numels)]
        return [t[shift:] if i % 2 else t[: len(t) - shift] for i, t in enumerate(found)]

    def momentum() -> dict[str, Any]:
        return {"grad": tensors(dtypes[0], 50), "exp_avg": tensors(dtypes[1], 90), "beta2": 0.99, "rounding": rounding}

    x, m, g = tensors(dtypes[0], 0), tensors(dtypes[1], 90), tensors(dtypes[0], 50)
    codes = [torch.full((packed_bytes(n),), 0xA5, dtype=torch.uint8, device=device) for n in numels]
    status = torch.zeros(len(numels), dtype=torch.int32, device=device)
    kernels.foreach_lion_encode(m, g, beta1=0.9, parity=1, out=codes, nonfinite=status, grad_scale=-0.5, impl=impl)
    kernels.foreach_lion_step_(x, g, m, beta1=0.9, beta2=0.99, rounding=rounding, impl=impl, **_RATES)
    found = {"encode": [*codes, status], "step": [*x, *m]}
    y, options, gate = (
        tensors(dtypes[0], 0),
        momentum(),
        torch.tensor(_GATE[: len(numels)], dtype=torch.int32, device=device),
    )
    kernels.foreach_lion_apply_(y, codes, active=gate, impl=impl, **_RATES, **options)
    found["apply"] = [*y, *options["exp_avg"]]
    for bits, step, offset, divisor in _FORMS:
        y, options = tensors(dtypes[0], 0), momentum()
        form: dict[str, Any] = {"bits": bits, "step": step, "offset": offset, "divisor": divisor}
        levels = [_codes(n, bits, device) for n in numels]
        kernels.foreach_lion_apply_(y, levels, impl=impl, **form, **_RATES, **options)
        found[f"apply {bits} bits"] = [*y, *options["exp_avg"]]
    return found


def _votes(voters: int, offset: int, device: torch.device, impl: str) -> Found:
    """Every way to count votes, of rows that begin ``offset`` bytes into theirs."""
    packed = _codes(8 * voters * (4120 + offset), 1, device).view(voters, -1)[:, offset:]
    width, counts = kernels.field_bits(1, voters), torch.zeros(4, 2, dtype=torch.int64, device=device)
    planes = kernels.count_votes(packed, impl=impl)
    fields = kernels.add_codes(packed.contiguous(), bits=1, field_bits=width, impl=impl)
    two: dict[str, Any] = {"voters": 2 * voters, "parity": 1, "counts": counts[1], "impl": impl}
    of_fields: dict[str, Any] = {"field_bits": width, "impl": impl}
    return {
        "majority": [kernels.majority_vote(packed, parity=1, counts=counts[0], impl=impl)],
        "planes": [planes, kernels.majority_of_counts(torch.stack([planes, planes]), **two)],
        "fields": [fields, kernels.majority_of_fields(fields, voters=voters, parity=1, counts=counts[2], **of_fields)],
        "ternary": [
            kernels.ternary_of_fields(fields, step=2, offset=voters, largest=voters, counts=counts[3], **of_fields)
        ],
        "counts": [counts],
    }


def _levels(dtype: torch.dtype, bits: int, block: int | None, n: int, device: torch.device, impl: str) -> Found:
    """Levels by scales that are maxima; sums, which are added in any order, differ in their last bit."""
    x = sample(n, dtype, n, finite=True).to(device)
    form: dict[str, Any] = {"bits": bits, "norm": "linf", "block": block, "impl": impl}
    codes, scale = kernels.quantize(x, **form)
    stream: dict[str, Any] = {"seed": -(2**40) + n, "worker": 3, "step": 2**33 + 1, "param_id": 9, **form}
    random, _ = kernels.quantize(x, scale=scale, stochastic=True, **stream)
    values = kernels.dequantize(codes, scale, n, dtype=dtype, **form)
    return {"codes": [codes], "scale": [scale], "stochastic": [random], "values": [values]}


_COMPRESSIONS = {
    "signs": lioncub.SignVote(),
    "default": None,
    "mean": lioncub.SignMean(),
    "ternary": lioncub.TernaryVote(),
    "2 bits": lioncub.Quantized(bits=2, norm="linf", block=64, stochastic=True),
    "4 bits": lioncub.Quantized(bits=4, norm="linf"),
    "8 bits": lioncub.Quantized(bits=8, norm="linf", block=64),
}


def _train(workers: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device, impl: str) -> Found:
    """Three steps of simulated workers: parameters and momentum of each."""

    def job(rank: int, group: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = ((64, 48), (48,), (33, 17), (5,), (1000, 16))
        params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype).to(device)) for s in shapes]
        opt = LionCub(params, **_RATES, process_group=group, impl=impl, **options)
        for step in range(3):
            generator = torch.Generator().manual_seed(100 * step + rank)
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(dtype).to(device)
            opt.step()
        return [tensor.detach().clone() for p in params for tensor in (p, opt.state[p]["exp_avg"])]

    if workers == 1:
        return {"rank 0": job(0, None)}
    with Workers(workers) as crowd:
        return {f"rank {rank}": found for rank, found in enumerate(crowd.run(job))}


def _checks(is_dry: bool) -> Iterator[tuple[str, Check]]:
    """All checks; in a dry run the first of each family, of few elements."""
    some, numels = slice(1 if is_dry else None), _NUMELS[: 6 if is_dry else None]
    for dtypes, shift, rounding in list(product(_PAIRS, (1, 0), _ROUNDINGS))[some]:
        way = "nearest" if rounding is None else f"stochastic, rank {rounding.rank}"
        yield f"lists {dtypes[0]} {dtypes[1]} shift {shift} {way}", partial(_lists, numels, dtypes, shift, rounding)
    for voters, offset in list(product((2, 1, 3, 7, 8, 31, 64, 255), (72, 0, 1, 4)))[some]:
        yield f"votes of {voters} offset {offset}", partial(_votes, voters, offset)
    for form in list(product((_F32, _B16, _F16), (2, 4, 8), (64, None, 8, 256, 4096), (1009, 7, 70001)))[some]:
        yield f"levels of (dtype, bits, block, elements) {form}", partial(_levels, *form)
    for (name, compression), workers, dtype in list(product(_COMPRESSIONS.items(), (2, 1, 5), (_F32, _B16)))[some]:
        options = {"compression": compression}
        yield f"LionCub {name}, {workers} workers, {dtype}", partial(_train, workers, dtype, options)
    votes: tuple[dict[str, Any], ...] = (
        *({"comm": lioncub.Comm(algorithm=a, bucket_mb=2e-3)} for a in ("all_gather", "reduce_scatter", "all_reduce")),
        {"precision": lioncub.Precision(param_rounding="stochastic")},
        {"precision": lioncub.Precision(master_weights=True)},
        {"precision": lioncub.Precision(momentum_dtype=_B16, param_rounding="stochastic")},
    )
    for options in votes[: 0 if is_dry else None]:
        train = partial(_train, 4, _B16, {"compression": lioncub.SignVote(), **options})
        yield f"LionCub {options}", train


def run(bench: Workbench) -> None:
    """A row for each check."""
    for name, check in _checks(bench.is_dry):
        bench.attempt(name, partial(_compare, check, bench.device))


def _compare(check: Check, device: torch.device) -> None:
    got, expected = check(device, "triton"), check(torch.device("cpu"), "reference")
    for name, tensors in expected.items():
        for i, (one, other) in enumerate(zip(got[name], tensors, strict=True)):
            assert_same_bits(one.cpu(), other, f"{name}, result {i}")
