"""Other ways to do what the kernels do, on fp32: the speed of these is compared with theirs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed.cases import CASES
from speed.data import BETA1, BETA2, DECAY, LR, Call, Data


@dataclass(frozen=True)
class Peer:
    """Another way to do what the case named ``of`` does; ``prepare`` makes it ready to run.

    It moves the bytes that the case must move, unless ``prepare`` returns a `Call`.
    """

    of: str
    way: str
    prepare: Callable[[Data], Callable[[], object] | Call]

    @property
    def name(self) -> str:
        return f"{self.of}/{self.way}/fp32/16Mi"

    def make(self, data: Data) -> Call:
        """Prepare the call on these tensors."""
        found = self.prepare(data)
        if isinstance(found, Call):
            return found
        case = next(case for case in CASES if case.name == self.of)
        like = case.make(data, "reference")
        return Call(found, like.reads, like.writes)


def torch_pack(codes: Tensor, bits: int = 1) -> Tensor:
    """Pack codes, a multiple of 8, in plain torch ops."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return torch.sum(codes.view(-1, 8 // bits).to(torch.uint8) << shifts, dim=1, dtype=torch.uint8)


def torch_unpack(packed: Tensor) -> Tensor:
    """Unpack one-bit codes, along a new last dimension."""
    return (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1


def torch_encode(exp_avg: Tensor, grad: Tensor) -> Tensor:
    """Sign bits of the update; zeros get bit 0."""
    return torch_pack(exp_avg.mul(BETA1).add_(grad, alpha=1 - BETA1) > 0)


def torch_apply(param: Tensor, packed: Tensor) -> None:
    """param = param*decay - lr*(+1/-1)."""
    votes = torch_unpack(packed).view(-1).to(torch.float32).mul_(2).sub_(1)
    param.mul_(1 - LR * DECAY).add_(votes, alpha=-LR)


def torch_vote(packed: Tensor) -> Tensor:
    """Majority of an even number of voters; ties give 0."""
    return torch_pack(torch_unpack(packed).sum(dim=0, dtype=torch.uint8) > packed.shape[0] // 2)


def torch_quantize(values: Tensor, scale: Tensor) -> Tensor:
    """Nearest of the levels of norm "l1", -2*scale, 0 and 2*scale, as 2-bit codes."""
    return torch_pack(values.div(2 * scale).round_().clamp_(-1, 1).add_(1), bits=2)


def numpy_vote(packed: Any) -> Any:
    """`torch_vote` in numpy, which has ops for bits."""
    ones = np.unpackbits(packed, axis=1, bitorder="little").sum(axis=0, dtype=np.uint8)
    return np.packbits(ones > packed.shape[0] // 2, bitorder="little")


def foreach_lion_step(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor]) -> None:
    """Lion's step in torch._foreach ops."""
    update = torch._foreach_mul(exp_avgs, BETA1)
    torch._foreach_add_(update, grads, alpha=1 - BETA1)
    torch._foreach_sign_(update)
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_add_(params, update, alpha=-LR)
    torch._foreach_lerp_(exp_avgs, grads, 1 - BETA2)


def lion_pytorch_step(params: list[Tensor], grads: list[Tensor], **options: Any) -> Callable[[], object]:
    """Return the step of lion-pytorch's optimizer."""
    import lion_pytorch

    rates = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY}
    return lion_pytorch.Lion(leaves(params, grads), **rates, **options).step


def leaves(params: list[Tensor], grads: list[Tensor]) -> list[torch.nn.Parameter]:
    """Parameters in the tensors' memory, with their gradients: what an optimizer takes."""
    found = [torch.nn.Parameter(param) for param in params]
    for leaf, grad in zip(found, grads, strict=True):
        leaf.grad = grad
    return found


def _compiled(function: Callable[..., object], *arguments: Any) -> Callable[[], object]:
    """torch.compile of a function, compiled by a first call."""
    with warnings.catch_warnings():
        # torch deprecates what its own compiler uses
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch._dynamo.reset()
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    return partial(fast, *arguments)


def _numpy_pack(values: Any) -> Any:
    return np.packbits(values > 0, bitorder="little")


def _numpy_unpack(codes: Any) -> Any:
    return np.unpackbits(codes, bitorder="little").astype(np.float32) * np.float32(2) - np.float32(1)


def _step_arguments(d: Data) -> tuple[list[Tensor], ...]:
    return [d.param], [d.grad], [d.exp_avg]


COMPILED, VOTE = "torch.compile", "majority_vote:8_voters"
PEERS = (
    Peer("pack_signs", "numpy", lambda d: partial(_numpy_pack, d.param.numpy())),
    Peer("unpack_signs", "numpy", lambda d: partial(_numpy_unpack, d.codes().numpy())),
    Peer("lion_encode", "plain_torch", lambda d: partial(torch_encode, d.exp_avg, d.grad)),
    Peer("lion_encode", COMPILED, lambda d: _compiled(torch_encode, d.exp_avg, d.grad)),
    Peer(VOTE, "numpy", lambda d: partial(numpy_vote, d.voters(8).numpy())),
    Peer(VOTE, COMPILED, lambda d: _compiled(torch_vote, d.voters(8))),
    Peer("lion_apply_", "plain_torch", lambda d: partial(torch_apply, d.param, d.codes())),
    Peer("lion_apply_", COMPILED, lambda d: _compiled(torch_apply, d.param, d.codes())),
    Peer("lion_step_", "lion-pytorch", lambda d: lion_pytorch_step([d.param], [d.grad])),
    Peer("lion_step_", "torch_foreach", lambda d: partial(foreach_lion_step, *_step_arguments(d))),
    Peer("lion_step_", COMPILED, lambda d: _compiled(foreach_lion_step, *_step_arguments(d))),
    Peer("quantize:2_bits", COMPILED, lambda d: _compiled(torch_quantize, d.grad, d.scale)),
)
