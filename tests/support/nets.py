"""A small network with everything an optimizer trips over, and how the tests train and compare it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Odd shapes, a channels_last convolution, a tied weight, mixed dtypes, and parameters that may go unused."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
            self.norm = nn.BatchNorm2d(5)
            self.table = nn.Embedding(11, 7)
            self.head = nn.Linear(7, 11, bias=False)
            self.mix = nn.Linear(5, 7).to(torch.bfloat16)
            self.sometimes = nn.Linear(7, 7)
            self.gain = nn.Parameter(torch.ones(7, dtype=torch.float16))
            self.never = nn.Linear(3, 3)
            self.empty = nn.Parameter(torch.zeros(0))
        self.head.weight = self.table.weight

    def forward(self, images: Tensor, tokens: Tensor, use_all: bool) -> Tensor:
        features = self.norm(self.conv(images.to(memory_format=torch.channels_last))).mean(dim=(2, 3))
        hidden = self.mix(features.to(torch.bfloat16)).float() * self.gain.float() + self.table(tokens)
        if use_all:
            hidden = hidden + self.sometimes(hidden)
        return nn.functional.cross_entropy(self.head(hidden), tokens.roll(1))


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 6, 6, generator=generator), torch.randint(0, 11, (6,), generator=generator)


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [pair for pair in named if pair[1].dim() > 1], "weight_decay": 0.1},
        {"params": [pair for pair in named if pair[1].dim() <= 1], "lr": 3e-3, "betas": (0.8, 0.95)},
    ]


def train(net: Net, opt: torch.optim.Optimizer, rank: int, steps: range, seed: int = 0) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t), last_epoch=-1)
    for step in steps:
        opt.zero_grad()
        net(*batch_of(seed + 100 * step + rank), use_all=rank != 1).backward()
        opt.step()
        schedule.step()


def bits(tensors: Iterable[Tensor]) -> bytes:
    """All bits of contiguous copies."""
    flat = [t.detach().contiguous().view(-1).view(torch.uint8) for t in tensors if t.numel()]
    return b"".join(t.numpy().tobytes() for t in flat)


def bits_of(net: nn.Module) -> bytes:
    return bits(net.parameters())


def _states_of(opt: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [opt.state[p] for group in opt.param_groups for p in group["params"]]


def momentum_of(opt: torch.optim.Optimizer) -> bytes:
    return bits(state["exp_avg"] for state in _states_of(opt))


def state_of(opt: torch.optim.Optimizer) -> bytes:
    """All bits of what the optimizer keeps for its parameters."""
    return bits(state[name] for state in _states_of(opt) for name in sorted(state))


def all_bits(opt: torch.optim.Optimizer) -> tuple[bytes, bytes]:
    """Those of the parameters, and of what is kept for them."""
    return bits(p for group in opt.param_groups for p in group["params"]), state_of(opt)


def randn(*shape: int, seed: int = 0) -> Tensor:
    # the same whatever torch.set_default_dtype and torch.set_default_device say
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def two_groups() -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Three small parameters, the last in bf16, and groups of them by name."""
    params = [randn(4, 3, 2, 2), randn(300, seed=1), randn(9, seed=2).bfloat16()]
    named = list(zip("abc", [p.requires_grad_() for p in params], strict=True))
    return params, [{"params": named[:2]}, {"params": named[2:], "lr": 0.5}]


def give_gradients(params: Iterable[Tensor], seed: int = 1) -> None:
    for i, p in enumerate(params):
        p.grad = randn(*p.shape, seed=100 * seed + i).to(p.dtype)
