"""Lightning: one callback.

    class Model(LightningModule):
        def configure_optimizers(self):
            return LionCub(self.named_parameters(), lr=1e-3)

    Trainer(strategy="ddp", callbacks=[LionCubCallback()]).fit(Model(), loader)

Of the packages ``lightning`` and ``pytorch_lightning`` it uses the one that was imported first.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lioncub.integrations.common import keep_local, lion_cub_of, lion_cubs_of, stays_local

if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    # the same code under two names, with classes of their own
    _NAMES = ("lightning.pytorch", "pytorch_lightning")
    _imported = [name for name in _NAMES if name in sys.modules]
    _installed = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None]
    Callback = importlib.import_module([*_imported, *_installed, "lightning.pytorch"][0]).Callback

# by the name of the strategy's class
_REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed, which shards the state of the optimizer",
    "FSDPStrategy": "FullyShardedDataParallel, which shards parameters in part",
    "ModelParallelStrategy": "ModelParallelStrategy, whose checkpoints are not those of one rank",
}


class LionCubCallback(Callback):
    """Keep gradients local under Lightning's DDP, and save the average of all ranks' momentum in its checkpoints.

    ``fit(ckpt_path=...)`` then has the bits of a run that went on. With ``precision="bf16-mixed"``, which has no
    GradScaler, it lets Lightning clip gradients.

    Raises ValueError for strategies that shard, and where no optimizer is `LionCub`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse strategies that shard."""
        name = type(trainer.strategy).__name__
        if name in _REFUSED:
            raise ValueError(f"strategy: expected 'ddp' with LionCub, got {_REFUSED[name]}")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep gradients local from the first backward on."""
        cubs = lion_cubs_of(trainer.optimizers)
        if not cubs:
            got = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise ValueError(f"configure_optimizers: expected LionCub for LionCubCallback, got {got}")
        if stays_local(pl_module, trainer.optimizers):
            keep_local(trainer.strategy.model)
        if trainer.precision == "bf16-mixed":
            # it says that step unscales gradients, so that Lightning would not clip them; here is no scaler
            for cub in cubs:
                cub._step_supports_amp_scaling = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Average momentum, on all ranks, and put the state that is saved in place of this rank's."""
        for i, optimizer in enumerate(trainer.optimizers):
            cub = lion_cub_of(optimizer)
            if cub is not None:
                cub.sync_momentum()
                checkpoint["optimizer_states"][i] = trainer.strategy.optimizer_state(optimizer)
