"""The collectives that carry every message: all-to-all, all-gather and all-reduce, on every backend."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

# torch's optimizers import this late, and its default arguments then hold the default group: the group's threads would
# outlive destroy_process_group, and one that still frees a message while the interpreter ends aborts the process
import torch.distributed.nn
from torch import Tensor
from torch._C._distributed_c10d import Store
from torch.distributed import distributed_c10d

from lioncub.collectives.simulated import SimulatedProcessGroup

Group = dist.ProcessGroup | None

# torch 2.13 renamed all_gather_into_tensor, whose old name warns there
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# a window of tags for messages in flight at once: votes of buckets, the payloads beside them, then single votes and
# averages, and as many again for the second message of each
_FIRST_TAG = 0x4C000000
PAYLOADS, SINGLE_VOTES, SINGLE_AVERAGE, SECOND = 1 << 19, 1 << 20, 1 << 21, 1 << 22


class PeerLostError(RuntimeError):
    """The connection to a rank of the group ended, or it did not answer within the group's timeout."""


def _lost(error: RuntimeError) -> PeerLostError:
    """Return the error of a collective that a backend has ended, where nobody knows which rank is to blame."""
    return PeerLostError(f"a rank of the process group was lost: {error}")


@contextmanager
def losing(group: Group) -> Iterator[None]:
    """Make a backend's error in the body, a collective of ``group``, a `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(group, SimulatedProcessGroup):
            # which knows what went wrong
            raise
        raise _lost(error) from error


class Pending(Protocol):
    """A collective in progress."""

    def wait(self) -> Tensor:
        """Return what arrived: once, on the host or, on a GPU, for the current stream."""


class Transport:
    """The collectives of one process group, for messages on one device.

    Args:
        group: the process group.
        device: of messages.
        functional: use torch's functional collectives, which a compiler traces and which never wait for a device.
    """

    def __init__(self, group: Group, device: torch.device, *, functional: bool = False) -> None:
        self.group, self.size, self.rank = group, world_size_of(group), rank_of(group)
        is_gloo = backend_of(group, device.type) == "gloo"
        # single messages are faster than Gloo's own all-to-all
        self.has_point_to_point = is_gloo and device.type == "cpu" and not functional
        self._functional_name = whole(group).group_name if functional else ""
        # the functional all-gather aborted one in eight runs of 4 workers on Gloo (torch 2.13): it is a collective
        # whose name is too long for the string that the group's two threads both write, without a lock
        self._gathers_by_exchange = functional and is_gloo

    def channel(self, n_bytes: int, tag: int, *, eager: bool = False) -> Channel:
        """Prepare one all-to-all, or all-gather, of messages of ``n_bytes``.

        ``eager`` sends them all at once and, on Gloo, posts the receives now. Channels in use at once need different
        ``tag`` numbers.
        """
        if eager and self.has_point_to_point:
            return EagerAllToAll(torch.empty(self.size, n_bytes, dtype=torch.uint8, device="cpu"), self.group, tag)
        return _Collective(self, tag)

    def exchange(self, messages: Tensor, tag: int) -> Pending:
        """Start sending row r of ``messages`` [N, M] to rank r; row r of the result [N, M] is rank r's.

        On Gloo in pairs, since its own all-to-all reaches 0.6 of a link's speed and these 0.9 (4 workers, 100 Mb/s).
        """
        if self._functional_name:
            return self._functional_exchange(messages)
        output = torch.empty_like(messages)
        if self.has_point_to_point:
            return PairwiseAllToAll(output, messages, self.group, tag)
        return _Started(self.group, output, dist.all_to_all_single, output, messages)

    def gather(self, message: Tensor) -> Pending:
        """Start gathering ``message`` [M] of every rank into [N, M]."""
        if self._gathers_by_exchange:
            return self._functional_exchange(message.repeat(self.size, 1))
        if self._functional_name:
            gather = torch.ops._c10d_functional.all_gather_into_tensor
            return _Functional(gather(message, self.size, self._functional_name), (self.size, message.numel()))
        output = message.new_empty(self.size, message.numel())
        return _Started(self.group, output, _all_gather, output.view(-1), message)

    def all_reduce(self, values: Tensor) -> Pending:
        """Start adding up ``values`` [M] of every rank; they may be overwritten by the sum."""
        if self._functional_name:
            summed = torch.ops._c10d_functional.all_reduce(values, "sum", self._functional_name)
            return _Functional(summed, (values.numel(),))
        return _Started(self.group, values, dist.all_reduce, values)

    def _functional_exchange(self, messages: Tensor) -> Pending:
        sizes = [messages.shape[1]] * self.size
        sent = torch.ops._c10d_functional.all_to_all_single(messages.view(-1), sizes, sizes, self._functional_name)
        return _Functional(sent, (self.size, messages.shape[1]))


class Channel(Protocol):
    """One all-to-all or all-gather to come."""

    def send(self, messages: Tensor) -> Pending:
        """Send row r of ``messages`` [N, M] to rank r, or a message [M] to all; [N, M] arrives."""


class _Collective:
    """A channel whose receives are posted when it sends."""

    def __init__(self, transport: Transport, tag: int) -> None:
        self._transport, self._tag = transport, tag

    def send(self, messages: Tensor) -> Pending:
        if messages.dim() == 1:
            return self._transport.gather(messages)
        return self._transport.exchange(messages, self._tag)


class _Started:
    """A collective of torch.distributed on ``tensors``, in progress; its result is ``output``."""

    def __init__(self, group: Group, output: Tensor, collective: Callable[..., Any], *tensors: Tensor) -> None:
        self._group, self._output = group, output
        with losing(group):
            self._work = collective(*tensors, group=group, async_op=True)

    def wait(self) -> Tensor:
        with losing(self._group):
            self._work.wait()
        return self._output


class _Functional:
    """A functional collective in progress; on a device the host does not wait."""

    def __init__(self, pending: Tensor, shape: tuple[int, ...]) -> None:
        self._pending, self._shape = pending, shape

    def wait(self) -> Tensor:
        arrived: Tensor = torch.ops._c10d_functional.wait_tensor(self._pending)
        return arrived.view(self._shape)


class _Message(NamedTuple):
    """A message to or from one rank of a group."""

    work: Any
    peer: int
    group: dist.ProcessGroup

    def wait(self) -> None:
        """Wait for its end. Raises PeerLostError."""
        try:
            self.work.wait()
        except RuntimeError as error:
            peer = _first_lost(self.group, self.peer)
            raise PeerLostError(f"rank {peer} of the process group was lost: {error}") from error


def _first_lost(group: dist.ProcessGroup, peer: int) -> int:
    """Return the rank that any rank of the group has lost first, which is ``peer`` where nobody knows better.

    A rank that ends because it has lost another one is lost to the others in its turn.
    """
    try:
        return int(store_of(group).compare_set("lioncub/lost", "", str(peer)))
    except (RuntimeError, ValueError):
        # the store may be gone, with the process that kept it
        return peer


class _PointToPoint:
    """An all-to-all of single messages into ``output`` [N, M]: the receives are posted on construction."""

    def __init__(self, output: Tensor, group: Group, tag: int) -> None:
        # the group itself: the checks of dist.isend and dist.irecv cost as much as the sending of a short message
        self._group, self._tag = whole(group), _FIRST_TAG + tag
        self._rank, self._size = self._group.rank(), self._group.size()
        self._output, self._rows = output, output.unbind()
        distances = range(1, self._size) if output.shape[1] else range(0)
        self._received = [self._receive(d) for d in distances]

    def _receive(self, distance: int) -> _Message:
        source = (self._rank - distance) % self._size
        try:
            return _Message(self._group.recv([self._rows[source]], source, self._tag), source, self._group)
        except RuntimeError as error:
            raise _lost(error) from error

    def _send(self, rows: Sequence[Tensor], distance: int) -> _Message:
        target = (self._rank + distance) % self._size
        try:
            return _Message(self._group.send([rows[target]], target, self._tag), target, self._group)
        except RuntimeError as error:
            raise _lost(error) from error


class PairwiseAllToAll(_PointToPoint):
    """An all-to-all in N - 1 rounds: in round d, each rank sends to rank + d and receives from rank - d.

    One message at a time leaves and arrives on every link, so none waits for another's turn. The first round starts
    at once, the others within `wait`.
    """

    def __init__(self, output: Tensor, messages: Tensor, group: Group, tag: int) -> None:
        super().__init__(output, group, tag)
        self._messages = messages.unbind()
        self._rows[self._rank].copy_(self._messages[self._rank])
        self._sent = [self._send(self._messages, 1)] if self._received else []

    def wait(self) -> Tensor:
        """Run the remaining rounds."""
        for d, received in enumerate(self._received, start=1):
            received.wait()
            self._sent[-1].wait()
            if d + 1 < self._size:
                self._sent.append(self._send(self._messages, d + 1))
        return self._output


class EagerAllToAll(_PointToPoint):
    """An all-to-all whose messages are all in flight together: for short ones, and while processors are busy.

    Receives are posted long before `send`, so that data need not wait until a thread has woken up to ask for it; nor
    does any between messages. Of an idle machine's links it reaches 0.8, of a busy one's twice what pairs do.
    """

    def send(self, messages: Tensor) -> EagerAllToAll:
        """See `Channel.send`."""
        # referred to until they have left
        self._messages = messages.unbind() if messages.dim() == 2 else (messages,) * self._size
        self._rows[self._rank].copy_(self._messages[self._rank])
        self._sent = [self._send(self._messages, d) for d in range(1, 1 + len(self._received))]
        return self

    def wait(self) -> Tensor:
        """Wait for everyone's message, and until one's own have left."""
        for work in self._received + self._sent:
            work.wait()
        return self._output


def all_gather(output: Tensor, message: Tensor, group: Group) -> Pending:
    """Start gathering ``message`` [M] of every rank into ``output`` [N * M] in rank order; returns what to wait for."""
    return _Started(group, output, _all_gather, output, message)


def gather_objects(value: Any, group: Group, device: torch.device) -> list[Any]:
    """Gather everyone's ``value``, pickled, in rank order; a collective whose messages are on ``device``.

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


def whole(group: Group) -> dist.ProcessGroup:
    """Return ``group``, or the default group for None."""
    found = group or dist.group.WORLD
    assert found is not None
    return found


def is_listed(group: Group) -> bool:
    """Return whether torch.distributed made the group.

    Of one that others made from a store, as torchft does, torch.distributed knows neither backend nor ranks in the
    world, and makes no subgroups. All else it has: size and rank, messages, all-to-all, all-gather, timeout and store.
    """
    return group is None or isinstance(group, SimulatedProcessGroup) or group in distributed_c10d._world.pg_map


def store_of(group: Group) -> Store:
    """Return the store through which the group's ranks found one another."""
    if is_listed(group):
        found: Store = distributed_c10d._get_process_group_store(whole(group))
        return found
    return whole(group).get_group_store()


def device_of(group: Group, device: torch.device | None = None) -> torch.device:
    """Return a device whose messages the group carries: the CPU where it is one, else the caller's ``device``.

    Where the caller has none, it is the one that the group is bound to, or this process's current device: without
    `torch.cuda.set_device` that is GPU 0 on every rank.
    """
    if isinstance(group, SimulatedProcessGroup):
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
    if isinstance(group, SimulatedProcessGroup):
        return
    world_size_of(group)
    types = [device.type for device in whole(group)._device_types]
    if tensor.device.type not in types:
        raise ValueError(f"{name}: expected a device whose messages the group carries, {types}, got {tensor.device}")


def backend_of(group: Group, device_type: str) -> str:
    """Return the name of the backend that carries the group's messages of a device, e.g. "gloo" or "nccl"."""
    if isinstance(group, SimulatedProcessGroup):
        return "virtual"
    if not is_listed(group):
        return str(whole(group)._get_backend(torch.device(device_type)).name())
    # one name, or one for each type of device, as in "cpu:gloo,cuda:nccl"
    pairs = [part.rpartition(":") for part in dist.get_backend_config(group).split(",")]
    by_device = {device: name for device, _, name in pairs}
    return by_device.get(device_type) or next(iter(by_device.values()))


def world_size_of(group: Group) -> int:
    """Return the number of ranks in ``group``. Raises ValueError where this process is not one of them."""
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("group: expected a process group that this process belongs to, got one that it is not in")
    return size


def rank_of(group: Group) -> int:
    """Return this process's rank in ``group``."""
    return whole(group).rank()
