"""Optimizers' steps over the parameters of GPT-2 small, and over one flat tensor of as many elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lioncub import Lion, LionCub
from speed.data import BETA1, BETA2, DECAY, DTYPES, LR, Call
from speed.peers import foreach_lion_step, leaves, lion_pytorch_step

LAYERS, WIDTH, CONTEXT, VOCABULARY = 12, 768, 1024, 50257
# as GPT-2 is initialised: a step of LR moves most bf16 numbers of that size
STD = 0.02
_OPTIONS = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY}


def gpt2_shapes(layers: int = LAYERS, width: int = WIDTH) -> list[tuple[int, ...]]:
    """Shapes of GPT-2 small's 148 parameter tensors (Radford et al. 2019), 124,439,808 elements."""
    norm: list[tuple[int, ...]] = [(width,), (width,)]
    linears = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    attention, mlp = ([shape for i, o in pair for shape in ((i, o), (o,))] for pair in (linears[:2], linears[2:]))
    block = [*norm, *attention, *norm, *mlp]
    return [(VOCABULARY, width), (CONTEXT, width), *(block * layers), *norm]


@dataclass(frozen=True)
class Step:
    """An optimizer, by name, over a layout in one dtype."""

    optimizer: str
    layout: str
    dtype: str

    @property
    def name(self) -> str:
        return f"step:{self.optimizer}/{self.layout}/{self.dtype}"

    @property
    def is_ours(self) -> bool:
        return self.optimizer in OURS


OURS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Lion": Lion, "LionCub": LionCub}
GPT2, FLAT = "gpt2_small", "one_tensor"
STEPS = (
    *(Step(ours, layout, dtype) for dtype in DTYPES for layout in (GPT2, FLAT) for ours in OURS),
    *(Step(peer, GPT2, "fp32") for peer in ("lion-pytorch", "torch_foreach")),
)


def make_step(step: Step, shapes: list[tuple[int, ...]]) -> Call:
    """A step of tensors of these shapes, each with its own storage; flat ones of as many elements."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if step.layout == FLAT:
        shapes = [(sum(sizes),)]
    dtype = DTYPES[step.dtype]
    params, grads = ([(std * torch.randn(shape)).to(dtype) for shape in shapes] for std in (STD, 1.0))
    run, momenta = _prepare(step, params, grads)
    return Call(run, (*params, *grads, *momenta), (*params, *momenta))


def _prepare(step: Step, params: list[Tensor], grads: list[Tensor]) -> tuple[Callable[[], object], list[Tensor]]:
    """The call, and the momenta, or what is as large."""
    if step.optimizer == "torch_foreach":
        momenta = [torch.zeros_like(param) for param in params]
        return lambda: foreach_lion_step(params, grads, momenta), momenta
    if step.optimizer == "lion-pytorch":
        return lion_pytorch_step(params, grads), params
    of_ours = leaves(params, grads)
    opt = OURS[step.optimizer](of_ours, **_OPTIONS)
    return opt.step, [opt.state[leaf]["exp_avg"] for leaf in of_ours]
