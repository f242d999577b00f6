"""LionCub with transformers. Run: torchrun --nproc-per-node 2 docs/examples/train_trainer.py [--resume]"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments, set_seed

from lioncub import LionCub
from lioncub.integrations.transformers import LionCubCallback


class Regression(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.layers = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1))
        self.post_init()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.layers(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


def main(resume: bool, **options: Any) -> Trainer:
    set_seed(0)
    inputs = torch.randn(512, 16)
    targets = torch.tanh(inputs @ torch.randn(16, 1))
    args = TrainingArguments(
        output_dir="trainer",
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=2,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=8,
        logging_steps=4,
        **options,
    )
    trainer = Trainer(
        Regression(PretrainedConfig()),
        args,
        train_dataset=[{"x": x, "labels": y} for x, y in zip(inputs, targets, strict=True)],
        # its lr is this one, not args.learning_rate
        optimizer_cls_and_kwargs=(LionCub, {"lr": 2e-3}),
        callbacks=[LionCubCallback()],
    )
    trainer.train(resume_from_checkpoint="trainer/checkpoint-8" if resume else None)
    return trainer


if __name__ == "__main__":
    main(resume="--resume" in sys.argv)
    dist.destroy_process_group()
