"""The vote as a collective: `vote` for one message, `Voter` for messages of one size over and over."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from lioncub.collectives.agreement import agreement
from lioncub.collectives.algorithms import VOTES_BY, Exchange, VoteResult, VoteSpec
from lioncub.collectives.codes import VOTES, CodeFormat
from lioncub.collectives.cost import Costs, bytes_sent, choose, chunk_bytes, default_costs, rounds_pay
from lioncub.collectives.groups import ProcessGroups
from lioncub.collectives.transport import (
    SINGLE_AVERAGE,
    SINGLE_VOTES,
    Group,
    Transport,
    backend_of,
    check_carried,
    whole,
)
from lioncub.kernels import resolve_impl
from lioncub.kernels.checks import check_dense

# votes of one group that are in flight at once need messages of different tags; keyed by the group's name
_TAGS: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.cycle(range(SINGLE_VOTES, SINGLE_AVERAGE)))


class Voter:
    """Carries votes on ``8 * n_bytes`` codes without a handshake: all ranks' voters must be the same.

    ``algorithm`` is the one that runs, ``bytes_sent`` the bytes that each rank sends per vote.

    Args:
        n_bytes: bytes of one bit per code, a multiple of 8.
        groups: the process groups.
        device: of messages.
        algorithm: as in `vote`.
        costs: the cost model, for "auto"; stated defaults unless given.
        form: the format of codes.
        impl: implementation of the kernels.
        tag: number of the voter, below `PAYLOADS`; voters in use at once on the same groups need different ones.
        eager: whether messages between single ranks are sent all at once or in pairs: unless given, in pairs where
            they are long (`rounds_pay`), and where one of several nodes has several ranks.
        functional: as in `Transport`.
    """

    def __init__(
        self,
        n_bytes: int,
        *,
        groups: ProcessGroups,
        device: torch.device,
        algorithm: str = "auto",
        costs: Costs | None = None,
        form: CodeFormat = VOTES,
        impl: str = "auto",
        tag: int = 0,
        eager: bool | None = None,
        functional: bool = False,
    ) -> None:
        if n_bytes % 8:
            raise ValueError(f"n_bytes: expected a multiple of 8 (a padded message), got {n_bytes}")
        self.n_bytes, self.form, workers = n_bytes, form, groups.workers
        costs = costs or default_costs(groups.topology, backend_of(groups.group, device.type))
        self.algorithm = choose(algorithm, n_bytes, costs, form)
        self.bytes_sent = bytes_sent(self.algorithm, n_bytes, groups.topology, form)
        # codes that are counted, pad codes of chunks included
        chunked = self.algorithm in ("reduce_scatter", "hierarchical")
        self.counted_codes = 8 * (workers * chunk_bytes(n_bytes, workers) if chunked else n_bytes)
        if eager is None:
            # single messages would cross the link of a node with several ranks once for each of them, a ring once
            one_level = groups.topology.n_nodes in (1, workers)
            eager = one_level and not rounds_pay(costs.seconds(self.algorithm, n_bytes, form), workers)
        whole, intra, inter = (
            None if group is None and level else Transport(group, device, functional=functional)
            for level, group in enumerate((groups.group, groups.intra, groups.inter))
        )
        assert whole is not None
        self._spec = VoteSpec(n_bytes, form, groups.topology, whole, intra, inter, impl, tag, eager)
        self._expected: Exchange[VoteResult] | None = None

    def expect(self) -> None:
        """Post the receives of the next vote, if that is of use; all ranks will start it."""
        if self._expected is None:
            phases, n_phases = VOTES_BY[self.algorithm]
            self._expected = Exchange(phases(self._spec), n_phases)

    def prepare(self) -> Exchange[VoteResult]:
        """Return the exchange of one vote, which is started by (packed, parity) as in `start`."""
        self.expect()
        exchange, self._expected = self._expected, None
        assert exchange is not None
        return exchange

    def start(self, packed: Tensor, parity: int | Tensor) -> Exchange[VoteResult]:
        """Send ``packed``, uint8[n_bytes * bits], which must not change until the result is there.

        A tie at code j gives bit (j + parity) & 1.
        """
        assert packed.numel() == self.n_bytes * self.form.bits
        exchange = self.prepare()
        exchange.start((packed, parity))
        return exchange


class PendingVote:
    """Handle of a vote in progress."""

    def __init__(self, exchange: Exchange[VoteResult]) -> None:
        self._exchange = exchange

    def wait(self) -> Tensor:
        """Return the packed result, as `vote`."""
        return self._exchange.result().packed


def vote_async(
    packed: Tensor,
    *,
    group: Group = None,
    groups: ProcessGroups | None = None,
    algorithm: str = "auto",
    parity: int = 0,
    form: CodeFormat = VOTES,
    impl: str = "auto",
) -> PendingVote:
    """Start `vote` and return a handle, whose ``wait()`` gives the result; the handshake is over on return.

    Handles started by one rank must be waited for in the same order on all ranks.
    """
    whole_group = group if groups is None else getattr(groups, "group", group)
    with agreement(whole_group, packed.device if isinstance(packed, Tensor) else None) as fingerprint:
        groups = _check_vote(packed, group, groups, parity, form, impl)
        fingerprint |= {
            "the bytes of the message": packed.numel(),
            "the device type": packed.device.type,
            "the algorithm": algorithm,
            "the nodes": groups.topology.nodes,
            "the parity": parity & 1,
            "the format of codes": form,
        }
        n_bytes, costs = (
            packed.numel() // form.bits,
            default_costs(groups.topology, backend_of(groups.group, packed.device.type)),
        )
        algorithm = choose(algorithm, n_bytes, costs, form)
    # only now, since a rank whose vote is refused must not take a number that others do not
    tag = next(_TAGS[whole(whole_group).group_name])
    voter = Voter(
        n_bytes,
        groups=groups,
        device=packed.device,
        algorithm=algorithm,
        costs=costs,
        form=form,
        impl=impl,
        tag=tag,
    )
    return PendingVote(voter.start(packed, parity & 1))


def _check_vote(
    packed: Tensor, group: Group, groups: ProcessGroups | None, parity: int, form: CodeFormat, impl: str
) -> ProcessGroups:
    """Return the groups of a vote. Raises TypeError or ValueError for arguments that are impossible."""
    if not isinstance(form, CodeFormat):
        raise TypeError(f"form: expected CodeFormat(...), got {type(form).__name__}")
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected a uint8 tensor, got {getattr(packed, 'dtype', type(packed).__name__)}")
    if packed.dim() != 1 or not packed.is_contiguous() or packed.numel() % (8 * form.bits):
        raise ValueError(
            f"packed: expected a contiguous tensor of shape (B,), B a multiple of {8 * form.bits}, got shape "
            f"{tuple(packed.shape)} with strides {packed.stride()}"
        )
    check_dense("packed", packed, (torch.uint8,))
    if isinstance(parity, bool) or not isinstance(parity, int):
        raise TypeError(f"parity: expected an integer, got {type(parity).__name__}")
    resolve_impl(impl, packed.device)
    if groups is None:
        groups = ProcessGroups.flat(group)
    elif not isinstance(groups, ProcessGroups):
        raise TypeError(f"groups: expected ProcessGroups, got {type(groups).__name__}")
    elif group is not None and groups.group is not group:
        raise ValueError("group: expected none, or that of groups, got another")
    check_carried("packed", packed, groups.group)
    return groups


def vote(
    packed: Tensor,
    *,
    group: Group = None,
    groups: ProcessGroups | None = None,
    algorithm: str = "auto",
    parity: int = 0,
    form: CodeFormat = VOTES,
    impl: str = "auto",
) -> Tensor:
    """Return the exact majority of all ranks' packed one-bit codes (Lion Cub, arXiv 2411.16462, section 1).

    A collective: every rank of ``group`` calls it with a message of the same size. A handshake of `HANDSHAKE_BYTES` per
    rank goes first, so that ranks that disagree on size, algorithm or parity, or one of which has wrong arguments, all
    raise instead of hanging; those who vote on one size over and over save it with `Voter`.

    Args:
        packed: uint8[B] of packed codes, B a multiple of 8 * ``form.bits``; not changed.
        group: process group; the default group unless given.
        groups: the group with its nodes, created once by `ProcessGroups.find` or `ProcessGroups.of_mesh`.
        algorithm: "all_gather" (one phase, everyone votes on everything), "reduce_scatter" (all-to-all of chunks,
            vote, all-gather), "hierarchical" (the same in two levels, where ``groups`` has nodes), "all_reduce" (a
            native sum of counts) or "auto" (the one that the cost model finds fastest).
        parity: a tie at code j gives bit (j + parity) & 1; `tie_parity` gives that of a step.
        form: the format of ``packed`` and of the result: signs and their majority unless given.
        impl: implementation of the voting kernels.

    Returns:
        uint8[B], for other formats uint8[B * form.result_bits(N) // form.bits]: the same on every rank. Raises
        WorkersDisagreeError on all ranks where they disagree.
    """
    pending = vote_async(packed, group=group, groups=groups, algorithm=algorithm, parity=parity, form=form, impl=impl)
    return pending.wait()
