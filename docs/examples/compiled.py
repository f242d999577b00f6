"""A whole training step as one graph: forward, loss, backward and the vote of all ranks. Run it with torchrun."""

import torch
import torch.distributed as dist

from lioncub import LionCub

# lets torch.compile see through backward()
torch._dynamo.config.trace_autograd_ops = True

dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 4))
# a tensor, which is changed in place: as a number it would be compiled in
opt = LionCub(model.named_parameters(), lr=torch.tensor(3e-3), weight_decay=0.1, capturable=True)


@torch.compile(fullgraph=True)
def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = torch.nn.functional.cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    return loss.detach()


generator = torch.Generator().manual_seed(dist.get_rank())
for step in range(1, 101):
    x = torch.randn(32, 16, generator=generator)
    loss = train_step(x, x[:, :4].argmax(1))
    opt.zero_grad()
    opt.param_groups[0]["lr"].mul_(0.99)
    if step % 20 == 0:
        # within the graph nothing is raised
        opt.raise_errors()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, {opt.stats().bytes_sent_per_step} bytes sent per step")
dist.destroy_process_group()
