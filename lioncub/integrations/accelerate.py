"""Accelerate: one call in place of ``accelerator.prepare``.

accelerator = Accelerator()
model.to(accelerator.device)
opt = LionCub(model.named_parameters(), lr=1e-3)
model, opt, loader = prepare(accelerator, model, opt, loader)
"""

from __future__ import annotations

import weakref
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from lioncub.integrations.common import check_processes, keep_local, lion_cubs_of, refuse_sharding, stays_local
from lioncub.optimizer import LionCub

_hooked: weakref.WeakSet[Accelerator] = weakref.WeakSet()
# modules whose DDP sends no gradients
_local: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def prepare(accelerator: Accelerator, *objects: Any, device_placement: list[bool] | None = None) -> Any:
    """Do what ``accelerator.prepare`` does, and make its DDP and its checkpoints fit `LionCub`.

    DDP sends no gradients of a model whose parameters `LionCub` has, or that is prepared without any optimizer. Other
    models and optimizers are left as they are. ``accelerator.save_state``, called on every rank, first averages the
    momentum over ranks, so that ``load_state`` resumes with the bits of a run that went on.

    Returns what ``accelerator.prepare`` returns. Raises ValueError under DeepSpeed, Megatron-LM and FSDP, for a LionCub
    that was built before the model was moved, and where another optimizer has parameters of the same model.
    """
    optimizers = [one for one in objects if isinstance(one, Optimizer)]
    cubs = lion_cubs_of(optimizers)
    if cubs:
        _check(accelerator, cubs)
    for module in _local:
        # one that was prepared before, without an optimizer
        stays_local(module, optimizers, was_local=True)
    local = [isinstance(one, nn.Module) and stays_local(one, optimizers) for one in objects]
    prepared = accelerator.prepare(*objects, device_placement=device_placement)
    for one, is_local, result in zip(objects, local, prepared if len(objects) > 1 else [prepared], strict=True):
        if is_local and keep_local(result):
            _local.add(one)
    if cubs and accelerator not in _hooked:
        _hooked.add(accelerator)
        _average_before_saving(accelerator)
    return prepared


def _check(accelerator: Accelerator, cubs: list[LionCub]) -> None:
    refuse_sharding(accelerator.distributed_type)
    device = accelerator.device
    for cub in cubs:
        check_processes(cub, accelerator.num_processes, "accelerator", "Accelerator(cpu=True)")
        for param in (param for group in cub.param_groups for param in group["params"]):
            if param.device.type != device.type or (device.type != "cpu" and param.device.index != device.index):
                raise ValueError(
                    f"LionCub: expected parameters on {device}, got one on {param.device}; call "
                    "model.to(accelerator.device) before LionCub is built, since its momentum stays where it was built"
                )


def _average_before_saving(accelerator: Accelerator) -> None:
    # it runs on all ranks, before the states of optimizers are read
    def average(_models: list[nn.Module], _weights: list[Any], _folder: str) -> None:
        for cub in lion_cubs_of(accelerator._optimizers):
            cub.sync_momentum()

    accelerator.register_save_state_pre_hook(average)
