"""What only the Triton kernels have, run by Triton's interpreter: its conversions, generator and memory layouts.

That every op agrees with the reference is tested for all implementations together.
"""

# triton's functions are untyped
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from lioncub import kernels
from lioncub.kernels import reference, triton_gpu
from lioncub.kernels.rounding import Stream, random_words
from lioncub.kernels.triton_gpu.arithmetic import narrow, round_half_even, widen
from lioncub.kernels.triton_gpu.launch import launching_on, signed_words
from lioncub.kernels.triton_gpu.rows import element_offsets, random_rows

pytestmark = pytest.mark.skipif(not triton_gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _draw_words_kernel(out_ptr, row_start, seed_low, seed_high, step, tensor, worker):
    rows = tl.arange(0, 16).to(tl.int64) + row_start
    words = random_rows(rows, (seed_low, seed_high, step, tensor), worker)
    tl.store(out_ptr + element_offsets(rows - row_start), words.to(tl.int64))


@triton.jit
def _convert_values_kernel(x_ptr, narrow_ptr, wide_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    narrowed = narrow(tl.load(x_ptr + offsets), narrow_ptr.dtype.element_ty)
    tl.store(narrow_ptr + offsets, narrowed)
    tl.store(wide_ptr + offsets, widen(narrowed))


@triton.jit
def _round_values_kernel(x_ptr, out_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.arange(0, BLOCK_SIZE)
    tl.store(out_ptr + offsets, round_half_even(tl.load(x_ptr + offsets)))


@pytest.mark.parametrize(
    "stream",
    [Stream(0, 0, 0, 0), Stream(2**64 - 1, 2**32 - 1, 2**31, 7), Stream(0x9E3779B97F4A7C15, 3, 1, 2**31 - 1)],
)
@pytest.mark.parametrize("row_start", [0, 2**12])
def test_random_words_are_the_reference_words(stream: Stream, row_start: int) -> None:
    found = torch.full((128,), -1, dtype=torch.int64)
    _draw_words_kernel[(1,)](found, row_start, *signed_words(*stream.key, stream.step, stream.param_id, stream.worker))
    expected = random_words(stream, 8 * row_start + 128, torch.device("cpu"))[8 * row_start :]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_half_to_even(dtype: torch.dtype) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    # halves of bf16, and the places where fp16 gets subnormal and overflows
    bits[:1024] = bits[:1024] & ~0x7FFF
    bits[1024:1536] = (bits[1024:1536] & ~0x7F000000) | 0x33000000
    bits[1536:2048] &= 0x007FFFFF
    x = bits.view(torch.float32)
    found, wide = torch.empty(4096, dtype=dtype), torch.empty(4096)
    with launching_on(x.device):
        _convert_values_kernel[(1,)](x, found, wide, 4096)
    expected = x.to(dtype)
    assert torch.equal(found.isnan(), x.isnan())
    number = ~x.isnan()
    assert torch.equal(found.view(torch.int16)[number], expected.view(torch.int16)[number])
    assert torch.equal(wide.view(torch.int32)[number], expected.float().view(torch.int32)[number])


def test_rounding_to_levels_is_half_to_even() -> None:
    # quarters, so every other half is a tie
    x = torch.cat([torch.arange(-508, 509) / 4, torch.tensor([-0.0, 0.49999997, -126.49999, 1e-45])])
    x = torch.nn.functional.pad(x, (0, 2048 - len(x)))
    found = torch.empty(2048, dtype=torch.int32)
    _round_values_kernel[(1,)](x, found, 2048)
    assert torch.equal(found, x.round().to(torch.int32))


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("gap", [0, 1, 4, 24])
def test_vote_at_any_address_and_stride(first: int, gap: int) -> None:
    n_bytes = 72
    generator = torch.Generator().manual_seed(first)
    memory = torch.randint(0, 256, (6, first + n_bytes + gap), dtype=torch.uint8, generator=generator)
    packed = memory[:, first : first + n_bytes]
    for out_first in (0, 1):
        found = torch.full((n_bytes + 2,), 0xA5, dtype=torch.uint8)
        expected = torch.empty(n_bytes, dtype=torch.uint8)
        counts, expected_counts = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        triton_gpu.majority_vote(packed, 1, found[out_first : out_first + n_bytes], counts)
        reference.majority_vote(packed, 1, expected, expected_counts)
        assert torch.equal(found[out_first : out_first + n_bytes], expected)
        assert torch.equal(counts, expected_counts)
        assert found[n_bytes + 1] == 0xA5


@pytest.mark.parametrize("first", [0, 1, 2, 4])
@pytest.mark.parametrize("gap", [0, 1, 4])
def test_sums_at_any_address_and_stride(first: int, gap: int) -> None:
    generator = torch.Generator().manual_seed(first)
    for bits, field_bits in ((1, 1), (2, 4), (8, 8), (1, 16)):
        # the first row alone has all its codes, so that no sum leaves its field
        memory = torch.zeros(3, first + 72 + gap, dtype=torch.uint8)
        memory[0] = torch.randint(0, 256, (len(memory[0]),), dtype=torch.uint8, generator=generator)
        packed, n_bytes = memory[:, first : first + 72], 72 * field_bits // bits
        for out_first in (0, 1):
            found, expected = (
                torch.full((n_bytes + 2,), 0xA5, dtype=torch.uint8),
                torch.empty(n_bytes, dtype=torch.uint8),
            )
            triton_gpu.add_codes(packed, bits, field_bits, found[out_first : out_first + n_bytes])
            reference.add_codes(packed, bits, field_bits, expected)
            assert torch.equal(found[out_first : out_first + n_bytes], expected)
            assert found[n_bytes + 1] == 0xA5


def test_nothing_is_written_past_the_end() -> None:
    n, guard = 70, 16
    x, packed = torch.zeros(n + guard), torch.full((16,), 0xFF, dtype=torch.uint8)
    out = torch.full((16 + guard,), 0xA5, dtype=torch.uint8)
    m, g = torch.ones(n + guard), torch.ones(n + guard)
    how: dict[str, Any] = {"grad": g[:n], "exp_avg": m[:n], "beta2": 0.5, "weight_decay": 0.0, "impl": "triton"}
    kernels.lion_encode_(m[:n], -g[:n], beta1=0.5, beta2=0.5, out=out[:16], impl="triton")
    kernels.lion_apply_(x[:n], packed, lr=0.5, **how)
    kernels.lion_step_(x[:n], lr=0.5, beta1=0.5, **how)
    assert (out[16:] == 0xA5).all()
    assert (x[n:] == 0).all()
    assert (m[n:] == 1).all()
    assert (x[:n] == -1).all()
    codes, signs = torch.full((256,), 0xFF, dtype=torch.uint8), torch.full((16 + guard,), 0xA5, dtype=torch.uint8)
    kernels.lion_apply_(x[:n], codes, bits=16, step=1, offset=65534, lr=1.0, **how)
    triton_gpu.ternary_of_fields(codes[:64], 8, 1, 0, 255, signs[:16], None)
    assert (x[n:] == 0).all()
    assert (m[n:] == 1).all()
    assert (x[:n] == -2).all()
    assert (signs[:16] == 0xAA).all()
    assert (signs[16:] == 0xA5).all()
