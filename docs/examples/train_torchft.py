"""Training that goes on without lost workers, and with those that come back. Each replica is a torchrun of its own:

torchft_lighthouse --min_replicas 2 &
export TORCHFT_LIGHTHOUSE=http://localhost:29510
REPLICA=0 torchrun --standalone --max-restarts 9 docs/examples/train_torchft.py &
REPLICA=1 torchrun --standalone --max-restarts 9 docs/examples/train_torchft.py &
REPLICA=2 torchrun --standalone --max-restarts 9 docs/examples/train_torchft.py
"""

import os
import time
from datetime import timedelta

import torch
from torch import nn
from torchft import Manager, ProcessGroupGloo

from lioncub import LionCub
from lioncub.integrations.torchft import FaultTolerant


def main() -> None:

    replica, timeout = int(os.environ["REPLICA"]), timedelta(seconds=20)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 1))
    teacher = torch.randn(16, 1)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=2,  # more than half of all: no two quorums train at once
        replica_id=f"replica{replica}",
        timeout=timeout,
    )
    opt = FaultTolerant(LionCub(model.named_parameters(), lr=2e-3, weight_decay=0.1), manager)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=100)
    # parameters and momentum are registered; this is what else a replica needs that comes back
    manager.register_state_dict_fn("schedule", schedule.load_state_dict, schedule.state_dict)
    while (step := manager.current_step()) < 100:
        generator = torch.Generator().manual_seed(1000 * step + replica)
        inputs = torch.randn(32, 16, generator=generator)
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), torch.tanh(inputs @ teacher))
        loss.backward()
        opt.step()
        if opt.committed:
            schedule.step()
        if opt.committed and manager.current_step() % 20 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {manager.num_participants()} voters", flush=True)
    # others may still read this replica's last message
    time.sleep(2)
    manager.shutdown()


if __name__ == "__main__":
    main()
