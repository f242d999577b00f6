"""Lion on one device, fused; under DistributedDataParallel the full-precision baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, gradient_of, parameter_names
from lioncub.base import MomentumOptimizer, Params
from lioncub.kernels import foreach_lion_step_
from lioncub.kernels.checks import storage_order_view


class Lion(MomentumOptimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675) in one pass over memory per step.

    c = b1*m + (1-b1)*g; p = p*(1 - lr*wd) - lr*sign(c), sign(0) = 0; m = b2*m + (1-b2)*g, all in fp32, rounded once
    to the parameter's dtype.

    Args:
        params: dense fp32, bf16 or fp16 parameters, named ones, or param groups.
        lr: learning rate, a number or 0-dim tensor, read at every step like betas and weight_decay.
        betas: (b1, b2), each in [0, 1).
        weight_decay: decoupled weight decay.
        maximize: ascend instead of descend.
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
        impl: str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, maximize, impl)

    def _create_state(self, group_index: int) -> None:
        for param in self.param_groups[group_index]["params"]:
            self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; gives the closure's loss. Mutates parameters and momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # everything that can be refused comes before the first write
        for call in [call for i in range(len(self.param_groups)) for call in self._plan_group(i)]:
            call()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_impl": self._impl}

    def _plan_group(self, index: int) -> list[Callable[[], None]]:
        """The step of one group, a call per device."""
        group = self.param_groups[index]
        now = Hyperparameters.of(group)
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        for name, param in zip(parameter_names(group, index), group["params"], strict=True):
            grad = gradient_of(name, param)
            if grad is None:
                continue
            params, grads, momenta = by_device.setdefault(param.device, ([], [], []))
            params.append(storage_order_view(name, param))
            grads.append(grad)
            momenta.append(storage_order_view(name, self.state[param]["exp_avg"]))
        return [
            partial(
                foreach_lion_step_,
                *tensors,
                lr=now.lr,
                beta1=now.beta1,
                beta2=now.beta2,
                weight_decay=now.weight_decay,
                grad_scale=-1.0 if now.maximize else 1.0,
                impl=self._impl,
            )
            for tensors in by_device.values()
        ]
