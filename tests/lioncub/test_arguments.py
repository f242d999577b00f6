"""Wrong arguments of optimizers and their configurations: which one it is, what was expected, what came."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gloo_workers import said_by
from optimizers import Lion, LionCub
from torch import Tensor, nn

import lioncub
from lioncub import BySize, MomentumSync, Precision, Quantized, SignMean, SignVote
from lioncub.overlap import check_devices
from lioncub.simulate import Workers

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])


def one() -> list[Tensor]:
    return [torch.zeros(3).requires_grad_()]


def assert_says(call: Callable[[], Any], message: str) -> None:
    said = said_by(call)
    assert re.match(message, said), said


OF_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "ValueError: lr: expected a finite number >= 0, got -1.0"),
    ({"lr": math.nan}, "ValueError: lr: expected a finite number >= 0, got nan"),
    ({"lr": 1e39}, r"ValueError: lr: expected a finite number >= 0, got 1e\+39, which float32 cannot hold"),
    ({"lr": 10**400}, "ValueError: lr: expected a number that float64 holds"),
    ({"lr": torch.tensor([0.1, 0.2])}, "TypeError: lr: expected a number or a 0-dim tensor"),
    ({"lr": True}, "TypeError: lr: expected a number or a 0-dim tensor, got True"),
    ({"lr": "fast"}, "TypeError: lr: expected a number or a 0-dim tensor, got 'fast'"),
    ({"betas": (0.9, 1.0)}, r"ValueError: betas\[1\]: expected a number in \[0, 1\), got 1.0"),
    ({"betas": (math.nan, 0.9)}, r"ValueError: betas\[0\]: expected a number in \[0, 1\)"),
    ({"betas": 0.9}, "ValueError: betas: expected two numbers, got 0.9"),
    ({"weight_decay": -0.1}, "ValueError: weight_decay: expected a finite number >= 0, got -0.1"),
    ({"weight_decay": 1e39}, "ValueError: weight_decay: expected a finite number >= 0"),
    ({"lr": 1e30, "weight_decay": 1e30}, r"ValueError: weight_decay: expected lr \* weight_decay finite in float32"),
    ({"maximize": "false"}, "TypeError: maximize: expected True or False, got 'false'"),
    ({"impl": "cuda"}, "ValueError: impl: expected one of .*, got 'cuda'"),
    ({"param_rounding": "up"}, r"ValueError: param_rounding: expected one of \('nearest', 'stochastic'\), got 'up'"),
    ({"master_weights": 1}, "TypeError: master_weights: expected True or False, got 1"),
    ({"master_weights": "no"}, "TypeError: master_weights: expected True or False, got 'no'"),
    ({"momentum_dtype": torch.float16}, "ValueError: momentum_dtype: expected .*bfloat16, got torch.float16"),
    ({"rounding_seed": 0.5}, "TypeError: rounding_seed: expected an integer, got 0.5"),
    (
        {"master_weights": True, "param_rounding": "stochastic"},
        "ValueError: param_rounding: expected 'nearest' with master_weights=True, .* got 'stochastic'",
    ),
]
OF_LIONCUB: list[tuple[dict[str, Any], str]] = [
    ({"algorithm": "ring"}, "ValueError: algorithm: expected one of .*, got 'ring'"),
    ({"on_nonfinite": "ignore"}, "ValueError: on_nonfinite: expected 'raise' or 'skip', got 'ignore'"),
    ({"bucket_mb": math.inf}, "ValueError: bucket_mb: expected MiB of packed votes > 0, got inf"),
    ({"bucket_mb": 0}, "ValueError: bucket_mb: expected MiB of packed votes > 0, got 0"),
    ({"capturable": "no"}, "TypeError: capturable: expected True or False, got 'no'"),
    ({"overlap": "no"}, "TypeError: overlap: expected True or False, got 'no'"),
    ({"broadcast": "no"}, "TypeError: broadcast: expected True or False, got 'no'"),
    ({"drift_every": 1.5}, "ValueError: drift_every: expected a number of steps >= 1, got 1.5"),
    ({"drift_every": True}, "ValueError: drift_every: expected a number of steps >= 1, got True"),
    ({"drift_every": 0}, "ValueError: drift_every: expected a number of steps >= 1, got 0"),
    ({"process_group": "gloo"}, "TypeError: process_group: expected a ProcessGroup or None, got str 'gloo'"),
    ({"profile": 3}, "TypeError: profile: expected a path or a Profile, got int 3"),
    ({"momentum_sync": 4}, r"TypeError: momentum_sync: expected None or MomentumSync\(...\), got int 4"),
    (
        {"momentum_sync": MomentumSync(select=["head.*"])},
        "ValueError: .*select: expected it to choose at least one parameter",
    ),
    (
        {"compression": SignVote},
        r"TypeError: compression: expected an object such as SignVote\(\), got the class itself",
    ),
    ({"compression": "sign"}, r"TypeError: compression: expected SignVote\(\), .* got str 'sign'"),
    ({"capturable": True, "overlap": True}, "ValueError: overlap: expected False with capturable=True, got True"),
    (
        {"capturable": True, "momentum_sync": MomentumSync(every=2)},
        r"ValueError: momentum_sync: expected None or MomentumSync\(every=1\)",
    ),
    ({"capturable": True, "drift_every": 5}, "ValueError: drift_every: expected None with capturable=True, got 5"),
    (
        {"capturable": True, "algorithm": "hierarchical"},
        "ValueError: algorithm: expected one of .* with capturable=True, got 'hierarchical'",
    ),
]
OF_CONFIGURATIONS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Quantized(bits=2.0), "TypeError: bits: expected an integer, got 2.0"),
    (lambda: Quantized(bits=3), r"ValueError: bits: expected one of .2, 4, 8., got 3"),
    (lambda: Quantized(norm="l3"), "ValueError: norm: expected one of .*, got 'l3'"),
    (lambda: Quantized(stochastic="no"), "TypeError: stochastic: expected True or False, got 'no'"),
    (lambda: Quantized(stochastic=1), "TypeError: stochastic: expected True or False, got 1"),
    (lambda: Quantized(seed=1.5), "TypeError: seed: expected an integer, got 1.5"),
    (lambda: Quantized(block=True), "TypeError: block: expected an integer, got True"),
    (lambda: Quantized(block=48), "ValueError: block: expected a power of two or None, got 48"),
    *(
        (
            lambda every=every: Quantized(share_scales_every=every),
            f"(Value|Type)Error: share_scales_every: expected None or a number of steps >= 1, got {every}",
        )
        for every in (0, 1.5, True)
    ),
    (lambda: BySize(max_numel=2.5), "ValueError: max_numel: expected a number of elements >= 1, got 2.5"),
    (lambda: BySize(max_numel=0), "ValueError: max_numel: expected a number of elements >= 1, got 0"),
    (
        lambda: BySize(large=BySize()),
        r"TypeError: large: expected SignVote\(\), .* or Quantized\(\), got BySize BySize",
    ),
    (lambda: BySize(small=SignMean), r"TypeError: small: expected an object such as SignMean\(\), got the class"),
    (lambda: MomentumSync(every=1.5), "ValueError: every: expected a number of steps >= 1, got 1.5"),
    (lambda: MomentumSync(every=0), "ValueError: every: expected a number of steps >= 1, got 0"),
    (
        lambda: MomentumSync(schedule="growing"),
        r"ValueError: schedule: expected one of \('fixed', 'staggered'\), got 'g",
    ),
    (lambda: MomentumSync(dtype="fp16"), "ValueError: dtype: expected one of .*, got 'fp16'"),
    (lambda: MomentumSync(select=[3]), r"TypeError: select: expected patterns, which are strings, got \[3\]"),
    (lambda: MomentumSync(select=3), "TypeError: select: expected 'auto', a list of patterns or a function, got 3"),
    (
        lambda: MomentumSync(select="head"),
        "ValueError: select: expected 'auto', a list of patterns or a function, got 'h",
    ),
    (lambda: MomentumSync(select="auto"), "ValueError: budget: expected a fraction > 0 with select='auto', got None"),
    (lambda: MomentumSync(select="auto", budget=True), "TypeError: budget: expected a fraction > 0 or None, got True"),
    (lambda: MomentumSync(budget=0.5), "ValueError: budget: expected it with select='auto' only, got 0.5"),
    (lambda: Precision(rounding_seed=0.5), "TypeError: rounding_seed: expected an integer, got 0.5"),
    *(
        (lambda sizes=sizes: Workers(**sizes), "ValueError: (local_)?size: expected a number of workers >= 1")
        for sizes in ({"size": 0}, {"size": 2.0}, {"size": True}, {"size": 2, "local_size": 1.0})
    ),
    (lambda: Workers(6, local_size=4), "ValueError: local_size: expected a divisor of the 6 workers, got 4"),
    (
        lambda: lioncub.keep_gradients_local(nn.Linear(2, 2)),
        "TypeError: ddp_model: expected a DistributedDataParallel module, got Linear",
    ),
    *(
        (
            lambda devices=devices: check_devices(devices),
            "ValueError: overlap: expected all parameters on the CPU or on one CUDA device, got",
        )
        for devices in (["cpu", "cuda:0"], ["cuda:0", "cuda:1"], ["xpu:0"])
    ),
]


@BOTH
@pytest.mark.parametrize(("options", "message"), OF_BOTH)
def test_options_of_both(optimizer: type, options: dict[str, Any], message: str) -> None:
    assert_says(lambda: optimizer(one(), **options), message)


@pytest.mark.parametrize(("options", "message"), OF_LIONCUB)
def test_options_of_lioncub(options: dict[str, Any], message: str) -> None:
    assert_says(lambda: LionCub(one(), **options), message)


@pytest.mark.parametrize(("make", "message"), OF_CONFIGURATIONS)
def test_configurations(make: Callable[[], Any], message: str) -> None:
    assert_says(make, message)


@BOTH
@pytest.mark.parametrize(("name", "value"), [("lr", 1e39), ("maximize", "false"), ("maximize", 1), ("betas", (0.9, 1))])
def test_options_are_checked_when_they_are_set_later(optimizer: type, name: str, value: Any) -> None:
    p, q = one() + one()
    opt = optimizer([{"params": [p]}, {"params": [q]}])
    p.grad = q.grad = torch.ones(3)
    # nothing moves, in the group before it neither
    opt.param_groups[1][name] = value
    assert_says(opt.step, f"(Value|Type)Error: {name}.*: expected")
    assert not p.any()
    assert not opt.state[p]["exp_avg"].any() if p in opt.state else True


@BOTH
def test_a_refused_group_changes_nothing(optimizer: type) -> None:
    (p,) = params = one()
    opt = optimizer(params, lr=1.0)
    assert_says(lambda: opt.add_param_group({"params": one(), "lr": -1.0}), "ValueError: lr: expected")
    assert len(opt.param_groups) == 1
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-1.0] * 3


def test_a_compression_of_a_group_is_checked() -> None:
    groups = [{"params": one(), "compression": "sign"}]
    assert_says(lambda: LionCub(groups), r"TypeError: compression: expected SignVote\(\), .* got str 'sign'")


PARAMETERS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.zeros(3, device="meta"), "ValueError: .*: expected a tensor with data, got one on the meta"),
    "sparse": (
        lambda: torch.zeros(3, 3).to_sparse(),
        "TypeError: .*: expected a dense tensor, got layout torch.sparse",
    ),
    **{
        str(dtype): (
            lambda dtype=dtype: torch.zeros(3, dtype=dtype),
            f"TypeError: .*: expected dtype float32, .* {dtype}",
        )
        for dtype in (torch.complex64, torch.int64, torch.float64)
    },
    "lazy": (nn.UninitializedParameter, "(Value|Type)Error: .*: expected an initialized tensor, got a lazy one"),
    "expanded": (lambda: torch.zeros(1).expand(5), "ValueError: .*without gaps or overlaps"),
    "strided": (lambda: torch.zeros(10)[::2], "ValueError: .*without gaps or overlaps"),
}


@BOTH
@pytest.mark.parametrize("kind", PARAMETERS)
def test_parameters_that_cannot_be_trained(optimizer: type, kind: str) -> None:
    make, message = PARAMETERS[kind]
    w = make()
    if not nn.parameter.is_lazy(w) and (w.is_floating_point() or w.is_complex()):
        w.requires_grad_()
    assert_says(lambda: optimizer([("v", *one()), ("w", w)]), message.replace(".*", "parameter w.*", 1))


@BOTH
def test_parameters_with_common_memory(optimizer: type) -> None:
    base = torch.zeros(10)
    overlapping = [base[:6].requires_grad_(), base[4:].detach().requires_grad_()]
    assert_says(lambda: optimizer(overlapping), r"ValueError: parameters .*\[0\] and .*\[1\]: expected separate memory")
    # two without memory have none in common
    meta = nn.Linear(3, 3, device="meta").parameters()
    assert_says(lambda: optimizer(meta), "ValueError: parameter .* on the meta device")
    params = [torch.zeros(shape).requires_grad_() for shape in ((5, 0), (0, 5), (0,), (2, 0, 3), (4,))]
    opt = optimizer(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert params[-1].tolist() == [-0.5] * 4


def test_shards_are_refused_by_name() -> None:
    (shard,) = one()
    shard._is_flat_param = True  # type: ignore[attr-defined]
    assert_says(lambda: LionCub([("w", shard)]), "TypeError: parameter w: expected a whole tensor, got a shard")


def test_numpy_numbers_are_numbers() -> None:
    (p,) = params = one()
    opt = LionCub(params, lr=np.float32(0.5))
    p.grad = torch.ones(3)
    opt.step()
    assert p.tolist() == [-0.5] * 3
