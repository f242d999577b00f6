"""DistributedDataParallel without its gradient traffic."""

# no postponed annotations here: DDP compares the hook's annotations with the types themselves

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def keep_gradients_local(ddp_model: DistributedDataParallel) -> None:
    """Make DDP send no gradients: each worker keeps its own, for `LionCub` to vote with. Buffers still follow DDP.

    Call it once, before the first backward. Raises TypeError for a model that is not wrapped in DDP.
    """
    if not isinstance(ddp_model, DistributedDataParallel):
        raise TypeError(
            f"ddp_model: expected a DistributedDataParallel module, got {type(ddp_model).__name__}; "
            "a model without DDP keeps its gradients local already"
        )
    ddp_model.register_comm_hook(None, _send_nothing)


def _send_nothing(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
