"""Accelerate, the Trainer of transformers and Lightning: the examples of the pages, resumed, and without lioncub's help.

One file, since importing the stacks takes longer than all of these runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by, same_on_all, shared_folder
from stacks import as_torchrun, example
from torch import nn

import lioncub
from lioncub import LionCub

# name of the example: what LionCub needs in it, and what a user would have without
STACKS = ("accelerate", "trainer", "lightning")


def run(stack: str, rank: int, folder: Path, resume: bool, helped: bool = True, **options: Any) -> dict[str, Any]:
    """Run an example to its end: bits of the weights, the optimizer and the warnings."""
    with as_torchrun(rank, dist.get_world_size(), folder) as said:
        module = example(f"train_{stack}")
        if not helped:
            take_help_away(module)
        if stack == "accelerate":
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            model, opt = module.main(resume, cpu=True, **options)
        elif stack == "trainer":
            from accelerate.state import AcceleratorState

            AcceleratorState._reset_state(reset_partial_state=True)
            trainer = module.main(resume, use_cpu=True, disable_tqdm=True, **options)
            model, opt = trainer.model, trainer.optimizer.optimizer
        else:
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
            keeping = Keeping()
            trainer = module.main(resume, callbacks=[keeping], **quiet, **options)
            model, opt = trainer.lightning_module, keeping.opt
    assert isinstance(opt, LionCub)
    opt.check_replicas()
    weights = [param.detach().view(torch.int32).tolist() for param in model.parameters()]
    stats = opt.stats()
    open("/tmp/stacks_bytes","a").write(f"{stack} {helped} {stats.bytes_sent_per_step} {stats.unanimous} {[ (b.algorithm) for b in stats.buckets]}\n")
    opt.close()
    return {"weights": weights, "stats": stats, "warnings": said, "steps": stats.steps}


def Keeping() -> Any:  # noqa: N802
    from pytorch_lightning import Callback

    class Keeper(Callback):
        """Keeps the optimizer, which the Trainer drops."""

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (self.opt,) = trainer.optimizers

    return Keeper()


def take_help_away(module: Any) -> None:
    if hasattr(module, "prepare"):
        module.prepare = lambda accelerator, *objects: accelerator.prepare(*objects)
    elif hasattr(module, "pl"):
        module.LionCubCallback = module.pl.Callback
    else:
        import transformers

        module.LionCubCallback = transformers.TrainerCallback


@pytest.mark.parametrize("stack", STACKS)
@on_ranks(2)
def test_the_example_votes_and_resumes_exactly(rank: int, world_size: int, stack: str) -> None:
    folder = shared_folder() / stack
    whole, resumed = (run(stack, rank, folder, resume) for resume in (False, True))
    for found in (whole, resumed):
        assert found["warnings"] == []
        assert found["steps"] == whole["steps"]
        assert found["stats"].unanimous < 0.9, "gradients must be each rank's own"
    assert resumed["weights"] == whole["weights"]
    assert same_on_all(whole["weights"])


@pytest.mark.parametrize("stack", STACKS)
@on_ranks(2)
def test_without_the_integration_it_is_loud(rank: int, world_size: int, stack: str) -> None:
    folder = shared_folder() / f"{stack}-plain"
    whole, resumed = (run(stack, rank, folder, resume, helped=False) for resume in (False, True))
    averaged = [said for said in whole["warnings"] if said.startswith("all votes of the last 5 steps were unanimous")]
    assert len(averaged) == int(rank == 0), whole["warnings"]
    loaded = [said for said in resumed["warnings"] if "got the momentum of rank 0 of 2" in said]
    assert len(loaded) == int(rank == 1), resumed["warnings"]
