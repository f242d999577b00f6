"""The two-level vote: fast messages inside a node, counts as bit planes between nodes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lioncub.collectives.cost import chunk_bytes
from lioncub.collectives.exchange import Exchange, Tally, Terms, headed_rows, join_replies, new_reply
from lioncub.collectives.traffic import count_bits
from lioncub.collectives.transport import all_gather, all_to_all, rank_of
from lioncub.kernels import add_codes, count_votes, majority_of_counts


class HierarchicalVote(Exchange):
    """A vote of M nodes of L workers, exactly that of all M*L.

    1. Inside the node, all-to-all: the worker at place k receives the k-th of L chunks from all L.
    2. It counts the votes in its chunk into ceil(log2(L + 1)) bit planes; nothing is ever unpacked.
    3. Between nodes, all-to-all among the workers at place k: node m's receives the m-th of M parts of the planes.
    4. It adds the M counts bit-sliced and votes on its part.
    5. All-gather of the voted parts between nodes; 6. all-gather of the voted chunks inside the node.

    Codes that do not end in a majority are added up in fields instead, wide enough for L of them between nodes.
    """

    def __init__(self, packed: Tensor, header: Tensor, terms: Terms) -> None:
        topology = terms.routes.topology
        super().__init__(terms, packed.device)
        self._n_bytes, self._header_bytes = packed.numel() // terms.codes.bits, header.numel()
        self._nodes, self._local = topology.n_nodes, topology.local_size
        self._part = chunk_bytes(self._n_bytes, topology.workers)
        self._count_bits = count_bits(self._local, terms.codes)
        message = headed_rows(packed, header, self._local, self._nodes * self._part * terms.codes.bits)
        self._received = torch.empty_like(message)
        self._steps: list[Callable[[], None]] = [self._send_counts, self._send_voted_part, self._send_voted_chunk]
        self._phase.start(lambda: all_to_all(self._received, message, terms.routes.intra, tag=terms.tag))

    def advance(self) -> bool:
        """Wait for the leg under way and start the next."""
        if not self._steps:
            return False
        self._phase.wait()
        self._steps.pop(0)()
        return True

    def result(self) -> Tally:
        """Run the remaining legs and put the voted chunks together."""
        while self.advance():
            pass
        self._phase.wait()
        replies = self._replies.view(self._nodes * self._local, -1)
        voted, counts = join_replies(replies, self._n_bytes, self._terms.result_bits)
        return Tally(voted, self._headers, counts)

    def headers(self) -> Tensor:
        """See `Exchange.headers`."""
        return self._headers

    def _send_counts(self) -> None:
        """Count the chunk; row m of the message is (headers of this node, part m of every plane, or of the fields)."""
        ballots, terms = self._received[:, self._header_bytes :], self._terms
        if not terms.codes.are_votes:
            fields = add_codes(ballots, bits=terms.codes.bits, field_bits=self._count_bits, impl=terms.impl)
            counted = fields[None]
        else:
            counted = count_votes(ballots, impl=terms.impl)
        heads = self._received[:, : self._header_bytes].reshape(-1)
        message = heads.new_empty(self._nodes, heads.numel() + self._count_bits * self._part)
        message[:, : heads.numel()] = heads
        rows = message[:, heads.numel() :].view(self._nodes, len(counted), -1)
        rows.copy_(counted.view(len(counted), self._nodes, -1).transpose(0, 1))
        self._counted = torch.empty_like(message)
        self._phase.start(lambda: all_to_all(self._counted, message, self._terms.routes.inter, tag=self._terms.tag))

    def _send_voted_part(self) -> None:
        """Add up the counts of all nodes and vote on this worker's part."""
        terms, heads = self._terms, self._local * self._header_bytes
        topology = terms.routes.topology
        by_place = self._counted[:, :heads].reshape(self._nodes * self._local, self._header_bytes)
        self._headers = torch.empty_like(by_place)
        # nodes need not hold consecutive ranks, and a process group has its members in the order of their ranks
        place = topology.place_of(rank_of(self._terms.routes.group))[1]
        nodes = sorted(topology.nodes, key=lambda node: node[place])
        self._headers[[rank for node in nodes for rank in node]] = by_place
        reply, voted, counts = new_reply(self._headers, self._part * terms.result_bits)
        if terms.codes.are_votes:
            planes = self._counted[:, heads:].view(self._nodes, self._count_bits, self._part)
            voters = self._nodes * self._local
            majority_of_counts(planes, voters=voters, parity=terms.parity, out=voted, counts=counts, impl=terms.impl)
        else:
            width = terms.codes.field_bits(topology.workers)
            sums = add_codes(self._counted[:, heads:], bits=self._count_bits, field_bits=width, impl=terms.impl)
            result = terms.count.of_fields(sums, counts)
            voted.copy_(result)
        self._parts = reply.new_empty(self._nodes, reply.numel())
        self._phase.start(lambda: all_gather(self._parts.view(-1), reply, self._terms.routes.inter))

    def _send_voted_chunk(self) -> None:
        """Gather the voted chunks, each as its parts and their counts."""
        self._replies = self._parts.new_empty(self._local, self._parts.numel())
        parts = self._parts.view(-1)
        self._phase.start(lambda: all_gather(self._replies.view(-1), parts, self._terms.routes.intra))
