"""bf16 and fp16 conversions of the Numba kernels: every pattern read, every rounding case written, against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from lioncub.kernels.numba_cpu.arithmetic import is_finite, narrow, widen  # noqa: E402
from lioncub.kernels.numba_cpu.memory import STORAGE  # noqa: E402

HALVES = [torch.bfloat16, torch.float16]


@numba.njit
def _widen_all(elements: Any) -> Any:
    out = np.empty(elements.size, np.float32)
    for j in range(elements.size):
        out[j] = widen(elements[j])
    return out


@numba.njit
def _narrow_all(values: Any, out: Any, dtype: Any) -> None:
    for j in range(values.size):
        out[j] = narrow(values[j], dtype)


@numba.njit
def _finite_all(values: Any) -> Any:
    out = np.empty(values.size, np.bool_)
    for j in range(values.size):
        out[j] = is_finite(values[j])
    return out


def _patterns() -> np.ndarray[Any, np.dtype[np.uint16]]:
    return np.arange(65536, dtype=np.uint32).astype(np.uint16)


def _rounding_cases() -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 bit patterns on and beside every tie of bf16 (16 bits dropped) and fp16 (13, or more if subnormal)."""
    high = np.arange(65536, dtype=np.uint32) << 16
    low = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF], np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    half_units = (np.arange(4096, dtype=np.float32) * np.float32(2.0**-25)).view(np.uint32)
    beside = np.concatenate([half_units, half_units + np.uint32(1), half_units[1:] - np.uint32(1)])
    return np.concatenate([(high[:, None] | low).ravel(), random, beside]).view(np.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_widen_equals_torch_on_all_patterns(dtype: torch.dtype) -> None:
    patterns = _patterns()
    expected = torch.from_numpy(patterns.view(np.int16)).view(dtype).float().numpy()

    actual = _widen_all(patterns.view(STORAGE[dtype]))

    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(actual), nan)
    np.testing.assert_array_equal(actual.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_narrow_rounds_like_torch(dtype: torch.dtype) -> None:
    values = _rounding_cases()
    expected = torch.from_numpy(values).to(dtype)

    actual = np.empty(values.size, STORAGE[dtype])
    _narrow_all(values, actual, STORAGE[dtype])

    nan = expected.isnan().numpy()
    np.testing.assert_array_equal(nan, np.isnan(values))
    as_torch = torch.from_numpy(actual.view(np.int16))
    np.testing.assert_array_equal(as_torch.view(dtype).isnan().numpy(), nan)
    np.testing.assert_array_equal(as_torch.numpy()[~nan], expected.view(torch.int16).numpy()[~nan])


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_survives_the_round_trip(dtype: torch.dtype) -> None:
    patterns = _patterns()
    values = torch.from_numpy(patterns.view(np.int16)).view(dtype)

    actual = np.empty(patterns.size, STORAGE[dtype])
    _narrow_all(values.float().numpy(), actual, STORAGE[dtype])

    number = ~values.isnan().numpy()
    np.testing.assert_array_equal(actual.view(np.uint16)[number], patterns[number])


def test_is_finite_is_false_for_inf_and_nan_alone() -> None:
    values = _rounding_cases()
    np.testing.assert_array_equal(_finite_all(values), np.isfinite(values))
