"""Accelerate, the Trainer of transformers and Lightning: their examples, resumed, and without lioncub's help.

One file, since importing the stacks takes longer than all of these runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import optimizers
import pytest
import torch
import torch.distributed as dist
from gloo_workers import on_ranks, said_by, same_on_all, shared_folder
from stacks import as_torchrun, load_example
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lioncub import LionCub
from lioncub.integrations.common import lion_cub_of, stays_local

STACKS = ("accelerate", "trainer", "lightning")
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
# an optimizer of some steps may have seen a unanimous vote; averaged gradients make all but the small tensors' so
LOCAL = 0.75


def run(
    stack: str, folder: Path, resume: bool = False, change: Callable[[ModuleType], None] | None = None, **options: Any
) -> dict[str, Any]:
    """Run an example to its end: the bits of the weights, the optimizer's figures and the warnings."""
    with as_torchrun(dist.get_rank(), dist.get_world_size(), folder) as said:
        module = load_example(f"train_{stack}")
        module.LionCub = optimizers.LionCub
        if change is not None:
            change(module)
        if stack == "accelerate":
            model, wrapped = module.main(resume, **options)
        elif stack == "trainer":
            trainer = module.main(resume, disable_tqdm=True, **options)
            model, wrapped = trainer.model, trainer.optimizer
        else:
            keeper, quiet = keeper_of(module), {"enable_progress_bar": False, "enable_model_summary": False}
            trainer = module.main(resume, callbacks=(keeper,), accelerator="cpu", **quiet, **options)
            model, wrapped = trainer.lightning_module, keeper.optimizer
    opt = lion_cub_of(wrapped)
    assert opt is not None
    opt.check_replicas()
    stats, weights = opt.stats(), [param.detach().view(torch.int32).tolist() for param in model.parameters()]
    opt.close()
    return {"weights": weights, "stats": stats, "warnings": said}


def count(values: Any) -> int:
    return sum(map(count, values)) if isinstance(values, list) else 1


def keeper_of(module: ModuleType) -> Any:
    """A callback of Lightning that keeps the optimizer, which its Trainer drops."""

    class Keeper(module.pl.Callback):
        def on_train_end(self, trainer: Any, _: Any) -> None:
            (self.optimizer,) = trainer.optimizers

    return Keeper()


def take_help_away(module: ModuleType) -> None:
    if hasattr(module, "prepare"):
        module.prepare = lambda accelerator, *objects: accelerator.prepare(*objects)
    else:
        (base,) = module.LionCubCallback.__bases__
        module.LionCubCallback = base


@pytest.mark.parametrize("stack", STACKS)
@on_ranks(2)
def test_the_example_votes_and_resumes_exactly(rank: int, world_size: int, stack: str) -> None:
    folder = shared_folder() / stack
    whole, resumed = (run(stack, folder, resume) for resume in (False, True))
    for found in (whole, resumed):
        assert found["warnings"] == []
        assert found["stats"].steps == (32 if stack == "lightning" else 16)
        assert found["stats"].unanimous < LOCAL, "gradients must be each rank's own"
    assert resumed["weights"] == whole["weights"]
    assert same_on_all(whole["weights"])
    (row,) = re.findall(rf"^\| \[.*?\]\(#{stack}.*?\| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text(), re.MULTILINE)
    # of two ranks each sends half of the gradients, in fp32, and half of the sums
    assert row == (f"{whole['stats'].bytes_sent_per_step:,}", f"{4 * sum(map(count, whole['weights'])):,}")


@pytest.mark.parametrize("stack", STACKS)
@on_ranks(2)
def test_without_the_integration_it_is_loud(rank: int, world_size: int, stack: str) -> None:
    folder = shared_folder() / f"{stack}-plain"
    whole, resumed = (run(stack, folder, resume, take_help_away) for resume in (False, True))
    averaged = [said for said in whole["warnings"] if said.startswith("all votes of the last 5 steps were unanimous")]
    assert len(averaged) == int(rank == 0), whole["warnings"]
    assert whole["stats"].unanimous > LOCAL
    loaded = [said for said in resumed["warnings"] if "got the momentum of rank 0 of 2" in said]
    assert len(loaded) == int(rank == 1), resumed["warnings"]


@on_ranks(2)
def test_accelerate_in_bf16(rank: int, world_size: int) -> None:
    found = run("accelerate", shared_folder() / "accelerate-bf16", mixed_precision="bf16")
    assert found["warnings"] == []
    assert found["stats"].unanimous < LOCAL


@on_ranks(2)
def test_an_overflow_under_accelerate_skips_the_step_on_all_ranks(rank: int, world_size: int) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from lioncub.integrations.accelerate import prepare

    with as_torchrun(rank, world_size, shared_folder()):
        accelerator, net = Accelerator(cpu=True), nn.Linear(40, 40)
        opt = optimizers.LionCub(net.parameters(), lr=1e-3)
        model = prepare(accelerator, net)
        # what Accelerate makes where it has a GradScaler, which it has on a GPU alone
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        wrapped = AcceleratedOptimizer(opt, scaler=scaler)
        for step in range(3):
            wrapped.zero_grad()
            factor = torch.inf if step == 1 and rank == 1 else 1.0
            scaler.scale(model(torch.randn(4, 40) * factor).square().sum()).backward()
            wrapped.step()
    assert (opt.stats().steps, opt.stats().skipped_steps) == (3, 1)
    opt.check_replicas()


@on_ranks(2)
def test_accelerate_leaves_other_optimizers_alone(rank: int, world_size: int) -> None:
    from accelerate import Accelerator

    from lioncub.integrations.accelerate import prepare

    with as_torchrun(rank, world_size, shared_folder()):
        net = nn.Linear(4, 4)
        model, _ = prepare(Accelerator(cpu=True), net, torch.optim.AdamW(net.parameters()))
        model(torch.full((2, 4), 1.0 + rank)).sum().backward()
        # which optimizer it will have is not known: LionCub, or the call would not have been ours
        accelerator, alone = Accelerator(cpu=True), nn.Linear(4, 4)
        prepare(accelerator, alone)
        said = said_by(lambda: prepare(accelerator, torch.optim.AdamW(alone.parameters())))
    assert same_on_all(net.weight.grad.tolist())
    assert "got AdamW for some, whose replicas would drift apart" in said


@on_ranks(2)
def test_what_cannot_work_is_refused_by_name(rank: int, world_size: int) -> None:
    with as_torchrun(rank, world_size, shared_folder()):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        from lioncub.integrations.accelerate import prepare
        from lioncub.integrations.lightning import LionCubCallback as OfLightning
        from lioncub.integrations.transformers import LionCubCallback as OfTrainer

    net = nn.Linear(4, 4)
    opt = optimizers.LionCub(net.parameters(), lr=1e-3)

    def accelerator_of(kind: str, device: str = "cpu") -> Any:
        kinds = SimpleNamespace(value=kind)
        return SimpleNamespace(distributed_type=kinds, device=torch.device(device), num_processes=1)

    for kind, text in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("FSDP", "FSDP, by which")):
        assert f"got {text}" in said_by(lambda kind=kind: prepare(accelerator_of(kind), net, opt))
    gpus = accelerator_of("MULTI_GPU", f"cuda:{rank}")
    gpus.num_processes = 2
    moved = said_by(lambda: prepare(gpus, net, opt))
    assert moved.startswith(f"ValueError: LionCub: expected parameters on cuda:{rank}, got one on cpu")
    alone = "expected {} of 2 processes or more, as LionCub has, got one of 1; on CPUs"
    assert alone.format("accelerator") in said_by(lambda: prepare(accelerator_of("NO"), net, opt))
    args = SimpleNamespace(world_size=1)
    said = said_by(lambda: OfTrainer().on_train_begin(args, None, None, model=net, optimizer=opt))
    assert alone.format("args") in said
    other = torch.optim.SGD([net.bias])
    assert "expected LionCub for all parameters of Linear" in said_by(lambda: stays_local(net, [opt, other]))
    # each rank has one of two parameters of the same shape, so that LionCub cannot know
    two = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    assert "LionCub in ZeroRedundancyOptimizer" in said_by(lambda: ZeroRedundancyOptimizer(two, optimizers.LionCub))
    for option, value in (("deepspeed", "ds.json"), ("fsdp", "full_shard")):
        args = SimpleNamespace(**{option: value})
        assert f"args.{option}: expected none with LionCub" in said_by(
            lambda args=args: OfTrainer().on_init_end(args, None, None)
        )
    sharded = SimpleNamespace(accelerator_state=accelerator_of("FSDP"))
    begun = said_by(lambda: OfTrainer().on_train_begin(None, None, None, model=net, optimizer=sharded))
    assert "got FSDP, by which" in begun
    begun = said_by(lambda: OfTrainer().on_train_begin(None, None, None, model=net, optimizer=other))
    assert begun.startswith("ValueError: optimizer: expected LionCub for LionCubCallback, got SGD")
    for name in ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"):
        trainer = SimpleNamespace(strategy=type(name, (), {})())
        assert "strategy: expected 'ddp'" in said_by(lambda t=trainer: OfLightning().setup(t, net, "fit"))
    begun = said_by(lambda: OfLightning().on_fit_start(SimpleNamespace(optimizers=[other]), net))
    assert begun == "ValueError: configure_optimizers: expected LionCub for LionCubCallback, got SGD"


@on_ranks(2)
def test_the_trainer_takes_an_optimizer_that_was_built(rank: int, world_size: int) -> None:
    with as_torchrun(rank, world_size, shared_folder() / "built") as said:
        module = load_example("train_trainer")
        args = module.TrainingArguments(
            use_cpu=True, bf16=True, disable_tqdm=True, max_steps=8, save_strategy="no", eval_on_start=True
        )
        torch.manual_seed(0)
        model = module.Regression(module.PretrainedConfig()).to(args.device)
        opt = optimizers.LionCub(model.named_parameters(), lr=1e-3)
        data = [{"x": torch.randn(16), "labels": torch.ones(1)} for _ in range(128)]
        data = dict.fromkeys(("train_dataset", "eval_dataset"), data)
        module.Trainer(model, args, optimizers=(opt, None), callbacks=[module.LionCubCallback()], **data).train()
    assert said == []
    assert opt.stats().steps == 8
    assert opt.stats().unanimous < LOCAL
    opt.check_replicas()


@on_ranks(2)
def test_the_trainer_averages_momentum_where_it_may_save(rank: int, world_size: int) -> None:
    from transformers.trainer_utils import SaveStrategy

    from lioncub.integrations.transformers import LionCubCallback

    net, callback = nn.Linear(4, 4), LionCubCallback()
    opt = optimizers.LionCub(net.parameters(), lr=1e-3)

    def is_averaged(call: Callable[..., None], should_save: bool, strategy: str, only_model: bool = False) -> bool:
        for param in net.parameters():
            param.grad = torch.full_like(param, 1.0 + rank)
        opt.step()
        args = SimpleNamespace(save_strategy=SaveStrategy(strategy), save_only_model=only_model)
        call(args, None, SimpleNamespace(should_save=should_save), optimizer=opt)
        return bool(opt.state_dict()["param_groups"][0]["momentum_state"] == "averaged")

    for call in (callback.on_step_end, callback.on_epoch_end):
        assert is_averaged(call, True, "steps")
        assert not is_averaged(call, False, "steps")
        assert not is_averaged(call, True, "steps", only_model=True)
    assert is_averaged(callback.on_evaluate, False, "best")
    assert not is_averaged(callback.on_evaluate, False, "epoch")


@on_ranks(2)
def test_lightning_clips_in_bf16(rank: int, world_size: int) -> None:
    options: dict[str, Any] = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}
    found = run("lightning", shared_folder() / "lightning-bf16", **options)
    assert found["warnings"] == []
    assert found["stats"].unanimous < LOCAL


@on_ranks(2)
def test_lightning_in_fp16_skips_an_overflow_on_all_ranks_and_clips_as_the_page_says(
    rank: int, world_size: int
) -> None:
    (code,) = re.findall(r"```python\n(def configure_gradient_clipping.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"torch": torch}
    exec(code, names)
    norms = []

    def change(module: ModuleType) -> None:
        def clip(self: Any, optimizer: Any, **rest: Any) -> None:
            if len(norms) == 2 and rank == 1:
                self.layers[0].weight.grad[0, 0] = torch.inf
            names["configure_gradient_clipping"](self, optimizer, **rest)
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

        module.Regression.configure_gradient_clipping = clip

    def options() -> dict[str, Any]:
        from pytorch_lightning.plugins import MixedPrecision

        # by precision="16-mixed" Lightning would take bf16 on a CPU
        return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))}

    folder = shared_folder() / "lightning-fp16"
    assert "does not allow for gradient clipping" in said_by(
        lambda: run("lightning", folder, gradient_clip_val=0.5, **options())
    )
    found = run("lightning", folder, False, change, gradient_clip_val=0.5, **options())
    assert (found["stats"].steps, found["stats"].skipped_steps) == (32, 1)
    assert max(norms[:2]) <= 0.5 * (1 + 1e-3)


@on_ranks(2)
def test_two_stacks_use_one_ddp_alike(rank: int, world_size: int) -> None:
    from lioncub.integrations.common import keep_local

    net = nn.Linear(4, 4)
    opt = optimizers.LionCub(net.parameters(), lr=1e-3)
    assert stays_local(net, [SimpleNamespace(optimizer=opt, param_groups=opt.param_groups)])
    assert stays_local(net, [])
    assert not stays_local(nn.Linear(4, 4), [opt])
    ddp_model = DistributedDataParallel(net)
    for model in (ddp_model, SimpleNamespace(_orig_mod=ddp_model), net):
        keep_local(model)
    ddp_model(torch.full((2, 4), 1.0 + rank)).sum().backward()
    assert not same_on_all(net.weight.grad.tolist())
    assert isinstance(lion_cub_of(SimpleNamespace(_optimizer=opt)), LionCub)
