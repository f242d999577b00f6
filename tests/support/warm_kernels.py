"""Imported by the server that forks the workers of tests: they inherit kernels that are loaded already."""

from __future__ import annotations

from typing import Any

import torch
from optimizers import LionCub

from lioncub import MomentumSync, Quantized, SignMean, SignVote, TernaryVote
from lioncub.simulate import Workers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"compression": SignVote(), "drift_every": 1},
    {"compression": SignMean(), "momentum_sync": MomentumSync(dtype="int8")},
    {"compression": TernaryVote(), "momentum_sync": MomentumSync(dtype="bf16")},
    {"compression": Quantized(bits=4, stochastic=True, block=64, share_scales_every=1)},
    {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16},
    {"master_weights": True},
]


def _train(rank: int, group: Any, options: dict[str, Any]) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    params = [torch.ones(n, dtype=dtype).requires_grad_() for n, dtype in zip((5, 70, 1100), dtypes, strict=True)]
    opt = LionCub(params, lr=0.1, process_group=group, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.step()


# threads of torch would not be there in the forked process
torch.set_num_threads(1)
with Workers(2) as two:
    for each in OPTIONS:
        two.run(lambda rank, group, options=each: _train(rank, group, options))  # type: ignore[misc]
