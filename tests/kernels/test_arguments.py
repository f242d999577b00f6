"""Every public kernel with one argument wrong: ValueError or TypeError that names it, and not a byte is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from samples import sample
from torch import Tensor

from lioncub import kernels
from lioncub.kernels import Rounding
from lioncub.kernels.checks import is_dense
from lioncub.kernels.quantization import foreach_lion_scale

ALL_IMPLS = ("reference", "cpu", "triton")
N = 70
Arguments = dict[str, Any]


def _floats(seed: int, n: int = N) -> Tensor:
    return sample(n, torch.float32, seed, finite=True)


def _lists(seed: int) -> list[Tensor]:
    return [_floats(seed + i, n) for i, n in enumerate((N, 0, 9))]


def _bytes(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.uint8).view(shape)


def _code_lists(bits: int = 1) -> list[Tensor]:
    return [_bytes(bits * n) for n in (16, 0, 8)]


def _ints(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.int32)


RATES = {"lr": 0.1, "weight_decay": 0.1}
MOVE = {"grad": _floats(1), "exp_avg": _floats(2), "beta2": 0.9, "rounding": Rounding(1, 2), "param_id": 3}
MOVES = {"grad": _lists(1), "exp_avg": _lists(2), "beta2": 0.9, "grad_scale": 1.0, "active": _ints(3) + 1}
MOVES |= {"rounding": Rounding(1, 2), "param_ids": [1, 2, 3]}
CODES = {"bits": 2, "step": 1, "offset": 1, "divisor": 1}
LEVELS = {"bits": 2, "norm": "l1", "block": 64, "stochastic": True, "seed": 1, "worker": 2, "step": 3}
COUNTS = torch.zeros(2, dtype=torch.int64)
FLAT = {"exp_avg": _floats(2, 201), "starts": [0, 128, 192], "grad": _lists(1), "grad_scale": 1.0}
MOVED_FLAT = {**FLAT, "param": _lists(0), "active": _ints(3) + 1}


def flat_encode(**arguments: Any) -> None:
    kernels.foreach_lion_encode(**arguments)


def flat_apply_(**arguments: Any) -> None:
    kernels.foreach_lion_apply_(**arguments)


def flat_step_(**arguments: Any) -> None:
    kernels.foreach_lion_step_(**arguments)


def flat_quantize(**arguments: Any) -> None:
    kernels.foreach_lion_quantize(**arguments)


FLAT_CALLS = (flat_encode, flat_apply_, flat_step_, flat_quantize)

# fine arguments of every function: each is copied before it is used
CALLS: dict[Callable[..., Any], Arguments] = {
    kernels.pack_signs: {"x": _floats(0), "parity": 1},
    kernels.unpack_signs: {"packed": _bytes(16), "n": N, "dtype": torch.float32},
    kernels.lion_encode: {
        "exp_avg": _floats(2),
        "grad": _floats(1),
        "beta1": 0.9,
        "parity": 1,
        "out": _bytes(16),
        "nonfinite": _ints(1),
    },
    kernels.lion_encode_: {
        "exp_avg": _floats(2),
        "grad": _floats(1),
        "beta1": 0.9,
        "beta2": 0.9,
        "parity": 1,
        "out": _bytes(16),
        "nonfinite": _ints(1),
    },
    kernels.lion_apply_: {"param": _floats(0), "packed": _bytes(32), **CODES, **RATES, **MOVE, "grad_scale": 1.0},
    kernels.lion_step_: {
        "param": _floats(0),
        "grad": _floats(1),
        "exp_avg": _floats(2),
        **RATES,
        "beta1": 0.9,
        "beta2": 0.9,
        "rounding": Rounding(1, 2),
        "param_id": 3,
    },
    kernels.lion_ema: {"exp_avg": _floats(2), "grad": _floats(1), "beta": 0.9, "grad_scale": 1.0},
    kernels.foreach_lion_encode: {
        "exp_avg": _lists(2),
        "grad": _lists(1),
        "beta1": 0.9,
        "parity": 1,
        "out": _code_lists(),
        "nonfinite": _ints(3),
        "grad_scale": 1.0,
    },
    kernels.foreach_lion_apply_: {"param": _lists(0), "packed": _code_lists(2), **CODES, **RATES, **MOVES},
    kernels.foreach_lion_step_: {"param": _lists(0), **RATES, "beta1": 0.9, **MOVES},
    kernels.foreach_lion_quantize: {
        "exp_avg": _lists(2),
        "grad": _lists(1),
        "beta1": 0.9,
        **LEVELS,
        "scale": [torch.ones(2), torch.ones(1), torch.ones(1)],
        "param_ids": [1, 2, 3],
        "out": [_bytes(24), _bytes(0), _bytes(8)],
        "nonfinite": _ints(3),
        "grad_scale": 1.0,
    },
    foreach_lion_scale: {"exp_avg": _lists(2), "grad": _lists(1), "beta1": 0.9, "norm": "l1", "block": 64},
    flat_encode: {**FLAT, "beta1": 0.9, "parity": 1, "out": _bytes(32), "nonfinite": _ints(3)},
    flat_apply_: {**MOVED_FLAT, "packed": _bytes(64), **CODES, **RATES, "beta2": 0.9},
    flat_step_: {**MOVED_FLAT, **RATES, "beta1": 0.9, "beta2": 0.9},
    flat_quantize: {**FLAT, "beta1": 0.9, **LEVELS, "scale": torch.ones(9), "out": _bytes(56), "nonfinite": _ints(3)},
    kernels.quantize: {"x": _floats(0), **LEVELS, "scale": torch.ones(2), "param_id": 4, "out": _bytes(24)},
    kernels.lion_quantize: {
        "exp_avg": _floats(2),
        "grad": _floats(1),
        "beta1": 0.9,
        **LEVELS,
        "scale": torch.ones(2),
        "param_id": 4,
        "out": _bytes(24),
        "nonfinite": _ints(1),
    },
    kernels.dequantize: {
        "packed": _bytes(24),
        "scale": torch.ones(2),
        "n": N,
        "bits": 2,
        "norm": "l1",
        "block": 64,
        "out": torch.zeros(N),
    },
    kernels.majority_vote: {"packed": _bytes(3, 16), "parity": 1, "out": _bytes(16), "counts": COUNTS},
    kernels.count_votes: {"packed": _bytes(3, 16), "out": _bytes(2, 16)},
    kernels.majority_of_counts: {
        "planes": _bytes(2, 2, 16),
        "voters": 5,
        "parity": 1,
        "out": _bytes(16),
        "counts": COUNTS,
    },
    kernels.spread_codes: {"packed": _bytes(16), "bits": 1, "field_bits": 4, "out": _bytes(64)},
    kernels.majority_of_fields: {
        "fields": _bytes(64),
        "field_bits": 4,
        "voters": 3,
        "parity": 1,
        "out": _bytes(16),
        "counts": COUNTS,
    },
    kernels.add_codes: {"packed": _bytes(3, 16), "bits": 1, "field_bits": 4, "out": _bytes(64)},
    kernels.ternary_of_fields: {
        "fields": _bytes(32),
        "field_bits": 4,
        "step": 2,
        "offset": 3,
        "largest": 3,
        "out": _bytes(16),
        "counts": COUNTS,
    },
}

WRONG_NUMBERS: dict[str, tuple[Any, ...]] = {
    "lr": (1e39, -1.0, math.inf, math.nan, "0.1", True, torch.zeros(2)),
    "weight_decay": (1e39, -1.0, math.nan, "0.1", torch.zeros((), device="meta")),
    **{name: (1.5, -0.1, math.nan, "0.9", torch.zeros(1)) for name in ("beta", "beta1", "beta2")},
    "grad_scale": (1e39, -1e39, math.nan, "1", torch.zeros(1)),
    "parity": (0.5, "1", 2**64, torch.zeros(1, dtype=torch.int64)),
    **dict.fromkeys(("seed", "worker", "param_id", "largest"), (0.5, "1", None)),
    "step": (0.5, "1"),
    "offset": (0.5, "1", 2**40),
    "divisor": (0, 0.5, "1"),
    "voters": (0, 0.5, "1", 2**40),
    "n": (-1, 0.5, "70", 10**6),
    "bits": (0, 3, 2.0, True, "2"),
    "field_bits": (0, 3, 4.0, True, "4"),
    "norm": ("l3", None, ["l1"]),
    "stochastic": ("yes", 1),
    "block": (0, 48, 64.0, "64"),
    "rounding": (1, "stochastic"),
    "param_ids": ([1], [1, 2, "3"], [1, 2, 3, 4]),
    "starts": ([0, 128], [0, 64, 128], [0, 100, 192], [-64, 128, 192], [0, 128, 1 << 40], [0, 128, "192"]),
    "dtype": (torch.float64, torch.int8),
}
# several arguments share one random stream or one form, whose error names them all


def _wrong_tensors(right: Tensor, is_flat_buffer: bool) -> Iterator[tuple[str, Any]]:
    yield "another dtype", right.to(torch.int16)
    yield "complex", right.to(torch.complex64)
    yield "no data", right.to("meta")
    yield "a list", right.tolist()
    yield "sparse", right.to_sparse()
    yield "short", right[..., :-1].contiguous()
    if not is_flat_buffer:
        yield "long", torch.cat([right, right[..., -1:]], dim=-1)
    if right.numel() > 1:
        yield "apart", torch.stack([right, right], dim=-1)[..., 0]
    yield "of one axis more", right[None]


def _wrong_lists(right: list[Tensor]) -> Iterator[tuple[str, Any]]:
    yield "a tensor", right[0]
    yield "fewer", right[:-1]
    yield "more", [*right, right[-1]]
    for kind, wrong in _wrong_tensors(right[-1], is_flat_buffer=False):
        yield f"last {kind}", [*right[:-1], wrong]


def _wrong_values(call: Callable[..., Any], name: str, right: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(right, list) and isinstance(right[0], Tensor):
        yield from _wrong_lists(right)
    elif isinstance(right, Tensor):
        yield from _wrong_tensors(right, is_flat_buffer=call in FLAT_CALLS)
    else:
        for wrong in WRONG_NUMBERS[name]:
            yield repr(wrong), wrong


# what is no fault: a dtype or a stride that the function allows
ALLOWED: set[tuple[Callable[..., Any], str, str]] = {
    # as many bytes and blocks hold a few elements more or less
    *((call, "x", kind) for call in (kernels.pack_signs, kernels.quantize) for kind in ("short", "long")),
    *((call, "x", "of one axis more") for call in (kernels.pack_signs, kernels.quantize)),
    # the others may be in storage order, whatever the shape of the first
    *(
        (call, "param" if "param" in arguments else "grad", kind)
        for call, arguments in CALLS.items()
        for kind in ("of one axis more", "last of one axis more")
        if call is not kernels.lion_ema
    ),
    # where nothing but its place in the buffer is known of a gradient
    *((call, "grad", f"last {kind}") for call in (flat_encode, flat_quantize) for kind in ("short", "long")),
}
SIZES = ("starts", "param", "grad", "packed", "planes")


def _is_allowed(call: Callable[..., Any], name: str, kind: str) -> bool:
    return (call, name, kind) in ALLOWED


def _bits_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return bytes(value.contiguous().view(-1).view(torch.uint8).numpy()) if value.numel() else b""
    return [_bits_of(item) for item in value] if isinstance(value, list) else None


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _raises(what: str) -> Iterator[pytest.ExceptionInfo[Exception]]:
    try:
        with pytest.raises((ValueError, TypeError)) as raised:
            yield raised
    except pytest.fail.Exception:
        pytest.fail(f"{what}: nothing was raised")


def _refused(call: Callable[..., Any], arguments: Arguments, name: str, impl: str, what: str) -> None:
    fine = {key: value for key, value in arguments.items() if key != name}
    before = _bits_of(list(fine.values()))
    with _raises(f"{call.__name__}, {name} {what}") as raised:
        call(**arguments, impl=impl) if call is not kernels.lion_ema else call(**arguments)
    # what sizes depend on may be right where another argument does not fit it
    named = arguments if name in SIZES else (name,)
    assert any(each in str(raised.value) for each in named), f"{call.__name__}, {name} {what}: {raised.value}"
    assert _bits_of(list(fine.values())) == before, f"{call.__name__}, {name} {what}: something was written"


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_one_wrong_argument_is_named_and_nothing_is_written(call: Callable[..., Any], impl: str) -> None:
    for name, right in CALLS[call].items():
        for kind, wrong in _wrong_values(call, name, right):
            if _is_allowed(call, name, kind):
                continue
            arguments = _copy(list(CALLS[call].values()))
            _refused(call, dict(zip(CALLS[call], arguments, strict=True)) | {name: wrong}, name, impl, kind)
    if call is not kernels.lion_ema:
        with pytest.raises(ValueError, match="impl: expected one of"):
            call(**CALLS[call], impl="metal")


def _over(buffer: Tensor, like: Tensor, start: int) -> Tensor:
    """A tensor like another one, from byte ``start`` of ``buffer`` on."""
    n_bytes = like.numel() * like.element_size()
    return buffer[start : start + n_bytes].view(like.dtype).view(like.shape).copy_(like)


WRITTEN = ("out", "counts", "param", "exp_avg")
READ_ONLY = {
    "exp_avg": (kernels.lion_encode, kernels.lion_quantize, kernels.foreach_lion_encode, kernels.foreach_lion_quantize)
}


@pytest.mark.parametrize("impl", ALL_IMPLS)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_memory_that_is_written_must_be_apart(call: Callable[..., Any], impl: str) -> None:
    if call in (kernels.lion_ema, kernels.pack_signs, kernels.unpack_signs, foreach_lion_scale):
        pytest.skip("writes what it allocates")
    tensors = {name: value for name, value in CALLS[call].items() if isinstance(value, Tensor) and value.dim()}
    is_list = any(isinstance(value, list) and isinstance(value[0], Tensor) for value in CALLS[call].values())
    if is_list:
        tensors = {
            name: value[0] for name, value in CALLS[call].items() if isinstance(value, list) and name != "starts"
        }
        tensors = {name: value for name, value in tensors.items() if isinstance(value, Tensor)}
    for name, written in tensors.items():
        if name not in WRITTEN or call in READ_ONLY.get(name, ()):
            continue
        for other, read in tensors.items():
            if other in (name, "active", "nonfinite", "counts"):
                continue
            # by a word, and by none: in one order of the threads or another, each is wrong somewhere
            for shift in (0, min(8, read.numel() * read.element_size() // 2)):
                buffer = torch.zeros(4096, dtype=torch.uint8)
                arguments = dict(zip(CALLS[call], _copy(list(CALLS[call].values())), strict=True))
                for key, value in ((other, _over(buffer, read, 0)), (name, _over(buffer, written, shift))):
                    arguments[key] = [value, *arguments[key][1:]] if is_list else value
                before = bytes(buffer.numpy())
                with pytest.raises(ValueError, match="expected memory apart") as raised:
                    call(**arguments, impl=impl)
                assert name in str(raised.value)
                assert other in str(raised.value)
                assert bytes(buffer.numpy()) == before


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_rows_may_have_what_is_written_between_them(impl: str) -> None:
    message = torch.zeros(3, 32, dtype=torch.uint8)
    packed, out = message[:, :16].copy_(_bytes(3, 16)), message[1, 16:]
    expected = kernels.majority_vote(packed.clone(), impl="reference")
    assert kernels.majority_vote(packed, out=out, impl=impl).equal(expected)
    with pytest.raises(ValueError, match="out: expected memory apart from that of packed"):
        kernels.majority_vote(packed, out=message[1, 8:24], impl=impl)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_a_tensor_cannot_be_twice_in_a_list_that_is_written(impl: str) -> None:
    x, g, m = _floats(0), _floats(1), [_floats(2), _floats(3)]
    with pytest.raises(ValueError, match=r"param\[\d\]: expected memory apart from that of param\[\d\]"):
        kernels.foreach_lion_step_([x, x], [g, g], m, beta1=0.9, beta2=0.9, **RATES, impl=impl)
    # what is only read may be shared
    kernels.foreach_lion_step_([x, x.clone()], [g, g], m, beta1=0.9, beta2=0.9, **RATES, impl=impl)


@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_rates_whose_product_is_infinite_are_refused(impl: str) -> None:
    x = _floats(0)
    with pytest.raises(ValueError, match="lr, weight_decay: expected a finite product"):
        kernels.lion_apply_(x, _bytes(16), lr=1e30, weight_decay=1e30, impl=impl)
    assert x.equal(_floats(0))


@pytest.mark.parametrize("shape", [(0,), (5, 0), (0, 5), (3, 0, 2)])
@pytest.mark.parametrize("impl", ALL_IMPLS)
def test_tensors_without_elements_are_all_alike(shape: tuple[int, ...], impl: str) -> None:
    x = torch.zeros(shape)
    assert is_dense(x.shape, x.stride())
    assert is_dense(x.shape, (7,) * len(shape))
    assert kernels.pack_signs(x, impl=impl).numel() == 0
    kernels.lion_step_(x, x.clone(), x.clone(), beta1=0.9, beta2=0.9, **RATES, impl=impl)
    codes, scale = kernels.quantize(x, impl=impl)
    assert (codes.numel(), scale.tolist()) == (0, [0.0])
