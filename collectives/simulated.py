"""A process group whose workers are threads of one process that take turns, and whose messages stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.collectives.scheduler import Scheduler

_REDUCTIONS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "SUM": (dist.ReduceOp.SUM, torch.add),
    "MIN": (dist.ReduceOp.MIN, torch.minimum),
    "MAX": (dist.ReduceOp.MAX, torch.maximum),
}


class SimulatedProcessGroup(dist.ProcessGroup):
    """One simulated worker's process group; pass it where a group is expected. `torch.distributed` need not be set up.

    Has all_gather_into_tensor (all_gather_single), all_reduce (SUM, MIN, MAX), all_to_all_single with equal splits,
    broadcast and barrier, sync and async; sums are added in rank order. The calls of a group's workers are matched in
    their order. Where they differ in kind, size, dtype, operation or source, all raise RuntimeError. ``wait`` gives
    the turn to other workers; see `Scheduler` for what it raises.
    """

    def __init__(self, channel: Channel, place: int) -> None:
        # the stub knows only the constructor with a store
        super().__init__(place, len(channel.ranks))  # type: ignore[call-arg]
        self._channel, self._place = channel, place

    @property
    def host(self) -> str:
        """The simulated host that this worker is on."""
        return self._channel.world.hosts[self._channel.ranks[self._place]]

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """A name that all workers of the group have in common."""
        return f"virtual {self._channel.ranks}"

    def subgroup(self, ranks: Sequence[int]) -> SimulatedProcessGroup:
        """Return this worker's group over some of this group's ranks, its own included; communicates nothing.

        Groups over the same workers carry their messages in one order.
        """
        members = tuple(self._channel.ranks[rank] for rank in sorted(ranks))
        return SimulatedProcessGroup(
            self._channel.world.channel(members), members.index(self._channel.ranks[self._place])
        )

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        """Set the rows of ``output`` to everyone's ``input``."""
        _check_sizes(output, self.size() * input.numel(), input)
        return self._post(_Terms("all_gather", input.numel(), input.dtype), input, output)

    # the name before torch 2.13
    _allgather_base = all_gather_single

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
    ) -> Any:
        """Set row r of ``output`` to this worker's row of rank r's ``input``."""
        _check_sizes(output, input.numel(), input)
        if output_split_sizes or input_split_sizes or input.numel() % self.size():
            raise ValueError(f"input: expected {self.size()} equal splits, got {input.numel()} elements, other splits")
        return self._post(_Terms("all_to_all", input.numel(), input.dtype), input, output)

    # the name before torch 2.13
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def allreduce(self, tensors: list[Tensor], opts: Any) -> Any:  # type: ignore[override]
        """Replace the tensor by the sum, smallest or largest over workers."""
        (tensor,) = tensors
        name = next((name for name, (op, _) in _REDUCTIONS.items() if opts.reduceOp == op), None)
        if name is None:
            raise ValueError(f"op: expected one of {tuple(_REDUCTIONS)} among simulated workers, got another")
        return self._post(_Terms("all_reduce", tensor.numel(), tensor.dtype, op=name), tensor, tensor)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:  # type: ignore[override]
        """Replace the tensor by that of the root."""
        (tensor,) = tensors
        return self._post(_Terms("broadcast", tensor.numel(), tensor.dtype, root=opts.rootRank), tensor, tensor)

    def barrier(self, opts: Any = None) -> Any:
        """Wait for all."""
        return self._post(_Terms("barrier"), None, None)

    def _post(self, terms: _Terms, message: Tensor | None, output: Tensor | None) -> SimulatedWork:
        for tensor in (message, output):
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{terms.kind}: expected contiguous tensors, got strides {tensor.stride()}")
        return SimulatedWork(self._channel.post(self._place, terms, message), self._place, output)


class SimulatedWork:
    """A collective of one worker in progress."""

    def __init__(self, call: _Call, place: int, output: Tensor | None) -> None:
        self._call: _Call | None = call
        self._place, self._output = place, output

    def is_completed(self) -> bool:
        """Whether `wait` would return at once."""
        return self._call is None or self._call.is_settled

    def wait(self, timeout: Any = None) -> bool:
        """Let other workers go on until all have posted their parts; then fill the output.

        ``timeout`` is of no use: who will never come is known.
        """
        if self._call is not None:
            self._call.wait(self._place)
            if self._output is not None:
                self._output.view(-1).copy_(self._call.result(self._place))
            self._call = None
        return True


class World:
    """All simulated workers: their turns, the host of each, and the channels of their groups."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts = tuple(hosts)
        self.scheduler = Scheduler(len(hosts))
        self._channels: dict[tuple[int, ...], Channel] = {}

    def group(self, rank: int) -> SimulatedProcessGroup:
        """Return a worker's group of all."""
        return SimulatedProcessGroup(self.channel(tuple(range(len(self.hosts)))), rank)

    def channel(self, ranks: tuple[int, ...]) -> Channel:
        """Return the channel that the groups over the same workers share."""
        return self._channels.setdefault(ranks, Channel(self, ranks))

    def drop_messages(self, why: str) -> None:
        """Forget all calls that some workers have not posted; who waits for one nevertheless gets RuntimeError."""
        for channel in self._channels.values():
            channel.drop_messages(why)


class Channel:
    """The calls in progress of one set of workers."""

    def __init__(self, world: World, ranks: tuple[int, ...]) -> None:
        self.world, self.ranks = world, ranks
        self._posted = [0] * len(ranks)
        self._calls: dict[int, _Call] = {}

    def post(self, place: int, terms: _Terms, message: Tensor | None) -> _Call:
        """Post a worker's part of its next call; ``message`` may change afterwards."""
        self.world.scheduler.check(self.ranks[place])
        number = self._posted[place]
        self._posted[place] += 1
        call = self._calls.setdefault(number, _Call(self, number, terms))
        call.add(place, terms, message)
        if not call.missing:
            del self._calls[number]
        call.check()
        return call

    def drop_messages(self, why: str) -> None:
        """See `World.drop_messages`."""
        for call in self._calls.values():
            call.error = why
        self._calls = {}
        self._posted = [max(self._posted)] * len(self._posted)


@dataclass(frozen=True)
class _Terms:
    """The terms of a call that all workers must have in common."""

    kind: str
    numel: int = 0
    dtype: torch.dtype | None = None
    op: str | None = None
    root: int | None = None

    def __str__(self) -> str:
        op = "" if self.op is None else f" by {self.op}"
        root = "" if self.root is None else f" from rank {self.root}"
        return self.kind if self.dtype is None else f"{self.kind} of {self.numel} {self.dtype}{op}{root}"


class _Call:
    """One collective: everyone's message [N, M], and who has not posted theirs."""

    def __init__(self, channel: Channel, number: int, terms: _Terms) -> None:
        self._ranks, self._scheduler, self._number, self._terms = channel.ranks, channel.world.scheduler, number, terms
        self._stated: dict[int, _Terms] = {}
        self._messages: Tensor | None = None
        self._total: Tensor | None = None
        self.missing = set(channel.ranks)
        self.error: str | None = None

    @property
    def is_settled(self) -> bool:
        """Whether waiting is over."""
        return not self.missing or self.error is not None

    def __str__(self) -> str:
        return f"{self._terms} (call {self._number} of the group of {len(self._ranks)})"

    def add(self, place: int, terms: _Terms, message: Tensor | None) -> None:
        """Take a worker's message, unless it does not fit those of the others: an error for all."""
        self.missing.discard(self._ranks[place])
        self._stated[self._ranks[place]] = terms
        if terms != self._terms and self.error is None:
            stated = ", ".join(f"{terms} on worker {rank}" for rank, terms in self._stated.items())
            self.error = f"workers called different collectives as number {self._number} of their group: {stated}"
        if message is None or self.error is not None:
            return
        rows = 1 if terms.kind == "broadcast" else len(self._ranks)
        if self._messages is None:
            self._messages = message.new_empty(rows, message.numel(), requires_grad=False)
        if terms.root is None or terms.root == place:
            self._messages[0 if rows == 1 else place] = message.detach().view(-1)

    def check(self) -> None:
        """Raise RuntimeError where the call cannot come about."""
        if self.error is not None:
            raise RuntimeError(self.error)

    def wait(self, place: int) -> None:
        """Let others go on until the call is settled."""
        self._scheduler.check(self._ranks[place])
        self._scheduler.wait(self._ranks[place], self)
        self.check()

    def result(self, place: int) -> Tensor:
        """Return the output of a worker."""
        assert self._messages is not None
        if self._terms.op is not None:
            if self._total is None:
                self._total = _reduce(self._messages, self._terms.op)
            return self._total
        if self._terms.kind == "all_to_all":
            size = len(self._ranks)
            return self._messages.view(size, size, self._terms.numel // size)[:, place].reshape(-1)
        return self._messages.view(-1)


def _reduce(rows: Tensor, name: str) -> Tensor:
    """Combine the rows in rank order."""
    combine = _REDUCTIONS[name][1]
    total = rows[0].clone()
    for row in rows[1:]:
        combine(total, row, out=total)
    return total


def _check_sizes(output: Tensor, numel: int, message: Tensor) -> None:
    if output.numel() != numel or output.dtype != message.dtype:
        raise ValueError(
            f"output: expected {numel} elements of {message.dtype}, got {output.numel()} of {output.dtype}"
        )
