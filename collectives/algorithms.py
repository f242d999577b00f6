"""The algorithms of a vote, each once: generators that yield a collective in progress and are sent what arrived.

The first yield waits for (packed codes, parity of ties); channels are opened before it, so that receives can be posted
while codes are still being computed. The last yield is the `VoteResult`. `Exchange` drives them, so that many are in
flight at once in an order that is the same on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lioncub.collectives.codes import CodeFormat, combine_codes, combine_fields
from lioncub.collectives.cost import COUNT_BYTES, chunk_bytes, count_bits
from lioncub.collectives.groups import Topology
from lioncub.collectives.transport import SECOND, Pending, Transport
from lioncub.kernels import add_codes, count_votes, majority_of_counts, spread_codes

R = TypeVar("R")


@dataclass(frozen=True)
class Done(Generic[R]):
    """The last thing that an algorithm yields: its result."""

    result: R


Phases = Generator["Pending | Done[R] | None", Any, None]


class Exchange(Generic[R]):
    """An algorithm at work: `start` sends, `advance` goes on to the next phase, `result` ends it.

    ``n_phases`` is how many collectives wait for one another; ``seconds`` the host's time for starting and awaiting
    them, votes in between included.
    """

    def __init__(self, phases: Phases[R], n_phases: int) -> None:
        next(phases)
        self._phases, self._left = phases, n_phases
        self._pending: Pending | None = None
        self._done: Done[R] | None = None
        self.seconds = 0.0

    @property
    def is_last(self) -> bool:
        """Whether the phase in progress is the last."""
        return self._left <= 1

    def start(self, message: Any) -> None:
        """Start the first phase."""
        began = _clock()
        self._go_on(message)
        self.seconds += _clock() - began

    def advance(self) -> bool:
        """Wait for the phase in progress and start the next; False where all are done."""
        if self._done is not None:
            return False
        assert self._pending is not None
        began = _clock()
        arrived = self._pending.wait()
        self._left -= 1
        self._go_on(arrived)
        self.seconds += _clock() - began
        return self._done is None

    def result(self) -> R:
        """Run what is left."""
        while self.advance():
            pass
        assert self._done is not None
        return self._done.result

    def _go_on(self, what: Any) -> None:
        state = self._phases.send(what)
        if isinstance(state, Done):
            self._done, self._pending = state, None
        else:
            self._pending = state


def _clock() -> float:
    # a compiler does not trace clocks
    return 0.0 if torch.compiler.is_compiling() else time.perf_counter()


@dataclass(frozen=True)
class VoteResult:
    """The packed result uint8[r*B], and int64[2] (ties, unanimous) of the codes; pad codes are unanimous too."""

    packed: Tensor
    counts: Tensor


@dataclass(frozen=True)
class VoteSpec:
    """One vote: B bytes of one bit per code, the format of codes, who votes, kernels, tag and whether it is eager.

    ``whole`` carries messages between all ranks; ``intra`` and ``inter`` only where the topology has two levels.
    """

    n_bytes: int
    form: CodeFormat
    topology: Topology
    whole: Transport
    intra: Transport | None
    inter: Transport | None
    impl: str
    tag: int
    eager: bool

    @property
    def workers(self) -> int:
        """Number of ranks."""
        return self.whole.size

    def combine(self, messages: Tensor, parity: int | Tensor) -> VoteResult:
        """Vote on everyone's codes."""
        counts = torch.zeros(2, dtype=torch.int64, device=messages.device)
        return VoteResult(combine_codes(messages, self.form, self.workers, parity, counts, self.impl), counts)


def all_gather_vote(spec: VoteSpec) -> Phases[VoteResult]:
    """1. Every rank gathers everyone's codes. 2. It votes on all of them."""
    channel = spec.whole.channel(spec.n_bytes * spec.form.bits, spec.tag)
    packed, parity = yield None
    messages = yield channel.send(packed)
    yield Done(spec.combine(messages, parity))


def reduce_scatter_vote(spec: VoteSpec) -> Phases[VoteResult]:
    """1. All-to-all: rank k receives everyone's k-th chunk. 2. It votes on it. 3. All-gather of the voted chunks."""
    workers, bits = spec.workers, spec.form.result_bits(spec.workers)
    chunk, transport = chunk_bytes(spec.n_bytes, workers), spec.whole
    there = transport.channel(chunk * spec.form.bits, spec.tag, eager=spec.eager)
    back = transport.channel(COUNT_BYTES + chunk * bits, spec.tag + SECOND, eager=spec.eager)
    packed, parity = yield None
    chunks = yield there.send(_rows(packed, workers, chunk * spec.form.bits))
    replies = yield back.send(_reply(spec.combine(chunks, parity)))
    yield Done(_join(replies, spec.n_bytes * bits))


def all_reduce_vote(spec: VoteSpec) -> Phases[VoteResult]:
    """1. Codes are spread into fields wide enough for their sum. 2. One native all-reduce adds them up. 3. Every rank
    takes the result out of the fields.
    """
    transport, width = spec.whole, spec.form.field_bits(spec.workers)
    packed, parity = yield None
    fields = spread_codes(packed, bits=spec.form.bits, field_bits=width, impl=spec.impl)
    # fields never carry into one another, so wider integers give the same sums
    summed = yield transport.all_reduce(fields.view(torch.int32) if width == 16 else fields)
    counts = torch.zeros(2, dtype=torch.int64, device=summed.device)
    fields = summed.view(torch.uint8)
    yield Done(VoteResult(combine_fields(fields, spec.form, spec.workers, parity, counts, spec.impl), counts))


def hierarchical_vote(spec: VoteSpec) -> Phases[VoteResult]:
    """Vote among M nodes of L ranks with the exact result of all M*L.

    1. Inside the node, all-to-all: the rank at place k receives the k-th of L chunks from all L.
    2. It counts the votes in its chunk into ceil(log2(L + 1)) bit planes; nothing is ever unpacked.
    3. Between nodes, all-to-all among the ranks at place k: node m's receives the m-th of M parts of the planes.
    4. It adds the M counts bit-sliced and votes on its part.
    5. All-gather of the voted parts between nodes; 6. all-gather of the voted chunks inside the node.

    Codes that do not end in a majority are added up in fields instead, wide enough for L of them between nodes.
    """
    form, topology, impl = spec.form, spec.topology, spec.impl
    nodes, local, workers = topology.n_nodes, topology.local_size, topology.workers
    part, width = chunk_bytes(spec.n_bytes, workers), count_bits(local, form)
    intra, inter = spec.intra, spec.inter
    assert intra is not None
    assert inter is not None
    packed, parity = yield None
    chunks = yield intra.exchange(_rows(packed, local, nodes * part * form.bits), spec.tag)
    if form.are_votes:
        counted = count_votes(chunks, impl=impl)
    else:
        counted = add_codes(chunks, bits=form.bits, field_bits=width, impl=impl)[None]
    rows = counted.view(len(counted), nodes, -1).transpose(0, 1).reshape(nodes, width * part)
    received = yield inter.exchange(rows, spec.tag)
    counts = torch.zeros(2, dtype=torch.int64, device=received.device)
    if form.are_votes:
        planes = received.view(nodes, width, part)
        voted = majority_of_counts(planes, voters=workers, parity=parity, counts=counts, impl=impl)
    else:
        sums = add_codes(received, bits=width, field_bits=form.field_bits(workers), impl=impl)
        voted = combine_fields(sums, form, workers, parity, counts, impl)
    parts = yield inter.gather(_reply(VoteResult(voted, counts)))
    replies = yield intra.gather(parts.view(-1))
    yield Done(_join(replies.view(workers, -1), spec.n_bytes * form.result_bits(workers)))


# with the number of collectives that wait for one another
VOTES_BY: dict[str, tuple[Callable[[VoteSpec], Phases[VoteResult]], int]] = {
    "all_gather": (all_gather_vote, 1),
    "reduce_scatter": (reduce_scatter_vote, 2),
    "hierarchical": (hierarchical_vote, 4),
    "all_reduce": (all_reduce_vote, 1),
}


def _rows(packed: Tensor, n_rows: int, width: int) -> Tensor:
    """Cut ``packed`` into uint8[n_rows, width], zeros where it ends."""
    missing = n_rows * width - packed.numel()
    return (torch.nn.functional.pad(packed, (0, missing)) if missing else packed).view(n_rows, width)


def _reply(voted: VoteResult) -> Tensor:
    """Put the counts in front of a voted chunk."""
    return torch.cat([voted.counts.view(torch.uint8), voted.packed])


def _join(replies: Tensor, n_bytes: int) -> VoteResult:
    """Return the result of ``n_bytes`` from everyone's reply, in the order of the chunks."""
    counts = replies[:, :COUNT_BYTES].contiguous().view(torch.int64).sum(0)
    return VoteResult(replies[:, COUNT_BYTES:].reshape(-1)[:n_bytes], counts)
