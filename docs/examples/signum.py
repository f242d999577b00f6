"""Signum by majority vote (Bernstein et al. 2018, arXiv 1802.04434; 2019, arXiv 1810.05291). Run it with torchrun."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lioncub.collectives import vote
from lioncub.kernels import abstain_parity, lion_apply_, lion_encode_, tie_parity


class Signum(torch.optim.Optimizer):
    """m = beta*m + (1-beta)*g on every rank; p = p*(1 - lr*wd) - lr*(the majority of the ranks' signs of m)."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-4, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; a collective. Mutates parameters and momentum, returns the closure's loss."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            # every message is padded to whole 64-bit words, so that joined they are one message
            messages = [self._encode(p, group) for p in group["params"]]
            voted = vote(torch.cat(messages), parity=tie_parity(group["step"]))
            for p, bits in zip(group["params"], voted.split([len(m) for m in messages]), strict=True):
                lion_apply_(p, bits, lr=group["lr"], weight_decay=group["weight_decay"])
            group["step"] += 1
        return loss

    def _encode(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
        # all ranks send votes of the same size, so one without a gradient votes with zeros
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        # with equal betas, the update whose sign is packed is the new momentum itself
        parity = abstain_parity(group["step"], dist.get_rank(), dist.get_world_size())
        return lion_encode_(state["exp_avg"], grad, beta1=group["beta"], beta2=group["beta"], parity=parity)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    weight = torch.zeros(64, 10, requires_grad=True)
    opt = Signum([weight], lr=1e-2)
    torch.manual_seed(dist.get_rank())
    for step in range(1, 101):
        x = torch.randn(32, 64)
        loss = torch.nn.functional.cross_entropy(x @ weight, x[:, :10].argmax(1))
        opt.zero_grad()
        loss.backward()
        opt.step()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    dist.destroy_process_group()
