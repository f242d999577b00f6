"""LionCub with Accelerate. Run: torchrun --nproc-per-node 2 docs/examples/train_accelerate.py [--resume]"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lioncub import LionCub
from lioncub.integrations.accelerate import prepare


def main(resume: bool, **options: Any) -> tuple[nn.Module, LionCub]:
    # the order of samples then depends on the epoch alone, as a resumed run needs it
    order = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2, dataloader_config=order, **options
    )
    set_seed(0)
    inputs = torch.randn(512, 16)
    targets = torch.tanh(inputs @ torch.randn(16, 1))
    # on its device before LionCub is built
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1)).to(accelerator.device)
    opt = LionCub(model.named_parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=8, gamma=0.9)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True)
    model, opt, schedule, loader = prepare(accelerator, model, opt, schedule, loader)
    if resume:
        accelerator.load_state("checkpoint")
    for epoch in range(1 if resume else 0, 2):
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
        if epoch == 0:
            # on every rank: it averages momentum first
            accelerator.save_state("checkpoint")
    return model, opt.optimizer


if __name__ == "__main__":
    main(resume="--resume" in sys.argv)
    dist.destroy_process_group()
