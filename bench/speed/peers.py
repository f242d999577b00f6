"""Other ways to do what the kernels do, and parts of it alone, all on fp32: what their speed is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels import reference
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix, round_to_float32
from speed.cases import CASES
from speed.data import BETA1, BETA2, DECAY, LR, Call, Data
from speed.streams import philox, read

_MIX1, _MIX2 = (Mix(round_to_float32(beta), round_to_float32(1 - beta)) for beta in (BETA1, BETA2))


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


def torch_pack(bits: Tensor) -> Tensor:
    """Booleans, a multiple of 8, to bits in plain torch ops."""
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return torch.sum(bits.view(-1, 8) * powers, dim=1, dtype=torch.uint8)


def torch_encode(exp_avg: Tensor, grad: Tensor) -> Tensor:
    """Sign bits of the update; zeros get bit 0."""
    return torch_pack(exp_avg.mul(BETA1).add_(grad, alpha=1 - BETA1) > 0)


def torch_apply(param: Tensor, packed: Tensor) -> None:
    """param = param*decay - lr*(+1/-1)."""
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    votes = bits.view(-1).to(torch.float32).mul_(2).sub_(1)
    param.mul_(1 - LR * DECAY).add_(votes, alpha=-LR)


def numpy_vote(packed: Any) -> Any:
    """Majority of an even number of voters by unpacking, summing and packing; ties give 0."""
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


def compiled(function: Callable[..., None], *arguments: Any) -> Callable[[], object]:
    """torch.compile of a function of the reference, compiled by a first call."""
    with warnings.catch_warnings():
        # torch deprecates what its own compiler uses
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        torch._dynamo.reset()
        fast = torch.compile(function, dynamic=False)
        fast(*arguments)
    return lambda: fast(*arguments)


def _numpy_pack(values: Any) -> Any:
    return np.packbits(values > 0, bitorder="little")


def _numpy_unpack(codes: Any) -> Any:
    return np.unpackbits(codes, bitorder="little").astype(np.float32) * np.float32(2) - np.float32(1)


def _compiled_encode(d: Data) -> Callable[[], object]:
    return compiled(reference.lion_encode, [d.exp_avg], [d.grad], _MIX1, 0, [d.codes()], None)


def _compiled_apply(d: Data) -> Callable[[], object]:
    lists = [d.param], [d.codes()]
    return compiled(reference.lion_apply_, *lists, 1, 2, 1, LR, 1 - LR * DECAY, None, None, None)


def _compiled_step(d: Data) -> Callable[[], object]:
    lists = [d.param], [d.grad], [d.exp_avg]
    return compiled(reference.lion_step_, *lists, LR, 1 - LR * DECAY, _MIX1, _MIX2)


def _compiled_quantize(d: Data, stream: Streams | None = None) -> Callable[[], object]:
    return compiled(reference.quantize, d.grad, d.scale, 0.5, 0, 2, stream, d.codes(2))


def _foreach_step(d: Data) -> Callable[[], object]:
    return partial(foreach_lion_step, [d.param], [d.grad], [d.exp_avg])


def _read_only(d: Data) -> Call:
    a, b = d.exp_avg.numpy().view(np.int64), d.grad.numpy().view(np.int64)
    return Call(partial(read, a, b), (d.exp_avg, d.grad), ())


READ, PHILOX, COMPILED = "two_reads", "its_random_words_alone", "torch.compile"
VOTE, STOCHASTIC = "majority_vote:8_voters", "quantize:2_bits_stochastic"
PEERS = (
    Peer("pack_signs", "numpy", lambda d: partial(_numpy_pack, d.param.numpy())),
    Peer("unpack_signs", "numpy", lambda d: partial(_numpy_unpack, d.codes().numpy())),
    Peer("lion_encode", "plain_torch", lambda d: partial(torch_encode, d.exp_avg, d.grad)),
    Peer("lion_encode", COMPILED, _compiled_encode),
    Peer("lion_encode", READ, _read_only),
    Peer(VOTE, "numpy", lambda d: partial(numpy_vote, d.voters(8).numpy())),
    Peer(VOTE, COMPILED, lambda d: compiled(reference.majority_vote, d.voters(8), 0, d.codes(), None)),
    Peer("lion_apply_", "plain_torch", lambda d: partial(torch_apply, d.param, d.codes())),
    Peer("lion_apply_", COMPILED, _compiled_apply),
    Peer("lion_step_", "lion-pytorch", lambda d: lion_pytorch_step([d.param], [d.grad])),
    Peer("lion_step_", "torch_foreach", _foreach_step),
    Peer("lion_step_", COMPILED, _compiled_step),
    Peer("quantize:2_bits", COMPILED, _compiled_quantize),
    Peer(STOCHASTIC, COMPILED, lambda d: _compiled_quantize(d, Streams(1, 3, 2, [4]))),
    Peer(STOCHASTIC, PHILOX, lambda d: partial(philox, d.n)),
)
