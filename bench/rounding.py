"""What precision costs a training run: a byte-level GPT with fp32 and bf16 parameters, rounded in different ways.

    python bench/rounding.py [--steps 400] [--lr 3e-4] [--seeds 2]

Prints a Markdown table for docs/low-precision.md. Two workers vote; batches and initial weights of a seed are the same
for all rows. Weights are stored as a row says, and widened to compute in fp32, so that rows differ in nothing else;
gradients have the dtype of the weights.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from typing import Any

import torch
from study.tasks import TASKS
from study.training import schedule
from torch import Tensor, nn
from torch.func import functional_call

from lioncub import LionCub, Precision
from lioncub.simulate import Workers

WORKERS, BATCH = 2, 8
LOW, HALF_MOMENTUM = torch.bfloat16, {"momentum_dtype": torch.bfloat16}
# name: dtype of parameters, options of LionCub, bytes per parameter of weights and optimizer state
ROWS: dict[str, tuple[torch.dtype, dict[str, Any], int]] = {
    "fp32": (torch.float32, {}, 4 + 4),
    "bf16, to nearest": (LOW, {}, 2 + 4),
    "bf16, stochastic": (LOW, {"param_rounding": "stochastic"}, 2 + 4),
    "bf16, stochastic, bf16 momentum": (LOW, {"param_rounding": "stochastic", **HALF_MOMENTUM}, 2 + 2),
    "bf16, fp32 masters": (LOW, {"master_weights": True}, 2 + 4 + 4),
    "bf16, fp32 masters, bf16 momentum": (LOW, {"master_weights": True, **HALF_MOMENTUM}, 2 + 4 + 2),
}


def train(dtype: torch.dtype, options: dict[str, Any], lr: float, steps: int, seed: int) -> tuple[float, float]:
    """Validation loss in nats per byte, and the share of weights that differ from the initial ones."""
    task = TASKS["text"]
    replicas: list[nn.Module] = [task.model(seed).to(dtype) for _ in range(WORKERS)]
    initial = [p.detach().clone() for p in replicas[0].parameters()]
    with Workers(WORKERS) as workers:
        optimizers = workers.run(
            lambda rank, group: LionCub(
                replicas[rank].named_parameters(),
                lr,
                weight_decay=0.1,
                process_group=group,
                precision=Precision(**options),
            )
        )
        for step in range(steps):
            for rank, (model, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
                optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
                optimizer.zero_grad()
                _loss(model, task.batch_of(seed, "iid", WORKERS, BATCH, rank, step)).backward()
            workers.run(lambda rank, group: optimizers[rank].step())
    pairs = list(zip(replicas[0].parameters(), initial, strict=True))
    moved = sum(int((p != before).sum()) for p, before in pairs) / sum(p.numel() for p, _ in pairs)
    return task.validation_loss(copy.deepcopy(replicas[0]).float()), moved


def _loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    wide = {name: p.float() for name, p in model.named_parameters()}
    loss: Tensor = functional_call(model, wide, batch)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    # more threads gain nothing on so small a model
    torch.set_num_threads(1)
    # the row that is rounded to nearest is here to show what the warning is about
    warnings.filterwarnings("ignore", message="lr .* is too small")
    print("| parameters | bytes | validation loss, by seed | mean | weights that moved |")
    print("|---|---:|---|---:|---:|")
    began = time.perf_counter()
    for name, (dtype, options, n_bytes) in ROWS.items():
        runs = [train(dtype, options, arguments.lr, arguments.steps, seed) for seed in range(arguments.seeds)]
        losses, moved = zip(*runs, strict=True)
        cells = ", ".join(f"{loss:.3f}" for loss in losses)
        mean, share = statistics.mean(losses), statistics.mean(moved)
        print(f"| {name} | {n_bytes} | {cells} | {mean:.3f} | {share:.0%} |", flush=True)
    print(f"\n{arguments.steps} steps at lr {arguments.lr:g}; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
