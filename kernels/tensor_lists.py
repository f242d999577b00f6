"""Lists of tensors whose sizes, dtypes and addresses are asked for once, by a method of C mapped over the list.

A call per tensor and property in a loop takes longer than the kernels themselves where tensors are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

_DTYPE: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]


class TensorList(list[Tensor]):
    """Tensors of one call of an op, which nobody changes meanwhile."""

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of elements."""
        return list(map(Tensor.numel, self))

    @cached_property
    def dtypes(self) -> list[torch.dtype]:
        """Of each tensor."""
        return list(map(_DTYPE, self))

    @cached_property
    def addresses(self) -> list[int]:
        """Of each tensor's first element; 0 for an empty one."""
        return list(map(Tensor.data_ptr, self))

    @property
    def ends(self) -> list[int]:
        """Addresses behind each contiguous tensor's last element."""
        widths = {dtype: dtype.itemsize for dtype in set(self.dtypes)}
        if len(widths) == 1:
            (width,) = widths.values()
            return [start + width * size for start, size in zip(self.addresses, self.sizes, strict=True)]
        rows = zip(self.addresses, self.sizes, self.dtypes, strict=True)
        return [start + widths[dtype] * size for start, size, dtype in rows]


def tensor_list(tensors: Sequence[Tensor]) -> TensorList:
    """``tensors`` as a `TensorList`; one that it is already stays."""
    return tensors if isinstance(tensors, TensorList) else TensorList(tensors)
