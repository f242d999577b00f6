"""The Trainer of transformers: one callback.

Trainer(model, args, optimizers=(LionCub(model.named_parameters(), lr=1e-3), None), callbacks=[LionCubCallback()])
Trainer(model, args, optimizer_cls_and_kwargs=(LionCub, {"lr": 1e-3}), callbacks=[LionCubCallback()])
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lioncub.ddp import keep_gradients_local, keep_gradients_local_once_wrapped
from lioncub.integrations.common import check_processes, lion_cub_of, refuse_sharding
from lioncub.optimizer import LionCub


class LionCubCallback(TrainerCallback):
    """Keep gradients local under the Trainer's DDP, and average momentum on all ranks before a checkpoint is saved.

    ``resume_from_checkpoint`` then has the bits of a run that went on. Place it behind callbacks that set
    ``should_save``. With ``save_strategy="best"`` momentum is averaged at every evaluation, since whether the model is
    saved is known only later.

    Raises ValueError where the Trainer uses DeepSpeed or FSDP, or another optimizer.
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse what shards the optimizer's state."""
        for option, name in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
            if getattr(args, option, None):
                raise ValueError(
                    f"args.{option}: expected none with LionCub, got {getattr(args, option)!r}; {name} shards the "
                    "state of the optimizer and exchanges its parameters. Use torchrun alone, which means DDP"
                )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any,
        **_: Any,
    ) -> None:
        """Keep gradients local from the first backward on."""
        refuse_sharding(getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", None))
        check_processes(_lion_cub_of(optimizer), args.world_size, "args", "TrainingArguments(use_cpu=True)")
        if isinstance(model, DistributedDataParallel):
            keep_gradients_local(model)
        elif self._handle is None:
            # the model is that of the user; DDP around it is the Trainer's alone
            self._handle = keep_gradients_local_once_wrapped(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Average momentum where the step's state is saved next."""
        if control.should_save:
            _average(args, optimizer)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Average momentum where the epoch's state is saved next."""
        if control.should_save:
            _average(args, optimizer)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any
    ) -> None:
        """Average momentum where the evaluation decides whether to save."""
        if args.save_strategy == "best" and lion_cub_of(optimizer) is not None:
            _average(args, optimizer)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the hook of a model that no DDP ran."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _average(args: TrainingArguments, optimizer: Any) -> None:
    if not args.save_only_model:
        _lion_cub_of(optimizer).sync_momentum()


def _lion_cub_of(optimizer: Any) -> LionCub:
    cub = lion_cub_of(optimizer)
    if cub is None:
        raise ValueError(
            f"optimizer: expected LionCub for LionCubCallback, got {type(optimizer).__name__}; pass the Trainer "
            "optimizers=(LionCub(...), None) or optimizer_cls_and_kwargs=(LionCub, {...})"
        )
    return cub
