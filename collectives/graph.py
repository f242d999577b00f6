"""The vote as torch's functional collectives, which a compiler traces and a CUDA graph captures.

No message has a header: what workers must agree on travels by itself, once per step. Nothing here waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.codes import VOTES
from lioncub.collectives.handshake import WIRE_VERSION
from lioncub.collectives.traffic import RESULT_HEADER_BYTES, bytes_sent, chunk_bytes
from lioncub.collectives.transport import Group, backend_of, whole, world_size_of
from lioncub.kernels import majority_of_fields, majority_vote, spread_codes

GRAPH_ALGORITHMS = ("all_gather", "reduce_scatter", "all_reduce")


class GraphVote:
    """One bucket's votes on ``8 * n_bytes`` signs: `start`, `advance`, `finish`, in the same order on all workers."""

    def __init__(self, n_bytes: int, algorithm: str, group: Group, device: torch.device, impl: str) -> None:
        if algorithm not in GRAPH_ALGORITHMS:
            raise ValueError(f"algorithm: expected one of {GRAPH_ALGORITHMS} with capturable=True, got {algorithm!r}")
        self.algorithm, self._n_bytes, self._impl = algorithm, n_bytes, impl
        self._group_name, self._workers = whole(group).group_name, world_size_of(group)
        self._gather = Gather(group, device)
        self._chunk = chunk_bytes(n_bytes, self._workers)
        self._field_bits = VOTES.field_bits(self._workers) if algorithm == "all_reduce" else 0
        # copied once, since a captured vote copies nothing from the host; pad codes of chunks are 0 on every worker
        padding = 8 * (self._workers * self._chunk - n_bytes)
        self._padding = torch.tensor([0, padding], dtype=torch.int64, device=device)
        self._head = torch.tensor([WIRE_VERSION, 0], dtype=torch.int64, device=device)

    @property
    def bytes_sent(self) -> int:
        """Bytes that each worker sends per vote."""
        return bytes_sent(self.algorithm, self._n_bytes, self._workers)

    def start(self, packed: Tensor) -> Tensor:
        """Send ``packed``, uint8[n_bytes]; gives what is under way."""
        if self.algorithm == "all_gather":
            return self._gather(packed)
        if self.algorithm == "reduce_scatter":
            padding = packed.new_zeros(self._workers * self._chunk - self._n_bytes)
            sizes = [self._chunk] * self._workers
            message = torch.cat([packed, padding])
            sent: Tensor = torch.ops._c10d_functional.all_to_all_single(message, sizes, sizes, self._group_name)
            return sent
        fields = spread_codes(packed, bits=1, field_bits=self._field_bits, impl=self._impl)
        # fields never carry into one another, so wider integers give the same sums
        summands = fields.view(torch.int32) if self._field_bits == 16 else fields
        summed: Tensor = torch.ops._c10d_functional.all_reduce(summands, "sum", self._group_name)
        return summed

    def advance(self, pending: Tensor, parity: Tensor) -> Tensor:
        """Vote on this worker's chunk and send the result, where votes travel in two phases."""
        if self.algorithm != "reduce_scatter":
            return pending
        counts = pending.new_zeros(2, dtype=torch.int64)
        ballots = arrived(pending).view(self._workers, self._chunk)
        voted = majority_vote(ballots, parity=parity, counts=counts, impl=self._impl)
        words = torch.cat([self._head, counts])
        assert words.numel() * words.element_size() == RESULT_HEADER_BYTES
        return self._gather(torch.cat([words.view(torch.uint8), voted]))

    def finish(self, pending: Tensor, parity: Tensor) -> tuple[Tensor, Tensor]:
        """The majority uint8[n_bytes] and int64[2] (ties, unanimous), pad codes of the message as unanimous."""
        received = arrived(pending)
        if self.algorithm == "reduce_scatter":
            replies = received.view(self._workers, RESULT_HEADER_BYTES + self._chunk)
            words = replies[:, :RESULT_HEADER_BYTES].contiguous().view(torch.int64)
            voted = replies[:, RESULT_HEADER_BYTES:].reshape(-1)[: self._n_bytes]
            return voted, words[:, 2:].sum(0) - self._padding
        counts = received.new_zeros(2, dtype=torch.int64)
        if self.algorithm == "all_gather":
            ballots = received.view(self._workers, self._n_bytes)
            return majority_vote(ballots, parity=parity, counts=counts, impl=self._impl), counts
        voted = majority_of_fields(
            received.view(torch.uint8),
            field_bits=self._field_bits,
            voters=self._workers,
            parity=parity,
            counts=counts,
            impl=self._impl,
        )
        return voted, counts


class Gather:
    """Starts gathering every worker's message [M], on ``device``, into [N * M] in rank order; `arrived` waits for it.

    On Gloo by an all-to-all, which sends as many bytes. The functional all-gather aborted one in eight runs of 4
    workers there (torch 2.13): it is a collective whose name is too long for the string that the group's two threads
    both write, without a lock, when they are done, and each of them frees the other's (seen by AddressSanitizer).
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group_name, self._workers = whole(group).group_name, world_size_of(group)
        self._is_gloo = backend_of(group, device.type) == "gloo"

    def __call__(self, message: Tensor) -> Tensor:
        """See the class."""
        if self._is_gloo:
            sizes = [message.numel()] * self._workers
            sent: Tensor = torch.ops._c10d_functional.all_to_all_single(
                message.repeat(self._workers), sizes, sizes, self._group_name
            )
            return sent
        gathered: Tensor = torch.ops._c10d_functional.all_gather_into_tensor(message, self._workers, self._group_name)
        return gathered


def arrived(pending: Tensor) -> Tensor:
    """What was under way, once it is there; on a device the host does not wait."""
    there: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
    return there
