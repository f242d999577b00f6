"""What a step alone does not show: votes that are always unanimous, and gradients that never come."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lioncub.collectives import WorkersDisagreeError
from lioncub.collectives.transport import Group, rank_of
from lioncub.replicas import check_equal

if TYPE_CHECKING:
    from lioncub.step import StepEngine

# steps in a row that warn
_UNANIMOUS_STEPS, _EMPTY_STEPS = 5, 3
# votes are looked at in the first steps of so many; in the last of these the host waits for what was found
_PERIOD = 1000
# fewer votes may be unanimous by chance
_LEAST_VOTES = 1024


class Watch:
    """Warns once where gradients seem to be averaged before the vote, and once where there are none."""

    def __init__(self) -> None:
        self._steps = self._empty = 0
        self._unanimous: list[Tensor] = []
        self._has_warned_of_votes = self._has_warned_of_gradients = self._has_compared = False

    def note(self, engine: StepEngine, n_active: int) -> None:
        """Look at a step that was taken, in which ``n_active`` parameters moved."""
        self._note_gradients(n_active)
        is_looked_at = self._steps % _PERIOD < _UNANIMOUS_STEPS
        self._steps += 1
        if self._has_warned_of_votes or not is_looked_at or not engine.counts:
            return
        is_unanimous = _are_unanimous(engine)
        self._unanimous = [] if is_unanimous is None else [*self._unanimous, is_unanimous]
        if len(self._unanimous) < _UNANIMOUS_STEPS:
            return
        found, self._unanimous = bool(torch.stack(self._unanimous).all()), []
        if not found:
            return
        self._has_warned_of_votes = True
        if engine.members.rank == 0:
            warnings.warn(
                f"all votes of the last {_UNANIMOUS_STEPS} steps were unanimous, so {engine.members.workers} workers "
                "have the same gradients, and voting on them saves nothing. Is the model wrapped in "
                "DistributedDataParallel without lioncub.keep_gradients_local(model), or sharded by fully_shard on a "
                "mesh that replicates too? Both average gradients before the vote. Do all workers read the same data?",
                UserWarning,
                stacklevel=5,
            )

    def compare(self, plain: Callable[[], Sequence[tuple[str, Tensor]]], group: Group) -> None:
        """Compare parameters that are no shards over all ranks that share some, once; a collective in that step."""
        if self._has_compared or self._steps < _UNANIMOUS_STEPS:
            return
        self._has_compared, named = True, plain()
        if not named:
            return
        try:
            check_equal(named, group=group)
        except WorkersDisagreeError as error:
            if rank_of(group) == 0:
                warnings.warn(
                    f"{error}; ranks that hold shards of one model vote on whole parameters each with their own "
                    "counterparts on other nodes, so these must have the same gradients on all ranks of a mesh: shard "
                    "them too, as fully_shard(model) does, or reduce their gradients over the mesh before the step",
                    UserWarning,
                    stacklevel=5,
                )

    def _note_gradients(self, n_active: int) -> None:
        self._empty = 0 if n_active else self._empty + 1
        if self._empty < _EMPTY_STEPS or self._has_warned_of_gradients:
            return
        self._has_warned_of_gradients = True
        warnings.warn(
            f"no parameter had a gradient on any worker in the last {_EMPTY_STEPS} steps, so nothing moved. Are these "
            "still the model's parameters? Build the optimizer when the model has been moved, cast or prepared",
            UserWarning,
            stacklevel=5,
        )


def _are_unanimous(engine: StepEngine) -> Tensor | None:
    """Return whether all ranks gave all signs alike, on the device; None where there are too few to tell."""
    votes = [
        (voter.counted_codes, counts)
        for voter, counts in zip(engine.voters, engine.counts, strict=True)
        if voter.form.bits == 1
    ]
    total = sum(codes for codes, _ in votes)
    if total < _LEAST_VOTES:
        return None
    return torch.stack([counts[1] for _, counts in votes]).sum() == total
