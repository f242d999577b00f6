"""Ranks whose update is zero abstain: they cancel one another and never outvote a rank with an opinion (rule 2)."""

from __future__ import annotations

import itertools

import pytest
import torch
from optimizers import LionCub
from torch import Tensor, nn

from lioncub import SignVote
from lioncub.kernels import abstain_parity, majority_vote, pack_signs, tie_parity, unpack_signs
from lioncub.simulate import Workers

IMPLS = ("reference", "cpu", "triton")
# elements of a case: both parities of their index, and more than a word
ELEMENTS = 66


def cases(workers: int) -> list[tuple[tuple[int, ...], float]]:
    """(Ranks with an opinion, which it is): none, each one, each two, up and down."""
    ranks = range(workers)
    some = [(r,) for r in ranks] + list(itertools.combinations(ranks, 2))
    return [((), 1.0), *((chosen, sign) for chosen in some for sign in (1.0, -1.0))]


def directions(workers: int, steps: int, impl: str) -> Tensor:
    """+1 or -1 of [steps, cases, elements]: what the ranks decide."""
    updates = torch.zeros(workers, len(cases(workers)), ELEMENTS)
    for i, (chosen, sign) in enumerate(cases(workers)):
        updates[list(chosen), i] = sign
    codes = [[pack_signs(update, parity=parity, impl=impl) for parity in (0, 1)] for update in updates]
    found = []
    for t in range(steps):
        packed = torch.stack([codes[r][abstain_parity(t, r, workers) & 1] for r in range(workers)])
        voted = majority_vote(packed, parity=tie_parity(t), impl=impl)
        found.append(unpack_signs(voted, updates[0].numel(), impl=impl).view(updates[0].shape))
    return torch.stack(found)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("workers", range(2, 10))
def test_an_opinion_moves_an_element_and_none_leaves_it(workers: int, impl: str) -> None:
    # 4 * workers steps are a period: rotations take 4 steps each, ties 4 in all
    period = 4 * workers
    moved = directions(workers, 2 * period, impl)
    assert torch.equal(moved[:period], moved[period:])
    paths = moved.cumsum(0)
    for i, (chosen, sign) in enumerate(cases(workers)):
        if not chosen:
            assert paths[:, i].abs().max() <= 2
            assert not paths[period - 1, i].any()
            continue
        per_step = sign * paths[period - 1, i] / period
        most = 0.67 if len(chosen) == 1 and workers > 2 else 1.0
        assert per_step.min() >= 0.5, (chosen, sign)
        assert per_step.max() <= most, (chosen, sign)


def rows_that_one_rank_sees(rank: int, group: object, algorithm: str, steps: int) -> Tensor:
    """Each rank sees a row of an embedding of its own, and the last row is seen by none."""
    table = nn.Embedding(5, 6)
    nn.init.zeros_(table.weight)
    options = {"compression": SignVote(), "algorithm": algorithm, "broadcast": False}
    opt = LionCub(table.parameters(), lr=1.0, betas=(0.0, 0.0), process_group=group, **options)
    for _ in range(steps):
        opt.zero_grad()
        ((-1.0) ** rank * table(torch.tensor([rank])).sum()).backward()
        opt.step()
    return table.weight.detach()


@pytest.mark.parametrize("algorithm", ["all_gather", "reduce_scatter", "all_reduce", "hierarchical"])
def test_rows_of_an_embedding_that_one_rank_of_four_sees_learn(algorithm: str) -> None:
    steps = 16
    with Workers(4, local_size=2) as workers:
        tables = workers.run(lambda rank, group: rows_that_one_rank_sees(rank, group, algorithm, steps))
    assert all(torch.equal(table, tables[0]) for table in tables)
    for rank in range(4):
        way = -((-1.0) ** rank) * tables[0][rank] / steps
        assert way.min() >= 0.5
        assert way.max() <= 0.67
    assert tables[0][4].abs().max() <= 2
