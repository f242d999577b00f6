"""What the Lion kernels compute from values, apart from where these are loaded and stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from lioncub.kernels.numba_cpu.compiling import device_function


@device_function
def mix(kept: np.float32, new: np.float32, state: np.float32, incoming: np.float32) -> np.float32:
    """fl(fl(kept*state) + fl(new*incoming)) in fp32 (rule 1): two products, one sum, never fused."""
    return np.float32(np.float32(kept * state) + np.float32(new * incoming))


@device_function
def voted(x: np.float32, step: np.float32, decay: np.float32) -> np.float32:
    return np.float32(np.float32(x * decay) - step)


@device_function
def signed_step(update: np.float32, lr: np.float32) -> np.float32:
    """lr with the update's sign, 0 for zero and NaN."""
    up = lr if update > np.float32(0.0) else np.float32(0.0)
    down = lr if update < np.float32(0.0) else np.float32(0.0)
    return np.float32(up - down)


@device_function
def moves_of(codes: Any, step: np.int32, offset: np.int32, unit: np.float32, moves: Any) -> None:
    """moves[64] = (step*code - offset) * unit; the whole number is exact in fp32."""
    for j in range(64):
        total = np.int32(np.int32(np.int32(codes[j]) * step) - offset)
        moves[j] = np.float32(np.float32(total) * unit)
