"""The collectives that carry every message, in one spelling for all versions of torch and all backends."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# torch's optimizers import this late, and its default arguments then hold the default group: the group's threads would
# outlive destroy_process_group, and one that still frees a message while the interpreter ends aborts the process
import torch.distributed.nn
from torch import Tensor

from lioncub.collectives.virtual import VirtualGroup

Group = dist.ProcessGroup | None

# torch 2.13 renamed all_gather_into_tensor, whose old name warns there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# a window of tags of our own, so that messages in flight at once cannot be taken for one another: voters', which their
# owners number, then those of single votes and averages, and as many again for the messages of later phases
_FIRST_TAG = 0x4C000000
SINGLE_VOTES, AVERAGES, LATER = 1 << 20, 1 << 21, 1 << 22


def all_gather(output: Tensor, message: Tensor, group: Group) -> Any:
    """Start gathering ``message`` [M] of every worker into ``output`` [N * M] in rank order; returns the work."""
    return _all_gather(output, message, group=group, async_op=True)


def all_reduce(values: Tensor, group: Group) -> Any:
    """Start adding up ``values`` of every worker, in place; returns the work."""
    return dist.all_reduce(values, group=group, async_op=True)


def all_to_all(output: Tensor, messages: Tensor, group: Group, *, tag: int = 0) -> Any:
    """Start sending row r of ``messages`` [N, M] to rank r; row r of ``output`` is rank r's; returns the work.

    On Gloo in `Rounds`, since its own all-to-all reaches 0.6 of a link's speed and these 0.9 (4 workers, 100 Mb/s).
    Exchanges that are in flight at once need different tags there.
    """
    if has_point_to_point(group, messages.device):
        return Rounds(output, messages, group, tag)
    return dist.all_to_all_single(output, messages, group=group, async_op=True)


def gather_objects(value: Any, group: Group, device: torch.device) -> list[Any]:
    """Everyone's ``value``, pickled, in rank order; a collective call whose messages are on ``device``.

    Pickles of other workers are trusted, as the workers of a process group are.
    """
    payload = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    size = world_size_of(group)
    lengths = torch.empty(size, dtype=torch.int64, device=device)
    all_gather(lengths, torch.tensor([payload.numel()], dtype=torch.int64, device=device), group).wait()
    sizes = lengths.tolist()
    padded = payload.new_zeros(max(sizes))
    padded[: payload.numel()] = payload
    everyone = padded.new_empty(size * len(padded))
    all_gather(everyone, padded, group).wait()
    rows = everyone.view(size, -1).tolist()
    return [pickle.loads(bytes(row[:length])) for row, length in zip(rows, sizes, strict=True)]


def has_point_to_point(group: Group, device: torch.device) -> bool:
    """Whether messages of a device are better sent one by one than by the backend's own all-to-all."""
    return device.type == "cpu" and backend_of(group, device.type) == "gloo"


class _PointToPoint:
    """An all-to-all of single messages: the receives are posted on construction."""

    def __init__(self, output: Tensor, group: Group, tag: int) -> None:
        # asked directly: the checks of dist.isend and dist.irecv cost as much as the sending of a short message
        self._group, self._tag = whole(group), _FIRST_TAG + tag
        self._rank, self._size = self._group.rank(), self._group.size()
        self._rows = output.unbind()
        distances = range(1, self._size) if output.shape[1] else range(0)
        self._received = [self._receive(d) for d in distances]

    def _receive(self, distance: int) -> Any:
        source = (self._rank - distance) % self._size
        return self._group.recv([self._rows[source]], source, self._tag)

    def _send(self, rows: Sequence[Tensor], distance: int) -> Any:
        target = (self._rank + distance) % self._size
        return self._group.send([rows[target]], target, self._tag)


class Rounds(_PointToPoint):
    """An all-to-all in N - 1 rounds: in round d, each worker sends to rank + d and receives from rank - d.

    One message at a time leaves and arrives on every link, so none waits for another's turn. The first round starts
    at once, the others within `wait`, which runs once.
    """

    def __init__(self, output: Tensor, messages: Tensor, group: Group, tag: int) -> None:
        super().__init__(output, group, tag)
        self._messages = messages.unbind()
        self._rows[self._rank].copy_(self._messages[self._rank])
        self._sent = [self._send(self._messages, 1)] if self._received else []

    def wait(self) -> None:
        """Run the remaining rounds."""
        for d, received in enumerate(self._received, start=1):
            received.wait()
            self._sent[-1].wait()
            if d + 1 < self._size:
                self._sent.append(self._send(self._messages, d + 1))


class AtOnce(_PointToPoint):
    """An all-to-all whose messages are all in flight together: for short ones, and while processors are busy.

    Receives can be posted long before `send`, so that data need not wait until a thread has woken up to ask for it;
    nor does any between messages. Of an idle machine's links it reaches 0.8, of a busy one's twice what `Rounds` do.
    """

    def send(self, messages: Tensor) -> AtOnce:
        """Send row r of ``messages`` [N, M] to rank r; one message [M] goes to all."""
        rows = messages.unbind() if messages.dim() == 2 else [messages] * self._size
        self._rows[self._rank].copy_(rows[self._rank])
        self._sent = [self._send(rows, d) for d in range(1, 1 + len(self._received))]
        return self

    def wait(self) -> None:
        """Wait for everyone's message, and until one's own have left; once, after `send`."""
        for work in self._received + self._sent:
            work.wait()


def whole(group: Group) -> dist.ProcessGroup:
    """``group``, or the default group for None."""
    found = group or dist.group.WORLD
    assert found is not None
    return found


def device_of(group: Group, device: torch.device | None = None) -> torch.device:
    """A device whose messages the group carries: the CPU where it is one, else ``device``, where a caller's data is.

    Where the caller has none, it is the one that the group is bound to, or this process's current device: without
    `torch.cuda.set_device` that is GPU 0 on every rank.
    """
    if isinstance(group, VirtualGroup):
        return torch.device("cpu")
    devices: list[torch.device] = whole(group)._device_types
    carried = next((device for device in devices if device.type == "cpu"), devices[0])
    if carried.type != "cuda":
        return carried
    if device is not None and device.type == "cuda":
        return device
    bound: torch.device | None = whole(group).bound_device_id
    return bound or torch.device("cuda", torch.cuda.current_device())


def check_carried(name: str, tensor: Tensor, group: Group) -> None:
    """Raise ValueError unless ``group`` carries messages of ``tensor``'s device."""
    if isinstance(group, VirtualGroup):
        return
    world_size_of(group)
    types = [device.type for device in whole(group)._device_types]
    if tensor.device.type not in types:
        raise ValueError(f"{name}: expected a device whose messages the group carries, {types}, got {tensor.device}")


def backend_of(group: Group, device_type: str) -> str:
    """Name of the backend that carries the group's messages of a device, e.g. "gloo" or "nccl"."""
    if isinstance(group, VirtualGroup):
        return "virtual"
    # one name, or one for each type of device, as in "cpu:gloo,cuda:nccl"
    pairs = [part.rpartition(":") for part in dist.get_backend_config(group).split(",")]
    by_device = {device: name for device, _, name in pairs}
    return by_device.get(device_type) or next(iter(by_device.values()))


def world_size_of(group: Group) -> int:
    """Number of workers in ``group``. Raises ValueError where this process is not one of them."""
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group: expected a process group that this process belongs to, got one that it is not in")
    return size


def rank_of(group: Group) -> int:
    """This worker's rank in ``group``."""
    return whole(group).rank()
