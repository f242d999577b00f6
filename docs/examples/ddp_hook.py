"""DDP that sends gradients in 2 bits, unbiased (TernGrad, Wen et al. 2017, arXiv 1705.07878). Run it with torchrun."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lioncub.kernels import dequantize, packed_bytes, quantize

FORMAT = {"bits": 2, "norm": "linf", "block": 256}


@dataclass
class HookState:
    """``seed`` and ``step`` of the random numbers; bytes that this rank has sent."""

    seed: int = 0
    step: int = 0
    bytes_sent: int = 0


def two_bit_hook(state: HookState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average gradients rounded at random to -s, 0 or +s, where s is the largest size in a block of 256."""
    grad, world_size = bucket.buffer(), dist.get_world_size()
    # random words are a function of these four numbers, so there is no generator whose state must be saved
    stream = {"seed": state.seed, "worker": dist.get_rank(), "step": state.step, "param_id": bucket.index()}
    codes, scale = quantize(grad, stochastic=True, **FORMAT, **stream)
    message = torch.cat([codes, scale.view(torch.uint8)])
    received = [torch.empty_like(message) for _ in range(world_size)]
    gathered = dist.all_gather(received, message, async_op=True).get_future()
    state.bytes_sent += (world_size - 1) * len(message)
    state.step += bucket.is_last()

    def average(_: torch.futures.Future[list[Tensor]]) -> Tensor:
        total = torch.zeros_like(grad)
        # in rank order, so that all ranks get the same bits
        for codes, scale in (row.tensor_split([packed_bytes(len(grad), bits=2)]) for row in received):
            total += dequantize(codes, scale.view(torch.float32), len(grad), dtype=grad.dtype, **FORMAT)
        return total / world_size

    return gathered.then(average)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    state, model = HookState(), nn.parallel.DistributedDataParallel(nn.Linear(64, 10))
    model.register_comm_hook(state, two_bit_hook)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    for step in range(1, 101):
        x = torch.randn(32, 64)
        loss = nn.functional.cross_entropy(model(x), x[:, :10].argmax(1))
        loss.backward()
        opt.step()
        opt.zero_grad()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}, {state.bytes_sent // step} bytes sent per step")
    dist.destroy_process_group()
