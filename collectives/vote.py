"""The vote as a collective: `vote` for one message, `Voter` for messages of one size over and over."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from lioncub.collectives.algorithms import EXCHANGES
from lioncub.collectives.codes import VOTES, Codes
from lioncub.collectives.cost import Costs, bytes_sent, choose, default_costs, rounds_pay
from lioncub.collectives.exchange import Exchange, Inbox, Tally, Terms
from lioncub.collectives.handshake import agreement
from lioncub.collectives.header import Header, check_agreement, decode_headers, encode_header, header_bytes
from lioncub.collectives.routes import Routes
from lioncub.collectives.transport import (
    AVERAGES,
    SINGLE_VOTES,
    Group,
    backend_of,
    check_carried,
    has_point_to_point,
    whole,
)
from lioncub.kernels import resolve_impl, tie_parity
from lioncub.kernels.checks import check_dense

# votes of one group that are in flight at once need messages of different tags; keyed by the group's name
_TAGS: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.cycle(range(SINGLE_VOTES, AVERAGES)))


class Voter:
    """Carries votes on ``8 * n_bytes`` codes about ``n_tensors`` tensors, without a handshake of its own.

    ``codes`` is their format. The caller has made sure, by `handshake`, that all workers' voters are alike.
    ``algorithm`` is the one that runs, ``bytes_sent`` the bytes that each worker sends per vote, with headers. Voters
    whose votes are in flight at once on the same routes need different ``tag`` numbers, below `SINGLE_VOTES`.
    ``at_once`` says whether messages between single workers are sent all at once or in rounds: unless given, rounds
    are taken where they are long (`rounds_pay`), and where one of several nodes has several workers. ``device_type``
    says where messages are, for default costs.
    """

    def __init__(
        self,
        n_bytes: int,
        *,
        n_tensors: int = 0,
        routes: Routes,
        algorithm: str = "auto",
        costs: Costs | None = None,
        impl: str = "auto",
        tag: int = 0,
        at_once: bool | None = None,
        device_type: str = "cpu",
        codes: Codes = VOTES,
    ) -> None:
        if n_bytes % 8:
            raise ValueError(f"n_bytes: expected a multiple of 8 (a padded message), got {n_bytes}")
        self.n_bytes, self.n_tensors, self.routes = n_bytes, n_tensors, routes
        self.header_bytes = header_bytes(n_tensors)
        costs = costs or default_costs(routes.topology, backend_of(routes.group, device_type))
        self.codes = codes
        self.algorithm = choose(algorithm, n_bytes, costs, self.header_bytes, codes)
        self.bytes_sent = bytes_sent(self.algorithm, n_bytes, routes.topology, self.header_bytes, codes)
        self._impl, self._tag = impl, tag
        if at_once is None:
            seconds = costs.seconds(self.algorithm, n_bytes, self.header_bytes, codes)
            # single messages would cross the link of a node with several workers once for each of them, a ring once
            one_level = routes.topology.n_nodes in (1, routes.workers)
            at_once = one_level and not rounds_pay(seconds, routes.workers)
        self._at_once = at_once and self.algorithm == "reduce_scatter"
        self._inbox: Inbox | None = None

    def expect(self, device: torch.device) -> None:
        """Post the receives of the next vote, if that is of use; all workers will start it."""
        if self._at_once and self._inbox is None and has_point_to_point(self.routes.group, device):
            self._inbox = Inbox(self.routes, self.n_bytes, self.header_bytes, self._tag, self.codes)

    def start(
        self, packed: Tensor, header: Header, status: Tensor | None = None, *, parity: int | None = None
    ) -> Exchange:
        """Send ``packed``, uint8[n_bytes * codes.bits]; ties follow ``parity``, that of ``header.step`` unless given.

        ``status`` (int32[n_tensors], non-zero where a tensor is not finite) travels in the header.
        """
        assert packed.numel() == self.n_bytes * self.codes.bits
        encoded = encode_header(header, packed.device, status)
        self.expect(packed.device)
        inbox, self._inbox = self._inbox, None
        parity = tie_parity(header.step) if parity is None else parity
        terms = Terms(parity, self.routes, self._impl, self._tag, inbox, self.codes)
        return EXCHANGES[self.algorithm](packed, encoded, terms)


class PendingVote:
    """Handle of a vote under way."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def wait(self) -> Tensor:
        """The packed result, as of `vote`. Raises WorkersDisagreeError on all workers where they disagree."""
        tally: Tally = self._exchange.result()
        check_agreement(decode_headers(tally.headers, 0))
        return tally.packed


def vote_async(
    packed: Tensor,
    *,
    group: Group = None,
    routes: Routes | None = None,
    algorithm: str = "auto",
    parity: int = 0,
    codes: Codes = VOTES,
    impl: str = "auto",
) -> PendingVote:
    """Start `vote` and return a handle, whose ``wait()`` gives the result; the handshake is over on return.

    Handles started by one worker must be waited for in the same order on all workers.
    """
    whole_group = group if routes is None else getattr(routes, "group", group)
    with agreement(whole_group, packed.device if isinstance(packed, Tensor) else None) as facts:
        routes = _check_vote(packed, group, routes, algorithm, parity, codes, impl)
        facts |= {
            "the bytes of the message": packed.numel(),
            "the device type": packed.device.type,
            "the algorithm": algorithm,
            "the nodes": routes.topology.nodes,
            "the parity": parity & 1,
            "the format of codes": codes,
        }
        voter = Voter(
            packed.numel() // codes.bits,
            routes=routes,
            algorithm=algorithm,
            impl=impl,
            device_type=packed.device.type,
            codes=codes,
        )
    # the same on all workers, since those that disagreed have raised
    voter._tag = next(_TAGS[whole(whole_group).group_name])
    return PendingVote(voter.start(packed, Header(), parity=parity & 1))


def _check_vote(
    packed: Tensor,
    group: Group,
    routes: Routes | None,
    algorithm: str,
    parity: int,
    codes: Codes,
    impl: str,
) -> Routes:
    """The routes of a vote. Raises TypeError or ValueError for arguments that are impossible."""
    if not isinstance(codes, Codes):
        raise TypeError(f"codes: expected Codes(...), got {type(codes).__name__}")
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected a uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
    if packed.dim() != 1 or not packed.is_contiguous() or packed.numel() % (8 * codes.bits):
        raise ValueError(
            f"packed: expected a contiguous tensor of shape (B,), B a multiple of {8 * codes.bits}, got shape "
            f"{tuple(packed.shape)} with strides {packed.stride()}"
        )
    check_dense("packed", packed, (torch.uint8,))
    if isinstance(parity, bool) or not isinstance(parity, int):
        raise TypeError(f"parity: expected an integer, got {type(parity).__name__}")
    resolve_impl(impl, packed.device)
    if routes is None:
        routes = Routes.flat(group)
    elif not isinstance(routes, Routes):
        raise TypeError(f"routes: expected Routes, got {type(routes).__name__}")
    elif group is not None and routes.group is not group:
        raise ValueError("group: expected none, or that of routes, got another")
    check_carried("packed", packed, routes.group)
    return routes


def vote(
    packed: Tensor,
    *,
    group: Group = None,
    routes: Routes | None = None,
    algorithm: str = "auto",
    parity: int = 0,
    codes: Codes = VOTES,
    impl: str = "auto",
) -> Tensor:
    """The exact majority of all workers' packed one-bit codes (Lion Cub, arXiv 2411.16462, section 1).

    A collective call: every worker of ``group`` calls it with a message of the same size. A handshake of
    `HANDSHAKE_BYTES` per worker goes first, so that workers that disagree on size, algorithm or parity, or one of whom
    has wrong arguments, all raise instead of hanging; those who vote on one size over and over save it with `Voter`.

    Args:
        packed: uint8[B] of packed codes, B a multiple of 8 * ``codes.bits``; not changed.
        group: process group; the default group unless given.
        routes: the group with what is known of its nodes, made once by `Routes.find` or `Routes.of_mesh`.
        algorithm: "all_gather" (one phase, everyone votes on everything), "reduce_scatter" (all-to-all of chunks,
            vote, all-gather), "hierarchical" (the same in two levels, where ``routes`` has nodes), "all_reduce" (a
            native sum of counts) or "auto" (the one that the cost model finds fastest).
        parity: a tie at code j gives bit (j + parity) & 1; `tie_parity` gives that of a step.
        codes: what ``packed`` holds and what is made of it: signs and their majority unless given.
        impl: implementation of the voting kernels.

    Returns:
        uint8[B], for other ``codes`` uint8[B * codes.result_bits(N) // codes.bits]: the same on every worker. Raises
        WorkersDisagreeError on all workers where they disagree.
    """
    pending = vote_async(
        packed,
        group=group,
        routes=routes,
        algorithm=algorithm,
        parity=parity,
        codes=codes,
        impl=impl,
    )
    return pending.wait()
