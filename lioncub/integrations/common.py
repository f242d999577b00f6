"""What the stacks have in common: which optimizers are LionCub, whose gradients stay local, one momentum for a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lioncub.ddp import keep_gradients_local
from lioncub.optimizer import LionCub

# where stacks keep the optimizer that they wrap
_INNER = ("optimizer", "_optimizer", "optim")
_MAX_DEPTH = 5
# by `accelerator.distributed_type.value`
_REFUSED = {
    "DEEPSPEED": "DeepSpeed, which steps itself, on shards of the state; train under DDP",
    "MEGATRON_LM": "Megatron-LM, which steps itself; train under DDP",
    "FSDP": (
        "FSDP, by which Accelerate exchanges the parameters of an optimizer that was built; train under DDP, or call "
        "fully_shard(model) without Accelerate before LionCub is built"
    ),
}
# packages whose optimizers give each rank a part of the state
_SHARDING = {"deepspeed": "DeepSpeed", "megatron": "Megatron"}


def lion_cub_of(optimizer: Any) -> LionCub | None:
    """Return the LionCub that an optimizer is or wraps; None for other optimizers.

    Raises ValueError for a LionCub within an optimizer that gives each rank a part of the parameters or of the state.
    """
    sharding = None
    for _ in range(_MAX_DEPTH):
        if isinstance(optimizer, LionCub):
            if sharding is not None:
                raise ValueError(
                    f"optimizer: expected LionCub without {sharding}, got one within it; {sharding} shards the state, "
                    "so ranks would vote on other parameters. Use LionCub under DDP"
                )
            return optimizer
        module = type(optimizer).__module__
        sharding = next((name for prefix, name in _SHARDING.items() if f"{module}.".startswith(f"{prefix}.")), sharding)
        inner = [vars(optimizer)[name] for name in _INNER if name in getattr(optimizer, "__dict__", {})]
        if not inner:
            return None
        (optimizer, *_) = inner
    return None


def lion_cubs_of(optimizers: Iterable[Any]) -> list[LionCub]:
    """Return those of the optimizers that are LionCub, unwrapped, in their order."""
    return [cub for cub in map(lion_cub_of, optimizers) if cub is not None]


def stays_local(module: nn.Module, optimizers: Sequence[Any], *, was_local: bool = False) -> bool:
    """Whether the gradients of a module are for LionCub to vote with: it has some of them, or there is no optimizer.

    ``was_local`` says that they are already, whoever will have them.
    Raises ValueError where another optimizer has some too, since it would step on gradients of one rank alone.
    """
    mine = {id(param) for param in module.parameters()}
    stepping = [
        optimizer
        for optimizer in optimizers
        if not mine.isdisjoint(id(param) for group in optimizer.param_groups for param in group["params"])
    ]
    others = [type(optimizer).__name__ for optimizer in stepping if lion_cub_of(optimizer) is None]
    is_local = not optimizers or was_local or len(others) < len(stepping)
    if is_local and others:
        raise ValueError(
            f"optimizers: expected LionCub for all parameters of {type(module).__name__}, since DDP averages none of "
            f"its gradients, got {', '.join(others)} for some, whose replicas would drift apart"
        )
    return is_local


def keep_local(model: Any) -> bool:
    """Keep the gradients of a model local that may be wrapped in DDP, compiled or not; returns whether it is."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, DistributedDataParallel):
        keep_gradients_local(model)
        return True
    return False


def check_processes(cub: LionCub, processes: int, name: str, cure: str) -> None:
    """Raise ValueError where a stack trains in fewer processes than vote, so that all would read the same data."""
    if cub._workers > processes:
        raise ValueError(
            f"{name}: expected {name} of {cub._workers} processes or more, as LionCub has, got one of {processes}; on "
            f"CPUs pass {cure}"
        )


def refuse_sharding(distributed_type: Any) -> None:
    """Raise ValueError for a kind of training of Accelerate that LionCub cannot step in."""
    name = getattr(distributed_type, "value", None)
    if name in _REFUSED:
        raise ValueError(f"accelerator: expected DDP or one process for LionCub, got {_REFUSED[name]}")
