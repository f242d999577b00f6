"""Gates: int32 flags, one per tensor of a list, that say on the device which tensors an op may change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lioncub.kernels.backends import resolve_impl
from lioncub.kernels.checks import check_device, check_flat
from lioncub.kernels.rounding import Streams

Lists = tuple[Sequence[Tensor], ...]


def check_gate(gate: Tensor | None, param: Sequence[Tensor]) -> None:
    """Raise unless ``gate`` is None or a contiguous int32[n] on the device of the n tensors of ``param``."""
    if gate is None or not param:
        return
    check_flat("gate", gate, torch.int32, len(param))
    check_device("gate", gate, "param", param[0])


def let_through(
    gate: Tensor | None, streams: Streams | None, impl: str, *lists: Sequence[Tensor]
) -> tuple[dict[str, Any], Lists]:
    """A backend's options and the lists for it: Triton reads the gate, for others only open tensors remain.

    Without ``streams`` everything is rounded to nearest.
    """
    options: dict[str, Any] = {} if streams is None else {"rounding": streams}
    if gate is None or not lists[0]:
        return options, lists
    if resolve_impl(impl, lists[0][0].device) == "triton":
        return options | {"gate": gate}, lists
    is_open = gate.tolist()
    if streams is not None:
        numbers = [number for number, flag in zip(streams.numbers, is_open, strict=True) if flag]
        options = {"rounding": streams._replace(numbers=numbers)}
    return options, tuple([tensor for tensor, flag in zip(tensors, is_open, strict=True) if flag] for tensors in lists)
