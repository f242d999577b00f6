"""How packed votes travel: each algorithm takes packed codes and gives the majority, the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lioncub.collectives.cost import chunk_bytes
from lioncub.collectives.exchange import Exchange, Tally, Terms, headed_rows, join_replies, new_reply
from lioncub.collectives.hierarchical import HierarchicalVote
from lioncub.collectives.transport import all_gather, all_reduce, all_to_all
from lioncub.kernels import spread_codes


class AllGatherVote(Exchange):
    """1. every worker gathers everyone's message; 2. every worker votes on all of it."""

    def __init__(self, packed: Tensor, header: Tensor, terms: Terms) -> None:
        super().__init__(terms, packed.device)
        self._header_bytes = header.numel()
        message = torch.cat([header, packed])
        self._received = packed.new_empty(terms.routes.workers, message.numel())
        self._phase.start(lambda: all_gather(self._received.view(-1), message, terms.routes.group))

    def headers(self) -> Tensor:
        """See `Exchange.headers`."""
        self._phase.wait()
        return self._received[:, : self._header_bytes]

    def result(self) -> Tally:
        """Wait, vote."""
        headers, ballots = self.headers(), self._received[:, self._header_bytes :]
        counts = torch.zeros(2, dtype=torch.int64, device=headers.device)
        return Tally(self._terms.count.of_ballots(ballots, counts), headers, counts)


class ReduceScatterVote(Exchange):
    """1. all-to-all: worker k receives everyone's k-th chunk; 2. it votes on it; 3. all-gather of the voted chunks."""

    def __init__(self, packed: Tensor, header: Tensor, terms: Terms) -> None:
        super().__init__(terms, packed.device)
        self._n_bytes, self._header_bytes = packed.numel() // terms.codes.bits, header.numel()
        workers = terms.routes.workers
        self._chunk = chunk_bytes(self._n_bytes, workers)
        message = headed_rows(packed, header, workers, self._chunk * terms.codes.bits)
        inbox = terms.inbox
        self._received = torch.empty_like(message) if inbox is None else inbox.received
        self._replies: Tensor | None = None
        self._phase.start(
            lambda: (
                all_to_all(self._received, message, terms.routes.group, tag=terms.tag)
                if inbox is None
                else inbox.there.send(message)
            )
        )

    def advance(self) -> bool:
        """Wait for the chunks, vote on them, start gathering the voted ones."""
        if self._replies is not None:
            return False
        self._phase.wait()
        headers, ballots = self.headers(), self._received[:, self._header_bytes :]
        reply, voted, counts = new_reply(headers, self._chunk * self._terms.result_bits)
        self._terms.count.of_ballots(ballots, counts, out=voted)
        inbox = self._terms.inbox
        replies = reply.new_empty(len(headers), reply.numel()) if inbox is None else inbox.replies
        self._phase.start(
            lambda: (
                all_gather(replies.view(-1), reply, self._terms.routes.group)
                if inbox is None
                else inbox.back.send(reply)
            )
        )
        self._replies = replies
        return True

    def result(self) -> Tally:
        """Run the second phase if need be and put the voted chunks together."""
        self.advance()
        self._phase.wait()
        assert self._replies is not None
        voted, counts = join_replies(self._replies, self._n_bytes, self._terms.result_bits)
        return Tally(voted, self.headers(), counts)

    def headers(self) -> Tensor:
        """See `Exchange.headers`."""
        return self._received[:, : self._header_bytes]


class AllReduceVote(Exchange):
    """1. codes are spread into fields wide enough for their sum; 2. one native all-reduce adds them up, while headers
    are gathered; 3. every worker takes the result out of the fields."""

    def __init__(self, packed: Tensor, header: Tensor, terms: Terms) -> None:
        super().__init__(terms, packed.device)
        width = terms.codes.field_bits(terms.routes.workers)
        self._fields = spread_codes(packed, bits=terms.codes.bits, field_bits=width, impl=terms.impl)
        self._headers = header.new_empty(terms.routes.workers, header.numel())
        # fields never carry into one another, so wider integers give the same sums
        summands = self._fields.view(torch.int32) if width == 16 else self._fields
        group = terms.routes.group
        self._phase.start(
            lambda: all_gather(self._headers.view(-1), header, group), lambda: all_reduce(summands, group)
        )

    def headers(self) -> Tensor:
        """See `Exchange.headers`."""
        self._phase.wait()
        return self._headers

    def result(self) -> Tally:
        """Wait, count."""
        self._phase.wait()
        counts = torch.zeros(2, dtype=torch.int64, device=self._headers.device)
        return Tally(self._terms.count.of_fields(self._fields, counts), self._headers, counts)


EXCHANGES: dict[str, Callable[[Tensor, Tensor, Terms], Exchange]] = {
    "all_gather": AllGatherVote,
    "reduce_scatter": ReduceScatterVote,
    "hierarchical": HierarchicalVote,
    "all_reduce": AllReduceVote,
}
