"""DistributedDataParallel without its gradient traffic."""

# no postponed annotations here: DDP compares the hook's annotations with the types themselves

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle


def keep_gradients_local(ddp_model: DistributedDataParallel) -> None:
    """Make DDP send no gradients: each worker keeps its own, for `LionCub` to vote with. Buffers still follow DDP.

    Call it before the first backward; a second call changes nothing. Raises TypeError for a model that is not wrapped
    in DDP, ValueError for one that would send gradients nevertheless: with another communication hook, or with
    ``delay_all_reduce_named_params``.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"ddp_model: expected a DistributedDataParallel module, got {type(ddp_model).__name__}; "
            "a model without DDP keeps its gradients local already"
        )
    # private names of torch, for better errors: where they are missing, torch raises its own
    if getattr(ddp_model, "_delay_all_reduce_params", None):
        raise ValueError(
            "ddp_model: expected DDP without delay_all_reduce_named_params, which sends those gradients past any "
            "communication hook, got one with it"
        )
    noted = getattr(ddp_model, "_comm_hooks", [])
    before = list(noted)
    hooks = [hook for hook, _ in before]
    if local_gradients_hook in hooks:
        return
    try:
        ddp_model.register_comm_hook(None, local_gradients_hook)
    except RuntimeError as error:
        # it has noted the hook that it refuses
        noted[:] = before
        if "only be called once" not in str(error):
            raise
        got = ", ".join(getattr(hook, "__qualname__", repr(hook)) for hook in hooks) or "a built-in hook"
        raise ValueError(
            f"ddp_model: expected DDP without a communication hook, since no gradients are sent, got one with {got}"
        ) from None


def keep_gradients_local_once_wrapped(module: nn.Module) -> RemovableHandle:
    """Call `keep_gradients_local` on the DDP that a framework wraps ``module`` in, when that first runs it.

    For frameworks whose DDP model user code cannot reach before the first backward. Where nothing ever wraps the
    module, gradients are local already. Returns a handle whose ``remove()`` takes this back until then. Raises
    TypeError for a module that is wrapped already; the first forward raises as `keep_gradients_local`.
    """
    if isinstance(module, DistributedDataParallel):
        raise TypeError(
            "module: expected one that is not wrapped in DistributedDataParallel yet, got one that is; use "
            "lioncub.keep_gradients_local"
        )
    if not hasattr(DistributedDataParallel, "_active_ddp_module"):
        raise RuntimeError(
            f"module: expected a torch whose DistributedDataParallel names the module that is running, got "
            f"{torch.__version__}; call lioncub.keep_gradients_local on the wrapped model"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def find_ddp(_module: nn.Module, _args: Any) -> None:
        # set while DDP runs what it wraps
        ddp_model = DistributedDataParallel._active_ddp_module
        if ddp_model is not None:
            keep_gradients_local(ddp_model)
            handle.remove()

    handle = module.register_forward_pre_hook(find_ddp)
    return handle


def local_gradients_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Return a bucket of gradients as it is: a communication hook of DDP that sends nothing.

    For frameworks that take a hook, as ``DDPStrategy(ddp_comm_hook=...)`` of Lightning. `keep_gradients_local`
    registers it on a model at hand.
    """
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
