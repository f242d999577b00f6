"""What both optimizers are made of: checked arguments, momentum created at construction, exact checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, check_no_overlap, check_parameter, parameter_names
from lioncub.kernels.backends import IMPLS, resolve_impl
from lioncub.masters import Masters, master_of
from lioncub.precision import Precision

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MomentumOptimizer(torch.optim.Optimizer):
    """Base of `Lion` and `LionCub`: one ``exp_avg`` per parameter, in the parameter's storage order.

    A subclass creates the momentum of a new group in ``_create_state`` and keeps what must survive in
    ``state[p]["exp_avg"]``, in the entries of ``state[p]`` that ``_optional_state`` names, and in its param groups,
    each of which has the step counter. With master weights there is ``state[p]["master"]`` too.
    """

    # further tensors that `state[p]` may hold, with what they are where a checkpoint has none
    _optional_state: ClassVar[dict[str, float]] = {}

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
        # the step stands in the param groups because those survive in every kind of checkpoint
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize, "step": 0}
        Hyperparameters.of(defaults)
        self._impl, self._precision = impl, precision
        # of parameters that are known to be their masters, rounded
        self._versions: dict[Tensor, int] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer` does; where it is refused, nothing has changed."""
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

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint: momentum is copied bit for bit into the memory that the optimizer already uses.

        Raises ValueError or TypeError, with nothing changed, where groups, shapes or dtypes do not fit.
        """
        loaded: Any = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, loaded)
            loaded = loaded if replaced is None else replaced
        groups = self._checked_groups(loaded)
        tensors = self._checked_state(loaded)
        with torch.no_grad():
            for mine, saved in tensors:
                mine.copy_(saved)
        for group, options in zip(self.param_groups, groups, strict=True):
            group.update(options)
        # a parameter that is loaded, before or after, counts for more than a master
        self._versions.clear()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _create_state(self, group_index: int) -> None:
        """Make the momentum of a new group; where it raises, it has changed nothing."""
        raise NotImplementedError

    @property
    def _masters(self) -> Masters:
        return Masters(self.state, self._versions)

    def _refresh_masters(self) -> None:
        if self._precision.master_weights:
            self._masters.refresh(self._named_parameters())

    @property
    def _step_count(self) -> int:
        return int(self.param_groups[0]["step"])

    def _advance(self) -> None:
        step = self._step_count + 1
        for group in self.param_groups:
            group["step"] = step

    def _named_parameters(self) -> list[tuple[str, Tensor]]:
        """All parameters with the names that errors use, in the order of the groups."""
        return [
            pair
            for i, group in enumerate(self.param_groups)
            for pair in zip(parameter_names(group, i), group["params"], strict=True)
        ]

    def _check_last_group(self) -> None:
        Hyperparameters.of(self.param_groups[-1])
        index = len(self.param_groups) - 1
        names = parameter_names(self.param_groups[-1], index)
        for name, param in zip(names, self.param_groups[-1]["params"], strict=True):
            check_parameter(name, param)
            resolve_impl(self._impl, param.device)
        check_no_overlap(self._named_parameters())

    def _checked_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The saved groups' options, without parameters and their names."""
        saved = state_dict["param_groups"]
        expected = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in saved]
        if expected != got:
            raise ValueError(f"state_dict: expected param groups of {expected} parameters, got {got}")
        kept = ("params", "param_names")
        options = [{key: deepcopy(value) for key, value in group.items() if key not in kept} for group in saved]
        for mine, theirs in zip(self.param_groups, options, strict=True):
            Hyperparameters.of({**mine, **theirs})
        return options

    def _checked_state(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of this optimizer's tensors and saved ones, in the parameters' order; a frozen one may have none."""
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        pairs = []
        for key, (name, param) in zip(saved_ids, self._named_parameters(), strict=True):
            saved, mine = state_dict["state"].get(key, {}), self.state[param]
            if "exp_avg" not in saved and not param.requires_grad:
                # distributed checkpointing leaves out the state of frozen parameters
                continue
            for entry, option in (("residual", "error feedback"), ("master", "master_weights=True")):
                if entry in saved and entry not in mine and (entry == "residual" or param.dtype != torch.float32):
                    raise ValueError(
                        f"state_dict: expected no {entry} of parameter {name}, since this optimizer was built without "
                        f"{option}, got one"
                    )
            for entry, tensor in mine.items():
                if entry in saved:
                    _check_saved(name, entry, tensor, saved[entry])
                    pairs.append((tensor, saved[entry]))
                elif entry == "master":
                    pairs.append((tensor, param.detach()))
                elif entry in self._optional_state:
                    pairs.append((tensor, torch.full_like(tensor, self._optional_state[entry])))
                else:
                    raise ValueError(f"state_dict: expected {entry} of parameter {name}, got none")
        return pairs

    def _warn_where_lr_moves_nothing(self, group: dict[str, Any]) -> None:
        """Warn, once per group, where most low-precision weights are too large for a step of lr to change them."""
        if self._precision.keeps_small_steps:
            return
        lr = Hyperparameters.of(group).lr
        low = [p.detach() for p in group["params"] if p.dtype != torch.float32 and p.numel()]
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
                "back to what they were by every step; use param_rounding='stochastic', master_weights=True, fp32 "
                "parameters or a larger lr",
                UserWarning,
                stacklevel=4,
            )


def _check_saved(name: str, entry: str, mine: Tensor, saved: Tensor) -> None:
    """Raise unless a saved tensor of a parameter's state has this one's shape and dtype."""
    if saved.shape != mine.shape:
        raise ValueError(
            f"state_dict: expected {entry} of parameter {name} of shape {tuple(mine.shape)}, got {tuple(saved.shape)}"
        )
    if saved.dtype != mine.dtype:
        raise TypeError(f"state_dict: expected {entry} of parameter {name} of dtype {mine.dtype}, got {saved.dtype}")
