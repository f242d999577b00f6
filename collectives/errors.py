"""Errors that all workers raise alike."""

from __future__ import annotations

from collections.abc import Sequence


class WorkersDisagreeError(RuntimeError):
    """Workers of one group are not doing the same thing: every one of them raises this, with the same text.

    Where one cannot do it at all, that one raises its own error and all others this, with its rank and what it said.
    """


def by_value(values: Sequence[object]) -> str:
    """Which ranks have which value, e.g. ``ranks 0, 1, 3: 0.1; rank 2: 0.2``."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return "; ".join(f"{_ranks(holders)}: {value}" for value, holders in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
