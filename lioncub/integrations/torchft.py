"""Votes that survive lost workers: a `LionCub` whose ranks are those of torchft's quorum.

The manager's process group is an ordinary Gloo group that torchft makes for every quorum, and votes use it as it is.
"""

from __future__ import annotations

import gc
import logging
import traceback
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchft import Manager, ProcessGroupGloo

from lioncub.base import AVERAGED
from lioncub.collectives.transport import PeerLostError, Transport
from lioncub.optimizer import LionCub
from lioncub.params import like_param, local_of
from lioncub.transaction import PendingStep

_LOG = logging.getLogger("lioncub")
# what a GradScaler sets for the duration of a step
_SCALER = ("grad_scale", "found_inf")
_managers: weakref.WeakSet[Manager] = weakref.WeakSet()


class FaultTolerant(torch.optim.Optimizer):
    """A `LionCub` whose votes go on without ranks that are lost, and with ranks that come back; as torchft's Optimizer.

    In each step: `zero_grad` starts the quorum; `step` takes the quorum's ranks into the vote, proposes, confirms that
    all ranks have all votes, and commits where the manager does. Where a rank is lost before, no rank takes the step,
    and the next quorum goes on without it. A replica that comes back gets parameters, momentum and hyperparameters from
    another one. Of replicas of several ranks, those with the same shard vote together, and all decide together.

    Args:
        opt: an optimizer that votes alone so far: the quorum chooses with whom. Of sharded parameters, its process
            group holds this rank alone, as ``mesh.get_group("replicate")`` of a mesh of one replica.
        manager: torchft's manager, of ``ProcessGroupGloo``. Parameters and state of ``opt`` are registered with it;
            what else replicas have in common, as schedulers, is for the caller to register.

    Raises TypeError or ValueError for other optimizers and managers.
    """

    _step_supports_amp_scaling = True

    def __init__(self, opt: LionCub, manager: Manager) -> None:
        _check(opt, manager)
        self.optim, self.manager = opt, manager
        # of whom the vote's ranks are
        self._group: dist.ProcessGroup | None = None
        self._abstains = self._committed = False
        manager.register_state_dict_fn("lioncub", self._heal, self._healthy)
        _managers.add(manager)

    @property
    def committed(self) -> bool:
        """Whether the last `step` was taken; where not, nothing has changed and it may be tried again."""
        return self._committed

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the optimizer."""
        return self.optim.param_groups

    @property
    def state(self) -> Mapping[Tensor, Any]:  # type: ignore[override]
        """That of the optimizer."""
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the optimizer."""
        return self.optim.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state; a checkpoint needs the manager's ``state_dict()`` too."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the optimizer's state, before the first step."""
        self.optim.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, on all ranks before the same step."""
        self.optim.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Start the quorum of a step, and clear gradients; where the manager's quorum is synchronous, heal."""
        self.manager.start_quorum()
        self.optim.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step on all ranks of the quorum or on none, as `committed` tells; a collective.

        Raises what `LionCub.step` raises, on all ranks, but no `PeerLostError`: that is reported to the manager.
        """
        if closure is not None:
            raise ValueError(f"closure: expected None, got {closure!r}: backward must run before the quorum is known")
        manager, pending = self.manager, None
        manager.wait_quorum()
        self._heal_now()
        for name in _SCALER:
            if name in self.__dict__:
                setattr(self.optim, name, self.__dict__[name])
        try:
            pending = self._proposed()
            self._committed = bool(manager.should_commit())
            if pending is not None and self._committed:
                pending.commit()
            elif pending is not None:
                pending.discard(advance=False)
        except BaseException:
            # errors of all ranks; a next quorum would find a step that has not ended
            if pending is not None and self.optim._pending is pending:
                pending.discard(advance=False)
            raise
        finally:
            for name in _SCALER:
                self.optim.__dict__.pop(name, None)

    def _heal_now(self) -> None:
        """Load what a peer has sent while backward ran: the vote needs parameters and step of the others.

        Gradients are then those of old parameters, so this rank abstains.
        """
        manager = self.manager
        self._abstains = not manager.is_participating()
        if manager._healing:
            # as start_quorum does where the quorum is synchronous
            manager._apply_pending_state_dict()
            manager._healing = False

    def _proposed(self) -> PendingStep | None:
        """Return the step that all ranks of the quorum have proposed, or None where one of them is lost."""
        failure = self.manager.errored()
        if failure is not None:
            self._lose(failure)
            return None
        pending = None
        try:
            self._follow()
            pending = self.optim.propose(abstain=self._abstains)
            self._confirm()
        except (PeerLostError, dist.DistError) as error:
            if pending is not None:
                pending.discard(advance=False)
            # frames refer to the group, whose connections end with the last reference
            traceback.clear_frames(error.__traceback__)
            self._lose(PeerLostError(str(error)))
            return None
        return pending

    def _follow(self) -> None:
        """Let the ranks of a new quorum vote together; a collective of them."""
        group = self.manager._pg.parent
        if group is not self._group:
            self.optim.rebind(group)
            if self.optim._scales.has_parts:
                # a replica that came back could not be sent them
                self.optim._scales.reset()
            self._group = group
            _LOG.info("rank %d of %d votes in step %d", group.rank(), group.size(), self.manager.current_step())

    def _confirm(self) -> None:
        """Wait until all ranks have all votes, so that none commits where another has lost one; a collective."""
        members = self.optim._members
        if not members.is_alone:
            device = self.optim._device
            Transport(members.deciding, device).gather(torch.ones(1, dtype=torch.uint8, device=device)).wait()

    def _lose(self, error: Exception) -> None:
        """Report an error, and let go of the group: other ranks that wait for this one notice at once."""
        _LOG.warning("step %d is not taken: %s", self.manager.current_step(), error)
        self.manager.report_error(error)
        self._group = None
        self.optim._leave()
        self.manager._pg.abort()
        # Gloo keeps connections until its group is freed
        gc.collect()

    def _healthy(self) -> dict[str, Any]:
        """Return what a replica that comes back needs."""
        opt = self.optim
        state = opt.state_dict()
        state["state"] = {key: _locals(entries) for key, entries in state["state"].items()}
        params = {name: _own(local_of(param.detach())) for name, param in opt._named_parameters()}
        return {"params": params, "optimizer": state}

    @torch.no_grad()
    def _heal(self, healthy: dict[str, Any]) -> None:
        """Load what `_healthy` of another replica has returned. Raises ValueError where its parameters are others."""
        opt, params = self.optim, healthy["params"]
        named = opt._named_parameters()
        expected = [(name, tuple(local_of(param).shape)) for name, param in named]
        got = [(name, tuple(param.shape)) for name, param in params.items()]
        if expected != got:
            raise ValueError(
                f"model: expected the parameters of the replica that heals this one, {got}, got {expected}"
            )
        for name, param in named:
            local_of(param).copy_(params[name])
        loaded = dict(healthy["optimizer"])
        # its momentum is this rank's from now on, unless all ranks have the same
        loaded["param_groups"] = [
            group if group["momentum_state"] == AVERAGED else {**group, "momentum_state": opt._own_state}
            for group in loaded["param_groups"]
        ]
        ids = [key for group in loaded["param_groups"] for key in group["params"]]
        like = {key: param for key, (_, param) in zip(ids, named, strict=True)}
        loaded["state"] = {
            key: {name: _as_saved(opt.state[like[key]].get(name), value, like[key]) for name, value in entries.items()}
            for key, entries in loaded["state"].items()
        }
        opt.load_state_dict(loaded)


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor without the rest of the buffer that it is a part of, which would be sent with it."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _locals(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _own(local_of(value)) if isinstance(value, Tensor) else value for name, value in entries.items()}


def _as_saved(mine: object, value: Any, param: Tensor) -> Any:
    """Return the local part of a state entry as `state_dict` has it: like the parameter where mine is."""
    is_local = isinstance(mine, Tensor) and local_of(mine) is not mine
    return like_param(param, value.to(local_of(param).device)) if is_local else value


def _check(opt: LionCub, manager: Manager) -> None:
    """Raise TypeError or ValueError, naming the argument, for what cannot follow a quorum."""
    if not isinstance(opt, LionCub):
        raise TypeError(f"opt: expected LionCub, got {type(opt).__name__}")
    opt._check_open()
    if not isinstance(manager, Manager):
        raise TypeError(f"manager: expected torchft.Manager, got {type(manager).__name__}")
    if not isinstance(manager._pg, ProcessGroupGloo):
        raise TypeError(f"manager: expected Manager(pg=ProcessGroupGloo(...)), got pg={type(manager._pg).__name__}")
    if manager in _managers:
        raise ValueError(
            "manager: expected one that decides for no other optimizer, got the same again; use param groups"
        )
    if opt._workers > 1:
        raise ValueError(
            f"opt: expected LionCub with this rank alone, since the quorum chooses who votes, got {opt._workers} ranks"
        )
    for name in ("overlap", "capturable"):
        if opt._members.overlap if name == "overlap" else opt._capturable:
            raise ValueError(f"opt: expected LionCub({name}=False), got {name}=True")
    if manager._group_world_size > 1 and not opt._members.meshes.groups:
        raise ValueError(
            f"opt: expected parameters sharded over the {manager._group_world_size} ranks of a replica, got whole ones"
        )
