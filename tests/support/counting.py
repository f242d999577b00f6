"""Counts what travels."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lioncub.collectives import transport


class Counting:
    """Counts the bytes that are handed to torch.distributed for other workers, by the group's size."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}
        self._all_gather, self._all_reduce, self._isend = transport._all_gather, dist.all_reduce, dist.isend
        transport._all_gather, dist.all_reduce, dist.isend = self.all_gather, self.all_reduce, self.isend

    def _add(self, group: Any, n_bytes: int) -> None:
        key = -1 if group is None else id(group)
        self.sent[key] = self.sent.get(key, 0) + n_bytes

    def all_gather(self, output: torch.Tensor, message: torch.Tensor, group: Any = None, **options: Any) -> Any:
        self._add(group, message.numel() * message.element_size() * (dist.get_world_size(group) - 1))
        return self._all_gather(output, message, group=group, **options)

    def all_reduce(self, values: torch.Tensor, group: Any = None, **options: Any) -> Any:
        size = dist.get_world_size(group)
        self._add(group, -(-2 * (size - 1) * values.numel() * values.element_size() // size))
        return self._all_reduce(values, group=group, **options)

    def isend(self, message: torch.Tensor, group: Any = None, **options: Any) -> Any:
        self._add(group, message.numel())
        return self._isend(message, group=group, **options)
