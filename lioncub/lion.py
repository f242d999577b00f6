"""Lion on one device, fused; under DistributedDataParallel the full-precision baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters
from lioncub.base import MomentumOptimizer, Params
from lioncub.buckets import Slot, param_id_of, slot_of
from lioncub.config import Precision, check_config, refuse_unknown
from lioncub.kernels import foreach_lion_step_
from lioncub.kernels.checks import storage_order_view
from lioncub.params import Meshes, align_gradient, local_gradient_of, local_of
from lioncub.precision import rounding_of


class Lion(MomentumOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675) in one pass over memory per step.

    ``c = b1*m + (1-b1)*g; p = p*(1 - lr*wd) - lr*sign(c); m = b2*m + (1-b2)*g``, sign(0) = 0, all in fp32, rounded once
    to the dtypes of p and m.

    Args:
        params: dense fp32, bf16 or fp16 parameters, named ones, or param groups.
        lr: learning rate, a number or 0-dim tensor, read at every step like betas and weight_decay.
        betas: (b1, b2), each in [0, 1).
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
        precision: rounding, master weights and the dtype of momentum; see `Precision`.
        impl: kernels to use: "auto", "triton", "cpu" or "reference".
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        precision: Precision = Precision(),  # noqa: B008
        impl: str = "auto",
        **unknown: Any,
    ) -> None:
        refuse_unknown("Lion", unknown)
        check_config("precision", precision, Precision)
        super().__init__(params, lr, betas, weight_decay, maximize, impl, precision)

    def _create_state(self, group_index: int) -> None:
        for param in self.param_groups[group_index]["params"]:
            self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=self._precision.momentum_dtype)

    def _hold(self) -> None:
        super()._hold()
        # with the momentum of each in storage order
        meshes = Meshes([param for _, param in self._named_parameters()])
        self._slots = [self._slots_of(index, meshes) for index in range(len(self.param_groups))]

    def _slots_of(self, index: int, meshes: Meshes) -> list[tuple[Slot, torch.device, Tensor]]:
        return [
            (
                slot_of(param_id_of(index, i), name, param, meshes.part_of(param)),
                local_of(param).device,
                storage_order_view(name, local_of(self.state[param]["exp_avg"])),
            )
            for i, (name, param) in enumerate(self._named_group(index))
        ]

    def _adopt_state(self, other: str) -> None:
        # one that was moved to another device and back, to make room, is as good
        for name, param in self._named_parameters():
            state = self.state.get(param, {})
            dtypes = {"exp_avg": self._precision.momentum_dtype}
            if self._precision.master_weights and param.dtype != torch.float32:
                dtypes["master"] = torch.float32
            for entry, dtype in dtypes.items():
                expected = (dtype, tuple(param.shape), param.stride(), param.device)
                got = _kind_of(state.get(entry))
                if got != expected:
                    raise RuntimeError(
                        f"state of parameter {name}: expected {entry} of (dtype, shape, strides, device) {expected}, "
                        f"got {got}"
                    )
        self._hold()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; gives the closure's loss. Mutates parameters and momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self._check_held()
        # everything that can be refused comes before the first write
        for call in [call for i in range(len(self.param_groups)) for call in self._plan_group(i)]:
            call()
        self._advance()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        own = {"_impl": self._impl, "_precision": self._precision, "_next_step": self._next_step}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold()

    def _plan_group(self, index: int) -> list[Callable[[], None]]:
        """Return the step of one group, a call per device."""
        group = self.param_groups[index]
        now = Hyperparameters.of(group)
        rounding, masters = rounding_of(self._precision, self._step_count, rank=0), self._masters
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor], list[Slot]]] = {}
        is_traced = torch.compiler.is_compiling()
        for slot, device, exp_avg in self._slots[index]:
            slot.check_unchanged(device)
            if slot.part.may_be_partial:
                align_gradient(slot.param)
            grad = local_gradient_of(slot.name, slot.param, local_of(slot.param))
            if grad is None:
                continue
            if device not in by_device:
                by_device[device] = ([], [], [], [])
            params, grads, momenta, slots = by_device[device]
            params.append(storage_order_view(slot.name, local_of(slot.param)))
            grads.append(grad)
            # a compiler guards what it finds in the state
            momenta.append(storage_order_view(slot.name, self.state[slot.param]["exp_avg"]) if is_traced else exp_avg)
            slots.append(slot)
        return [
            partial(
                foreach_lion_step_,
                params,
                grads,
                momenta,
                lr=now.lr,
                beta1=now.beta1,
                beta2=now.beta2,
                weight_decay=now.weight_decay,
                grad_scale=-1.0 if now.maximize else 1.0,
                master=_in_storage_order(masters.of([(slot.name, slot.param) for slot in slots])) or None,
                rounding=rounding,
                param_ids=[slot.param_id for slot in slots],
                stream_starts=[slot.part.stream_start for slot in slots],
                impl=self._impl,
            )
            for params, grads, momenta, slots in by_device.values()
        ]


def _in_storage_order(masters: Sequence[Tensor]) -> list[Tensor]:
    return [storage_order_view("master", master) for master in masters]


def _kind_of(tensor: Any) -> object:
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device
