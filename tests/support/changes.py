"""Changes behind an optimizer's back, each with what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Undo = Callable[[], None]


def put(container: Any, key: Any, value: Any) -> Undo:
    """Replace an entry; of a list, a slice of it."""
    kept = container[key]
    container[key] = value
    return lambda: container.__setitem__(key, kept)


def put_data(tensor: Tensor, value: Tensor) -> Undo:
    """Replace the memory behind a tensor."""
    kept, tensor.data = tensor.data, value
    return lambda: setattr(tensor, "data", kept)


def move(tensor: Tensor) -> Undo:
    """Replace the memory behind a tensor by a copy."""
    return put_data(tensor, tensor.data.clone())
