"""The parameters and the state that an optimizer was built with, so that a step notices others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lioncub.params import Named, local_of

# what `state[p]` may hold
STATE_ENTRIES = ("exp_avg", "master", "drift", "scale")


class Holding:
    """The parameters of every param group, in their order, and the tensors of their state with where they lie.

    What it costs at each step are comparisons of identities and addresses.
    """

    def __init__(self, state: Mapping[Tensor, dict[str, Any]], param_groups: Sequence[Named]) -> None:
        self._state = state
        self._names = [[name for name, _ in named] for named in param_groups]
        self._params = [[param for _, param in named] for named in param_groups]
        params = [(name, param) for named in param_groups for name, param in named]
        self._entries = [
            (name, param, entry, tensor, local_of(tensor).data_ptr())
            for name, param in params
            for entry, tensor in _entries_of(state[param])
        ]
        # the same in columns, for methods of C to be mapped over
        self._owners = [param for _, param, *_ in self._entries]
        self._dicts = [state[param] for param in self._owners]
        self._keys = [entry for *_, entry, _, _ in self._entries]
        self._tensors = [tensor for *_, tensor, _ in self._entries]
        self._addresses = [address for *_, address in self._entries]
        # a DTensor shares the memory of this one, which is its own for ever
        self._locals = list(map(local_of, self._tensors))

    def check_parameters(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Raise RuntimeError where ``param_groups`` hold other parameters, or in another order."""
        held = self._params
        if len(param_groups) != len(held):
            raise RuntimeError(_expected("param_groups", f"{len(held)} groups", f"{len(param_groups)}"))
        for i, (group, params) in enumerate(zip(param_groups, held, strict=True)):
            now = group.get("params", ())
            if len(now) != len(params) or not all(map(is_, now, params)):
                raise RuntimeError(self._other_parameters(i, now))

    def other_state(self, state: Mapping[Tensor, dict[str, Any]]) -> str | None:
        """Describe the first entry of the state that was replaced, for an error; None where there is none."""
        if state is not self._state:
            return _expected("state", "the dictionary made at construction", "another one")
        if (
            all(map(is_, map(state.get, self._owners), self._dicts))
            and all(map(is_, map(dict.get, self._dicts, self._keys), self._tensors))
            and list(map(Tensor.data_ptr, self._locals)) == self._addresses
        ):
            return None
        for name, param, entry, tensor, address in self._entries:
            mine = self._state.get(param, {})
            if mine.get(entry) is not tensor or local_of(tensor).data_ptr() != address:
                got = "one in other memory" if mine.get(entry) is tensor else "another object"
                return (
                    f"state of parameter {name}: expected the {entry} made at construction, got {got}; change it "
                    "in place or through load_state_dict"
                )
        return None

    def _other_parameters(self, i: int, now: Sequence[Tensor]) -> str:
        params, names = self._params[i], self._names[i]
        what = f"param_groups[{i}]['params']"
        if len(now) != len(params):
            return _expected(what, f"{len(params)} parameters", f"{len(now)}")
        first = next(j for j, (one, other) in enumerate(zip(now, params, strict=True)) if one is not other)
        known = {
            id(param): name
            for named, held in zip(self._names, self._params, strict=True)
            for name, param in zip(named, held, strict=True)
        }
        return _expected(f"{what}[{first}]", f"parameter {names[first]}", known.get(id(now[first]), "another tensor"))


def _entries_of(state: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Return our entries; a user may have added others."""
    return [(entry, state[entry]) for entry in STATE_ENTRIES if entry in state]


def _expected(what: str, expected: str, got: str) -> str:
    return (
        f"{what}: expected {expected}, as when the optimizer was built or a group was added, got {got}; add parameters "
        "by add_param_group, or build a new optimizer"
    )


def keep_tensors(param_groups: Sequence[dict[str, Any]], kept: Sequence[dict[str, Tensor]]) -> None:
    """Write what was loaded into the tensors that the groups had, which graphs may hold."""
    for group, tensors in zip(param_groups, kept, strict=True):
        for name, tensor in tensors.items():
            tensor.copy_(torch.as_tensor(group[name], dtype=tensor.dtype, device=tensor.device))
            group[name] = tensor
