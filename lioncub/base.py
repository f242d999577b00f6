"""The base of both optimizers: checked arguments, momentum created at construction, exact checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from lioncub.arguments import (
    Hyperparameters,
    check_no_overlap,
    check_parameter,
    parameter_names,
    step_of,
)
from lioncub.config import Precision
from lioncub.kernels.dispatch import IMPLS, resolve_impl
from lioncub.params import local_of, local_part_of, locals_of
from lioncub.precision import Masters, keeps_small_steps, master_of
from lioncub.state import STATE_ENTRIES, Holding

# `momentum_state` of a checkpoint's param groups: of momentum that serves any rank; else "rank 1 of 4"
AVERAGED = "averaged"

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MomentumOptimizer(torch.optim.Optimizer):
    """Base of `Lion` and `LionCub`: one ``exp_avg`` per parameter, in the parameter's storage order.

    A subclass creates the momentum of a new group in ``_create_state`` and keeps what must survive in
    ``state[p]["exp_avg"]``, in the entries of ``state[p]`` that ``_optional_state`` names, and in its param groups,
    each of which has the step counter. With master weights there is ``state[p]["master"]`` too.
    """

    # further tensors that `state[p]` may hold, with what they are where a checkpoint has none
    _optional_state: ClassVar[dict[str, float]] = {}
    # whether the momentum serves any rank, and whose it is otherwise
    _is_averaged: bool = True
    _own_state: str | None = None

    def __init__(
        self,
        params: Params,
        lr: float | Tensor,
        betas: tuple[float, float],
        weight_decay: float,
        maximize: bool,
        impl: str,
        precision: Precision,
    ) -> None:
        if impl not in IMPLS:
            raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
        # the step is stored in the param groups because those survive in every kind of checkpoint
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize, "step": 0}
        Hyperparameters.of(defaults)
        self._impl, self._precision = impl, precision
        # the step to come, as last known
        self._next_step = 0
        self._holding: Holding | None = None
        super().__init__(params, defaults)
        self._hold()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer` does; where it is refused, nothing has changed."""
        self._check_held()
        super().add_param_group(param_group)
        try:
            self._check_last_group()
            self._warn_where_lr_moves_nothing(self.param_groups[-1])
            self._create_state(len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            raise
        self.param_groups[-1]["step"] = self.param_groups[0]["step"]
        if self._precision.master_weights:
            for param in self.param_groups[-1]["params"]:
                if param.dtype != torch.float32:
                    self.state[param]["master"] = master_of(param)
        if self._holding is not None:
            self._hold()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as `torch.optim.Optimizer` does; ``momentum_state`` of a group tells whose momentum it is.

        Of a sharded parameter, entries are DTensors with its mesh and placements.
        """
        for group in self.param_groups:
            group["momentum_state"] = AVERAGED if self._is_averaged else self._own_state
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint: momentum is copied bit for bit into the memory that the optimizer already uses.

        Raises ValueError or TypeError, with nothing changed, where groups, shapes or dtypes do not fit, or where it is
        that of another optimizer. Warns where it has the momentum of another rank alone.
        """
        self._check_held()
        loaded: Any = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, loaded)
            loaded = loaded if replaced is None else replaced
        groups = self._checked_groups(loaded)
        tensors = self._checked_state(loaded)
        with torch.no_grad():
            for mine, saved in tensors:
                mine.copy_(saved)
        momentum_state = groups[0].get("momentum_state", AVERAGED)
        for group, options in zip(self.param_groups, groups, strict=True):
            group.update(options)
        self._loaded_momentum(momentum_state)
        self._next_step = self._step_count
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _create_state(self, group_index: int) -> None:
        """Create the momentum of a new group; where it raises, it has changed nothing."""
        raise NotImplementedError

    def _loaded_momentum(self, momentum_state: str) -> None:
        """Note whose momentum was loaded; warn where it is another rank's."""
        if momentum_state not in (AVERAGED, self._own_state):
            expected = "averaged momentum" if self._own_state is None else f"that of {self._own_state}, or averaged"
            warnings.warn(
                f"state_dict: expected {expected}, got the momentum of {momentum_state}, and loaded it; before one "
                "file is saved for all ranks, call sync_momentum() on all of them, or save and load one of each rank",
                UserWarning,
                stacklevel=4,
            )

    @property
    def _masters(self) -> Masters:
        return Masters(self.state, self._precision.master_weights)

    @property
    def _step_count(self) -> int:
        return step_of(self.param_groups[0])

    def _advance(self) -> None:
        self._next_step = self._step_count + 1
        for group in self.param_groups:
            group["step"] = self._next_step

    def _hold(self) -> None:
        """Record the parameters and the state that there are."""
        self._holding = Holding(self.state, [self._named_group(i) for i in range(len(self.param_groups))])

    def _check_held(self) -> None:
        """Raise RuntimeError where the user has replaced them."""
        if self._holding is not None:
            self._holding.check_parameters(self.param_groups)
            other = self._holding.other_state(self.state)
            if other is not None:
                self._adopt_state(other)

    def _adopt_state(self, other: str) -> None:
        """Accept a state that was replaced, as ``other`` describes. Raises RuntimeError where it cannot be used."""
        raise RuntimeError(other)

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        """Return all parameters with the names that errors use, in the order of the groups."""
        return [pair for i in range(len(self.param_groups)) for pair in self._named_group(i)]

    def _named_group(self, index: int) -> list[tuple[str, Tensor]]:
        group = self.param_groups[index]
        return list(zip(parameter_names(group, index), group["params"], strict=True))

    def _check_last_group(self) -> None:
        Hyperparameters.of(self.param_groups[-1])
        index = len(self.param_groups) - 1
        names = parameter_names(self.param_groups[-1], index)
        for name, param in zip(names, self.param_groups[-1]["params"], strict=True):
            check_parameter(name, local_of(param))
            resolve_impl(self._impl, local_of(param).device)
        check_no_overlap(locals_of(self._named_parameters()))

    def _checked_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the saved groups' options, without parameters and their names."""
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(f"state_dict: expected keys 'state' and 'param_groups', got {list(state_dict)}")
        saved = state_dict["param_groups"]
        if not all(isinstance(group, Mapping) and "params" in group for group in saved):
            raise TypeError(f"state_dict: expected param groups with 'params', got {saved!r}")
        expected = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in saved]
        if expected != got:
            raise ValueError(f"state_dict: expected param groups of {expected} parameters, got {got}")
        kept = ("params", "param_names")
        options = [{key: deepcopy(value) for key, value in group.items() if key not in kept} for group in saved]
        for i, (mine, theirs) in enumerate(zip(self.param_groups, options, strict=True)):
            if "step" not in theirs:
                raise ValueError(
                    f"state_dict: expected that of Lion or LionCub, with a step counter in every param group, got "
                    f"{sorted(theirs)} in group {i}: that of another optimizer?"
                )
            Hyperparameters.of({**mine, **theirs})
            step_of(theirs)
        steps = [step_of(theirs) for theirs in options]
        if len(set(steps)) > 1:
            raise ValueError(f"state_dict: expected one step counter in all param groups, got {steps}")
        return options

    def _checked_state(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Return pairs of our tensors and saved ones, in the parameters' order; a frozen parameter may have none."""
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        pairs = []
        for key, (name, param) in zip(saved_ids, self._named_parameters(), strict=True):
            saved, mine = state_dict["state"].get(key, {}), self.state[param]
            self._check_entries(name, param, saved)
            if "exp_avg" not in saved and not param.requires_grad:
                # distributed checkpointing leaves out the state of frozen parameters
                continue
            for entry in (entry for entry in STATE_ENTRIES if entry in mine):
                tensor = mine[entry]
                if entry in saved:
                    _check_saved(name, entry, tensor, saved[entry])
                    part = local_part_of(f"{entry} of parameter {name}", saved[entry], tensor)
                    pairs.append((local_of(tensor), part))
                elif entry == "master":
                    pairs.append((local_of(tensor), local_of(param.detach())))
                elif entry in self._optional_state:
                    pairs.append((tensor, torch.full_like(tensor, self._optional_state[entry])))
                else:
                    raise ValueError(f"state_dict: expected {entry} of parameter {name}, got none")
        return pairs

    def _check_entries(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Raise ValueError where a parameter's saved state is not ours, or more than this optimizer keeps."""
        mine = self.state[param]
        if not isinstance(saved, Mapping):
            raise TypeError(f"state_dict: expected the state of parameter {name} as a dictionary, got {saved!r}")
        unknown = [
            entry
            for entry, value in saved.items()
            if entry not in STATE_ENTRIES and isinstance(value, Tensor) and entry not in mine
        ]
        if unknown:
            raise ValueError(
                f"state_dict: expected that of Lion or LionCub, with {', '.join(STATE_ENTRIES)} of a parameter, got "
                f"{', '.join(map(str, unknown))} of parameter {name}: that of another optimizer?"
            )
        if "master" in saved and "master" not in mine and param.dtype != torch.float32:
            raise ValueError(
                f"state_dict: expected no master of parameter {name}, since this optimizer was built without "
                "master_weights=True, got one"
            )

    def _warn_where_lr_moves_nothing(self, group: dict[str, Any]) -> None:
        """Warn, once per group, where most low-precision weights are too large for a step of lr to change them."""
        if keeps_small_steps(self._precision):
            return
        lr = float(Hyperparameters.of(group).lr)
        low = [p for p in map(local_of, map(Tensor.detach, group["params"])) if p.dtype != torch.float32 and p.numel()]
        total = sum(p.numel() for p in low)
        if not total or not lr:
            return
        stuck = sum(
            int(((p.float() - lr).to(p.dtype) == p).logical_and((p.float() + lr).to(p.dtype) == p).sum()) for p in low
        )
        if 2 * stuck > total:
            dtypes = ", ".join(sorted({str(p.dtype) for p in low}))
            warnings.warn(
                f"lr {lr:g} is too small for parameters of {dtypes}: {stuck / total:.0%} of their elements are rounded "
                "back to what they were by every step; use Precision(param_rounding='stochastic') or "
                "Precision(master_weights=True), fp32 parameters or a larger lr",
                UserWarning,
                stacklevel=4,
            )


def _check_saved(name: str, entry: str, mine: Tensor, saved: Any) -> None:
    """Raise unless what was saved of a parameter's state can be copied into this tensor."""
    if not isinstance(saved, Tensor) or saved.layout != torch.strided or saved.is_meta:
        got = type(saved).__name__ if not isinstance(saved, Tensor) else "meta" if saved.is_meta else str(saved.layout)
        raise TypeError(f"state_dict: expected {entry} of parameter {name} as a dense tensor with memory, got {got}")
    if saved.shape != mine.shape:
        raise ValueError(
            f"state_dict: expected {entry} of parameter {name} of shape {tuple(mine.shape)}, got {tuple(saved.shape)}"
        )
    if saved.dtype != mine.dtype:
        raise TypeError(f"state_dict: expected {entry} of parameter {name} of dtype {mine.dtype}, got {saved.dtype}")
