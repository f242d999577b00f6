"""Counts the bytes that a rank sends."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from lioncub.collectives import transport


class Counting:
    """Within it, counts the bytes that are handed to torch.distributed for other ranks, by the group."""

    def __init__(self) -> None:
        self.sent: dict[int, int] = {}

    def __enter__(self) -> Counting:
        self._all_gather, self._all_reduce = transport._all_gather, dist.all_reduce
        transport._all_gather, dist.all_reduce = self.all_gather, self.all_reduce
        # as the class holds it: what attribute access gives could not be put back
        self._send, send = vars(dist.ProcessGroup)["send"], dist.ProcessGroup.send

        def counted(group: dist.ProcessGroup, messages: list[torch.Tensor], target: int, tag: int) -> Any:
            self._add(group, sum(message.numel() * message.element_size() for message in messages))
            return send(group, messages, target, tag)

        dist.ProcessGroup.send = counted
        return self

    def __exit__(self, *_: object) -> None:
        transport._all_gather, dist.all_reduce = self._all_gather, self._all_reduce
        dist.ProcessGroup.send = self._send

    def _add(self, group: Any, n_bytes: int) -> None:
        key = -1 if group in (None, dist.group.WORLD) else id(group)
        self.sent[key] = self.sent.get(key, 0) + n_bytes

    def all_gather(self, output: torch.Tensor, message: torch.Tensor, group: Any = None, **options: Any) -> Any:
        self._add(group, message.numel() * message.element_size() * (dist.get_world_size(group) - 1))
        return self._all_gather(output, message, group=group, **options)

    def all_reduce(self, values: torch.Tensor, group: Any = None, **options: Any) -> Any:
        size = dist.get_world_size(group)
        self._add(group, -(-2 * (size - 1) * values.numel() * values.element_size() // size))
        return self._all_reduce(values, group=group, **options)
