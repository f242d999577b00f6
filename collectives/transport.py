"""The two collectives that carry every message, in one spelling for all versions of torch."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

# torch's optimizers import this late, and its default arguments then hold the default group: the group's threads would
# outlive destroy_process_group, and one that still frees a message while the interpreter ends aborts the process
import torch.distributed.nn  # noqa: F401
from torch import Tensor

Group = dist.ProcessGroup | None

# torch 2.13 renamed all_gather_into_tensor, whose old name warns there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(output: Tensor, message: Tensor, group: Group) -> Any:
    """Start gathering ``message`` [M] of every worker into ``output`` [N * M] in rank order; returns the work."""
    return _all_gather(output, message, group=group, async_op=True)


def all_to_all(output: Tensor, messages: Tensor, group: Group) -> Any:
    """Start sending row r of ``messages`` [N, M] to rank r; row r of ``output`` is rank r's; returns the work."""
    return dist.all_to_all_single(output, messages, group=group, async_op=True)


def world_size_of(group: Group) -> int:
    """Number of workers in ``group``. Raises ValueError where this process is not one of them."""
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group: expected a process group that this process belongs to, got one that it is not in")
    return size
