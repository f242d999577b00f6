"""LionCub with Lightning. Run: torchrun --nproc-per-node 2 docs/examples/train_lightning.py [--resume]"""

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lioncub import LionCub
from lioncub.integrations.lightning import LionCubCallback


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> LionCub:
        # here, not in __init__: only now there is a process group
        return LionCub(self.named_parameters(), lr=2e-3, weight_decay=0.1)


def main(resume: bool, callbacks: tuple[pl.Callback, ...] = (), **options: Any) -> pl.Trainer:
    pl.seed_everything(0)
    inputs = torch.randn(512, 16)
    targets = torch.tanh(inputs @ torch.randn(16, 1))
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    saving = pl.callbacks.ModelCheckpoint("lightning", "{epoch}", save_top_k=-1)
    trainer = pl.Trainer(
        strategy="ddp",
        devices=2,
        max_epochs=2,
        logger=False,
        callbacks=[LionCubCallback(), saving, *callbacks],
        **options,
    )
    trainer.fit(Regression(), loader, ckpt_path="lightning/epoch=0.ckpt" if resume else None)
    return trainer


if __name__ == "__main__":
    main(resume="--resume" in sys.argv)
