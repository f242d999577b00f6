"""Other ways to do what the kernels do, and parts of it alone, all on fp32: what their speed is compared with."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lioncub.kernels import packed_bytes, reference
from lioncub.kernels.rounding import Streams
from lioncub.kernels.scalars import Mix, round_to_float32
from speed.data import BETA1, BETA2, DECAY, LR, Call, Data, new
from speed.streams import philox, read

_MIX1, _MIX2 = (Mix(round_to_float32(beta), round_to_float32(1 - beta)) for beta in (BETA1, BETA2))


@dataclass(frozen=True)
class Peer:
    """A way to do what the case named ``of`` does; it moves the bytes that the case must move."""

    of: str
    way: str
    make: Callable[[Data], Call]

    @property
    def name(self) -> str:
        return f"{self.of}/{self.way}/fp32/16Mi"


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


def lion_pytorch_step(params: list[Tensor], grads: list[Tensor]) -> Callable[[], object]:
    """The step of lion-pytorch's optimizer."""
    import lion_pytorch

    return lion_pytorch.Lion(leaves(params, grads), lr=LR, betas=(BETA1, BETA2), weight_decay=DECAY).step


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


def _encode_call(run: Callable[[], object], data: Data) -> Call:
    return Call(run, (data.exp_avg, data.grad), (new(packed_bytes(data.n)),))


def _vote_call(run: Callable[[], object], data: Data) -> Call:
    return Call(run, (data.voters(8),), (new(packed_bytes(data.n)),))


def _apply_call(run: Callable[[], object], data: Data) -> Call:
    return Call(run, (data.param, data.codes()), (data.param,))


def _step_call(run: Callable[[], object], data: Data) -> Call:
    return Call(run, (data.param, data.grad, data.exp_avg), (data.param, data.exp_avg))


def _quantize_call(run: Callable[[], object], data: Data) -> Call:
    return Call(run, (data.grad,), (new(packed_bytes(data.n, 2)),))


def _compiled_encode(d: Data) -> Call:
    return _encode_call(compiled(reference.lion_encode, [d.exp_avg], [d.grad], _MIX1, 0, [d.codes()], None), d)


def _compiled_vote(d: Data) -> Call:
    return _vote_call(compiled(reference.majority_vote, d.voters(8), 0, d.codes(), None), d)


def _compiled_apply(d: Data) -> Call:
    return _apply_call(
        compiled(reference.lion_apply_, [d.param], [d.codes()], 1, 2, 1, LR, 1 - LR * DECAY, None, None, None), d
    )


def _compiled_step(d: Data) -> Call:
    lists = [d.param], [d.grad], [d.exp_avg]
    return _step_call(compiled(reference.lion_step_, *lists, LR, 1 - LR * DECAY, _MIX1, _MIX2), d)


def _compiled_quantize(d: Data, stream: Streams | None = None) -> Call:
    return _quantize_call(compiled(reference.quantize, d.grad, d.scale, 0.5, 0, 2, stream, d.codes(2)), d)


def _numpy_pack(d: Data) -> Call:
    x = d.param.numpy()
    return Call(lambda: np.packbits(x > 0, bitorder="little"), (d.param,), (new(packed_bytes(d.n)),))


def _numpy_unpack(d: Data) -> Call:
    codes = d.codes().numpy()

    def unpack() -> Any:
        return np.unpackbits(codes, bitorder="little").astype(np.float32) * np.float32(2) - np.float32(1)

    return Call(unpack, (d.codes(),), (new(d.n, d.dtype),))


def _read_only(d: Data) -> Call:
    a, b = d.exp_avg.numpy().view(np.int64), d.grad.numpy().view(np.int64)
    return Call(lambda: read(a, b), (d.exp_avg, d.grad), ())


READ, PHILOX, COMPILED = "two_reads", "its_random_words_alone", "torch.compile"
STOCHASTIC = "quantize:2_bits_stochastic"
PEERS = (
    Peer("pack_signs", "numpy", _numpy_pack),
    Peer("unpack_signs", "numpy", _numpy_unpack),
    Peer("lion_encode", "plain_torch", lambda d: _encode_call(lambda: torch_encode(d.exp_avg, d.grad), d)),
    Peer("lion_encode", COMPILED, _compiled_encode),
    Peer("lion_encode", READ, _read_only),
    Peer("majority_vote:8_voters", "numpy", lambda d: _vote_call(lambda: numpy_vote(d.voters(8).numpy()), d)),
    Peer("majority_vote:8_voters", COMPILED, _compiled_vote),
    Peer("lion_apply_", "plain_torch", lambda d: _apply_call(lambda: torch_apply(d.param, d.codes()), d)),
    Peer("lion_apply_", COMPILED, _compiled_apply),
    Peer("lion_step_", "lion-pytorch", lambda d: _step_call(lion_pytorch_step([d.param], [d.grad]), d)),
    Peer(
        "lion_step_",
        "torch_foreach",
        lambda d: _step_call(lambda: foreach_lion_step([d.param], [d.grad], [d.exp_avg]), d),
    ),
    Peer("lion_step_", COMPILED, _compiled_step),
    Peer("quantize:2_bits", COMPILED, _compiled_quantize),
    Peer(STOCHASTIC, COMPILED, lambda d: _compiled_quantize(d, Streams(1, 3, 2, [4]))),
    Peer(STOCHASTIC, PHILOX, lambda d: _quantize_call(lambda: philox(d.n), d)),
)
