"""Data-parallel training with LionCub. Run: torchrun --nproc-per-node 2 docs/examples/train.py"""

import os

import torch
import torch.distributed as dist
from torch import nn

from lioncub import LionCub


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1)).to(device)
    teacher = torch.randn(16, 1, device=device)
    opt = LionCub(model.named_parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
    # from here on every rank draws its own data
    torch.manual_seed(1 + dist.get_rank())
    for step in range(1, 101):
        inputs = torch.randn(32, 16, device=device)
        loss = nn.functional.mse_loss(model(inputs), torch.tanh(inputs @ teacher))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if dist.get_rank() == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {opt.stats().bytes_sent_per_step} bytes sent per step")
    opt.check_replicas()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
