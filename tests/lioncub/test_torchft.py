"""Replicas under torchft's manager, in real processes: some are killed, come back, and all stay bit-identical."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchft")

from elastic import Rank, run


def assert_bit_identical(everyone: list[Rank], replicas: int) -> None:
    """In every step that was taken, all ranks of one place have the same parameters after it."""
    by_step: dict[tuple[int, int], set[str]] = {}
    for rank in everyone:
        assert rank.said in ("done", ""), rank.said
        for step in rank.taken:
            by_step.setdefault((rank.place, step.number), set()).add(step.bits)
    assert by_step
    assert {key: len(found) for key, found in by_step.items() if len(found) > 1} == {}


def report(everyone: list[Rank]) -> str:
    lines = []
    for rank in everyone:
        text = " ".join(f"{s.number}{'' if s.is_taken else '!'}:{s.workers}" for s in rank.steps)
        gaps = [b.at - a.at for a, b in zip(rank.taken, rank.taken[1:])]
        first = f"{rank.taken[0].at - rank.started:.2f}" if rank.taken else "-"
        lines.append(
            f"replica {rank.replica}.{rank.place}: first after {first} s, longest pause {max(gaps, default=0):.2f} s: {text}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("use_async_quorum", [True, False])
@pytest.mark.parametrize("how", ["between steps", "after its votes left", "after answering one peer"])
def test_a_killed_replica(how: str, use_async_quorum: bool) -> None:
    everyone = run(3, deaths={2: (how, 4)}, use_async_quorum=use_async_quorum, algorithm="all_gather")
    print(report(everyone))
    assert_bit_identical(everyone, 3)
