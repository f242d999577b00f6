"""Error texts: argument, expected, got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lioncub import kernels as k
from lioncub.kernels import Rounding


def _bytes(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


V, T = ValueError, TypeError
FOUR = torch.zeros(4)
WIDTHS = r"expected one of \(1, 2, 4, 8, 16\), got 3"
NO_DATA = "expected (a tensor|tensors) with data, got one on the meta device"
LISTS: dict[str, Any] = {"param": [torch.ones(3)], "grad": [torch.ones(3)], "exp_avg": [torch.zeros(3)]}
MOVE: dict[str, Any] = {"grad": FOUR, "exp_avg": FOUR.clone(), "beta2": 0.99}
FORM = {"bits": 2, "step": 1, "offset": 1}
STREAM = {"rounding": Rounding()}
HALF = {"param": [torch.ones(3, dtype=torch.float16)]}
# fine arguments
CALLS: dict[Callable[..., Any], dict[str, Any]] = {
    k.packed_bytes: {"n": 9},
    k.counter_planes: {"n": 9},
    k.field_bits: {"largest_code": 1, "workers": 3},
    Rounding: {},
    k.pack_signs: {"x": torch.zeros(9)},
    k.unpack_signs: {"packed": _bytes(8), "n": 9},
    k.lion_encode: {"exp_avg": FOUR, "grad": FOUR, "beta1": 0.9},
    k.lion_apply_: {"param": FOUR, "packed": _bytes(16), **FORM, "lr": 0.1, "weight_decay": 0},
    k.lion_ema: {"exp_avg": FOUR, "grad": FOUR, "beta": 0.9},
    k.foreach_lion_step_: {**LISTS, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0},
    k.quantize: {"x": torch.zeros(9)},
    k.lion_quantize: {"exp_avg": FOUR, "grad": FOUR, "beta1": 0.9},
    k.majority_vote: {"packed": _bytes(2, 8)},
    k.count_votes: {"packed": _bytes(4, 8)},
    k.majority_of_counts: {"planes": _bytes(2, 3, 8), "voters": 4},
    k.spread_codes: {"packed": _bytes(8), "bits": 1, "field_bits": 2},
    k.majority_of_fields: {"fields": _bytes(8), "field_bits": 4, "voters": 3},
    k.add_codes: {"packed": _bytes(2, 8), "bits": 1, "field_bits": 2},
    k.ternary_of_fields: {"fields": _bytes(16), "field_bits": 4, "largest": 3},
}
WRONG: list[tuple[Callable[..., Any], dict[str, Any], type[Exception], str]] = [
    (k.packed_bytes, {"n": -1}, V, "n: expected a count >= 0, got -1"),
    (k.counter_planes, {"n": -1}, V, "n: expected a count >= 0, got -1"),
    (k.field_bits, {"largest_code": -1}, V, "largest_code: expected a number >= 0, got -1"),
    (k.field_bits, {"workers": 0}, V, "workers: expected a count >= 1, got 0"),
    (k.field_bits, {"explicit": 3}, V, f"field_bits: {WIDTHS}"),
    (k.field_bits, {"largest_code": 254, "workers": 259}, V, r"field_bits: no field .* below 2\^16, got 259 workers"),
    (k.field_bits, {"workers": 65536, "explicit": 16}, V, "field_bits: no field is wide enough.*65536 in all"),
    (Rounding, {"rank": -1}, V, r"rank: expected None or a rank in 0 .. 2\^31 - 1, got -1"),
    (k.pack_signs, {"x": torch.zeros(9, dtype=torch.float64)}, T, "x: expected dtype .*, got torch.float64"),
    (k.pack_signs, {"x": torch.zeros(9)[::2]}, V, "x: expected a dense tensor without gaps"),
    (k.pack_signs, {"impl": "metal"}, V, "impl: expected one of .*, got 'metal'"),
    (k.unpack_signs, {"n": 65}, V, r"packed: .* shape \(16,\), got shape \(8,\)"),
    (k.lion_encode, {"exp_avg": torch.zeros(3)}, V, r"exp_avg: expected shape \(4,\)"),
    (k.lion_encode, {"beta1": 1.5}, V, r"beta1: expected a number in \[0, 1\], got 1.5"),
    (k.lion_apply_, {"param": torch.zeros(4, dtype=torch.float64)}, T, "param: expected dtype .*, got torch.float64"),
    (k.lion_apply_, {"param": torch.zeros(8)[::2]}, V, "param: expected a dense tensor without gaps"),
    (k.lion_apply_, {"bits": 3}, V, f"bits: {WIDTHS}"),
    (k.lion_apply_, {"step": 0}, V, "step: expected an integer >= 1, got 0"),
    (k.lion_apply_, {"step": 1.0}, V, "step: expected an integer >= 1, got 1.0"),
    (k.lion_apply_, {"offset": -1}, V, "offset: expected an integer >= 0, got -1"),
    (k.lion_apply_, {"offset": True}, V, "offset: expected an integer >= 0, got True"),
    (k.lion_apply_, {"divisor": 0}, V, "divisor: expected an integer >= 1, got 0"),
    (k.lion_apply_, {"step": 2**24}, V, r"step, offset: .* within 2\^24, got 16777216 and 1"),
    (k.lion_apply_, {"offset": 2**24 + 1}, V, r"step, offset: .* within 2\^24, got 1 and 16777217"),
    (k.lion_apply_, {"packed": torch.zeros(16)}, T, "packed: expected a uint8 tensor, got torch.float32"),
    (k.lion_apply_, {"packed": _bytes(8)}, V, r"packed: .* shape \(16,\), got shape \(8,\)"),
    (k.lion_apply_, {"packed": _bytes(16).to("meta")}, V, f"packed: {NO_DATA}"),
    (k.lion_apply_, {"grad": FOUR}, V, "grad, exp_avg, beta2: expected all or none, got grad$"),
    (k.lion_apply_, {**MOVE, "grad": None}, V, "grad, exp_avg, beta2: expected all or none, got exp_avg, beta2$"),
    (k.lion_apply_, {**MOVE, "grad": torch.zeros(5)}, V, r"grad: expected shape \(4,\)"),
    (k.lion_apply_, {**MOVE, "grad": _bytes(4)}, T, "grad: expected dtype .*, got torch.uint8"),
    (k.lion_apply_, {**MOVE, "beta2": 1.5}, V, r"beta2: expected a number in \[0, 1\], got 1.5"),
    (k.lion_apply_, {**MOVE, "grad_scale": float("inf")}, V, r"grad_scale: expected a number in \[-3.4.*\], got inf"),
    (k.lion_apply_, {"lr": -0.1}, V, r"lr: expected a number in \[0, 3.4028235e\+38\], got -0.1"),
    (k.lion_apply_, {"weight_decay": -1}, V, r"weight_decay: expected a number in \[0, .*\], got -1"),
    (k.lion_apply_, {"lr": "1"}, T, "lr: expected a number or a 0-dim tensor, got str"),
    (k.lion_apply_, {"lr": torch.zeros(2)}, V, r"lr: expected a number or a 0-dim tensor, got shape \(2,\)"),
    (k.lion_apply_, {"lr": 1e20, "weight_decay": 1e20}, V, "lr, weight_decay: expected a finite product in float32"),
    (k.lion_apply_, {"impl": "metal"}, V, "impl: .* got 'metal'"),
    (k.lion_ema, {"grad": torch.zeros(5)}, V, r"exp_avg: expected shape \(5,\)"),
    (k.lion_ema, {"beta": -1.0}, V, r"beta: expected a number in \[0, 1\], got -1.0"),
    (k.foreach_lion_step_, {"grad": []}, V, "grad: expected 1 tensors, one for each of param, got 0"),
    (k.foreach_lion_step_, {"rounding": "stochastic"}, T, r"rounding: expected None or Rounding\(...\), got str"),
    (k.foreach_lion_step_, {"rounding": Rounding(), "param_ids": [1, 2]}, V, "param_ids: expected 1 numbers, .* got 2"),
    (k.foreach_lion_step_, {**STREAM, "stream_starts": [4, 4]}, V, "stream_starts: expected 1 numbers, .* got 2"),
    (k.foreach_lion_step_, {**STREAM, "stream_starts": [6]}, V, r"stream_starts\[0\]: expected a multiple of 4, got 6"),
    (k.foreach_lion_step_, {**STREAM, "stream_starts": [4.0]}, T, r"stream_starts\[0\]: .* integer, got float"),
    (k.foreach_lion_step_, {**STREAM, "stream_starts": [-4]}, V, r"stream_starts\[0\]: .* in 0 .. 17179869181, got -4"),
    (k.foreach_lion_step_, {**STREAM, "stream_starts": [2**34]}, V, r"stream_starts\[0\]: .* got 17179869184"),
    (k.foreach_lion_step_, {**HALF, "master": FOUR}, T, "master: expected a list of tensors, got Tensor"),
    (
        k.foreach_lion_step_,
        {**HALF, "master": [torch.ones(3).half()]},
        T,
        "master: expected a float32 tensor, got torch.float16",
    ),
    (
        k.foreach_lion_step_,
        {**HALF, "master": [torch.ones(5)]},
        V,
        r"master: expected shape \(3,\) \(bf16 or fp16 param",
    ),
    (
        k.foreach_lion_step_,
        {**HALF, "master": []},
        V,
        "master: expected a tensor for each bf16 or fp16 param, got none",
    ),
    (k.foreach_lion_step_, {"master": [torch.ones(3)]}, V, "master: expected 0 tensors, .* bf16 or fp16 param, got 1"),
    (k.foreach_lion_step_, {**HALF, "master": LISTS["grad"]}, V, "master: expected memory apart from that of grad"),
    (k.foreach_lion_step_, {**HALF, "master": [FOUR], **STREAM}, V, "rounding: expected None with master, .* got Roun"),
    (k.foreach_lion_step_, {"active": torch.ones(1, dtype=torch.int64)}, T, "active: expected a int32 .*torch.int64"),
    (k.foreach_lion_step_, {"active": torch.ones(2, dtype=torch.int32)}, V, r"active: .* \(1,\), got shape \(2,\)"),
    (k.quantize, {"bits": 3}, V, r"bits: expected one of \(2, 4, 8\), got 3"),
    (k.quantize, {"norm": "l0"}, V, "norm: expected one of .*, got 'l0'"),
    (k.quantize, {"block": 48}, V, "block: expected a power of two or None, got 48"),
    (k.quantize, {"block": 64.0}, V, "block: expected a power of two or None, got 64.0"),
    (k.quantize, {"scale": 0.5}, T, "scale: expected a torch.Tensor, got float"),
    (k.lion_quantize, {"grad_scale": float("nan")}, V, "grad_scale: expected a number in .*, got nan"),
    (k.majority_vote, {"counts": torch.zeros(2, 2, dtype=torch.int64)[:, 0]}, V, "counts: expected a contiguous"),
    (k.majority_vote, {"packed": _bytes(0, 8)}, V, r"packed: expected shape \[N, B\] with N >= 1, got \(0, 8\)"),
    (k.majority_vote, {"packed": torch.zeros(2, 8)}, T, "packed: expected a uint8 tensor, got torch.float32"),
    (k.count_votes, {"packed": torch.zeros(2, 8)}, T, "packed: expected a uint8 tensor, got torch.float32"),
    (k.count_votes, {"packed": _bytes(0, 8)}, V, r"packed: expected shape \[N, B\] with N >= 1, got \(0, 8\)"),
    (k.count_votes, {"packed": _bytes(8, 2).T}, V, "packed: expected rows of adjacent bytes"),
    (k.count_votes, {"out": _bytes(2, 8)}, V, r"out: expected shape \(3, 8\), got \(2, 8\)"),
    (k.count_votes, {"out": _bytes(1, 8).expand(3, 8)}, V, "out: expected rows that do not overlap"),
    (k.count_votes, {"impl": "metal"}, V, "impl: expected one of .*, got 'metal'"),
    (k.majority_of_counts, {"planes": _bytes(3, 8)}, V, r"planes: expected shape \[G, P, B\] with G, P >= 1"),
    (k.majority_of_counts, {"voters": 0}, V, "voters: expected 1 to 14 .*, got 0"),
    (k.majority_of_counts, {"voters": 15}, V, "voters: expected 1 to 14 .*, got 15"),
    (k.majority_of_counts, {"planes": _bytes(1, 30, 8), "voters": 2**20 + 1}, V, "voters: expected 1 to 1048576"),
    (k.majority_of_counts, {"planes": _bytes(2, 31, 8)}, V, r"planes: expected counts whose sum is below 2\^31"),
    (k.majority_of_counts, {"out": _bytes(9)}, V, r"out: .* shape \(8,\), got shape \(9,\)"),
    (k.majority_of_counts, {"counts": torch.zeros(2)}, T, "counts: expected a int64 tensor, got torch.float32"),
    (k.spread_codes, {"bits": 3, "field_bits": 4}, V, r"bits: expected one of \(1, 2, 4, 8\), got 3"),
    (k.spread_codes, {"bits": 4}, V, "field_bits: expected at least bits, 4, got 2"),
    (k.spread_codes, {"packed": _bytes(9)}, V, "packed: expected a multiple of 8 bytes, got 9"),
    (k.spread_codes, {"packed": torch.zeros(8)}, T, "packed: expected a uint8 tensor"),
    (k.spread_codes, {"out": _bytes(8)}, V, r"out: .* shape \(16,\), got shape \(8,\)"),
    (k.majority_of_fields, {"voters": 16}, V, "voters: expected 1 to 15 for fields of 4 bits, got 16"),
    (k.majority_of_fields, {"fields": _bytes(9)}, V, "fields: expected a multiple of 4 bytes, got 9"),
    (k.majority_of_fields, {"counts": _bytes(2)}, T, "counts: expected a int64 tensor, got torch.uint8"),
    (k.add_codes, {"bits": 3, "field_bits": 4}, V, f"bits: {WIDTHS}"),
    (k.add_codes, {"field_bits": 3}, V, f"field_bits: {WIDTHS}"),
    (k.add_codes, {"bits": 4}, V, "field_bits: expected at least bits, 4, got 2"),
    (k.add_codes, {"packed": torch.zeros(2, 8)}, T, "packed: expected a uint8 tensor, got torch.float32"),
    (k.add_codes, {"packed": [1]}, T, "packed: expected a uint8 tensor, got list"),
    (k.add_codes, {"packed": _bytes(0, 8)}, V, r"packed: expected shape \[G, B\] with G >= 1, got \(0, 8\)"),
    (k.add_codes, {"packed": _bytes(8)}, V, r"packed: expected shape \[G, B\] with G >= 1, got \(8,\)"),
    (k.add_codes, {"packed": _bytes(8, 2).t()}, V, r"packed: expected rows of adjacent bytes, got strides \(1, 2\)"),
    (k.add_codes, {"packed": _bytes(2, 12)}, V, "packed: expected rows of a multiple of 8 bytes, got 12"),
    (k.add_codes, {"out": _bytes(8)}, V, r"out: expected a contiguous uint8 tensor of shape \(16,\), got shape \(8,\)"),
    (k.add_codes, {"out": torch.zeros(16)}, T, "out: expected a uint8 tensor, got torch.float32"),
    (k.add_codes, {"out": _bytes(16).to("meta")}, V, f"out: {NO_DATA}"),
    (k.ternary_of_fields, {"field_bits": 3}, V, f"field_bits: {WIDTHS}"),
    (k.ternary_of_fields, {"step": 0}, V, "step, offset: expected step >= 1, .*, got 0 and 0"),
    (k.ternary_of_fields, {"offset": -1}, V, "step, offset: .* offset >= 0 .*, got 1 and -1"),
    (k.ternary_of_fields, {"step": 2**28}, V, "step, offset: .* within int32, got 268435456 and 0"),
    (k.ternary_of_fields, {"fields": torch.zeros(16)}, T, "fields: expected a uint8 tensor, got torch.float32"),
    (k.ternary_of_fields, {"fields": _bytes(32)[::2]}, V, r"fields: expected a contiguous .* strides \(2,\)"),
    (
        k.ternary_of_fields,
        {"fields": _bytes(24)},
        V,
        "fields: .* a multiple of 32 fields of 4 bits, got 24 bytes",
    ),
    (k.ternary_of_fields, {"fields": _bytes(3), "field_bits": 16}, V, "fields: .* 32 fields of 16 bits, got 3 bytes"),
    (k.ternary_of_fields, {"out": _bytes(16)}, V, r"out: .* shape \(8,\), got shape \(16,\)"),
    (k.ternary_of_fields, {"counts": torch.zeros(3, dtype=torch.int64)}, V, r"counts: .* \(2,\), got shape \(3,\)"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_bad_arguments_are_named(call: Callable[..., Any]) -> None:
    call(**CALLS[call])
    for function, changes, error, message in WRONG:
        if function is call:
            with pytest.raises(error, match=f"^{message}"):
                call(**(CALLS[call] | changes))
