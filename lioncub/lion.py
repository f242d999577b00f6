"""Lion on one device, fused; under DistributedDataParallel the full-precision baseline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters, gradient_of, parameter_names
from lioncub.base import MomentumOptimizer, Params
from lioncub.buckets import number_of
from lioncub.kernels import foreach_lion_step_
from lioncub.kernels.checks import storage_order_view
from lioncub.precision import Precision


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
        param_rounding: of bf16 and fp16 parameters: "nearest", or "stochastic", up or down at random so that steps
            smaller than their spacing add up on average; no memory, no state.
        master_weights: keep bf16 and fp16 parameters in fp32 too, in ``state[p]["master"]``, and move those.
        momentum_dtype: torch.float32 or torch.bfloat16; the latter is rounded as ``param_rounding`` says.
        rounding_seed: of stochastic rounding.
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
        param_rounding: str = "nearest",
        master_weights: bool = False,
        momentum_dtype: torch.dtype = torch.float32,
        rounding_seed: int = 0,
        impl: str = "auto",
    ) -> None:
        precision = Precision(
            param_rounding=param_rounding,
            master_weights=master_weights,
            momentum_dtype=momentum_dtype,
            rounding_seed=rounding_seed,
        )
        super().__init__(params, lr, betas, weight_decay, maximize, impl, precision)

    def _create_state(self, group_index: int) -> None:
        for param in self.param_groups[group_index]["params"]:
            self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=self._precision.momentum_dtype)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; gives the closure's loss. Mutates parameters and momentum."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refresh_masters()
        # everything that can be refused comes before the first write
        for call in [call for i in range(len(self.param_groups)) for call in self._plan_group(i)]:
            call()
        self._advance()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        own = {"_impl": self._impl, "_precision": self._precision, "_versions": {}}
        return {**super().__getstate__(), **own}

    def _plan_group(self, index: int) -> list[Callable[[], None]]:
        """The step of one group, a call per device."""
        group = self.param_groups[index]
        now = Hyperparameters.of(group)
        rounding, masters = self._precision.rounding(self._step_count, rank=0), self._masters
        by_device: dict[torch.device, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
        numbers: dict[torch.device, list[int]] = {}
        moved = []
        for i, (name, param) in enumerate(zip(parameter_names(group, index), group["params"], strict=True)):
            grad = gradient_of(name, param)
            if grad is None:
                continue
            params, grads, momenta = by_device.setdefault(param.device, ([], [], []))
            params.append(masters.of(name, param))
            grads.append(grad)
            momenta.append(storage_order_view(name, self.state[param]["exp_avg"]))
            numbers.setdefault(param.device, []).append(number_of(index, i))
            moved.append(param)
        steps = [
            partial(
                foreach_lion_step_,
                *tensors,
                lr=now.lr,
                beta1=now.beta1,
                beta2=now.beta2,
                weight_decay=now.weight_decay,
                grad_scale=-1.0 if now.maximize else 1.0,
                rounding=rounding,
                tensors=numbers[device],
                impl=self._impl,
            )
            for device, tensors in by_device.items()
        ]
        return [*steps, partial(masters.write_back, moved)]
