"""Steps give the bits in golden.json: for every option, number of workers, algorithm, with overlap and captured.

Gradients are multiples of 1/4 from a generator, so that many updates are zero and many votes tied, on any machine.
``python tests/golden/test_golden.py`` writes golden.json anew: only for a change of bits that is wanted, and said why.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import pytest
import torch
from gloo_workers import results_of
from optimizers import LionCub
from torch import Tensor, nn

from lioncub import BySize, MomentumSync, Quantized, SignMean, SignVote, TernaryVote
from lioncub.simulate import Workers

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 8
SHAPES = ((33, 17), (64,), (5,), (1,), (0,), (130,), (3, 5, 2, 2))
Options = dict[str, Any]

COMPRESSIONS: dict[str, Options] = {
    "default": {},
    "sign": {"compression": SignVote()},
    "mean": {"compression": SignMean()},
    "ternary": {"compression": TernaryVote()},
    "2 bits l1": {"compression": Quantized(bits=2, norm="l1")},
    "4 bits linf, blocks": {"compression": Quantized(bits=4, norm="linf", block=64)},
    "2 bits l2, stochastic": {"compression": Quantized(bits=2, norm="l2", stochastic=True, seed=3)},
    "8 bits, shared": {"compression": Quantized(bits=8, norm="linf", share_scales_every=2)},
    "ternary but for small": {"compression": BySize(large=TernaryVote(), max_numel=64)},
}
SYNCHRONIZED: dict[str, Options] = {
    "fixed": {"momentum_sync": MomentumSync(every=3)},
    "staggered int8": {"momentum_sync": MomentumSync(every=3, schedule="staggered", dtype="int8")},
    "selected bf16": {"momentum_sync": MomentumSync(every=2, select=["*0", "*5"], dtype="bf16")},
    "by drift": {"momentum_sync": MomentumSync(select="auto", budget=2.0), "drift_every": 2},
}
PRECISION: dict[str, Options] = {
    "bf16": {"dtype": torch.bfloat16},
    "bf16, stochastic": {"dtype": torch.bfloat16, "param_rounding": "stochastic", "rounding_seed": 7},
    "bf16, masters": {"dtype": torch.bfloat16, "master_weights": True},
    "bf16, momentum too": {
        "dtype": torch.bfloat16,
        "param_rounding": "stochastic",
        "momentum_dtype": torch.bfloat16,
    },
    "maximize": {"maximize": True},
}


def cases() -> Iterator[tuple[str, int, Options]]:
    """(Name, workers, options) of each case."""
    for name, options in COMPRESSIONS.items():
        for workers in (1, 2, 3, 4):
            yield f"{name}, {workers}", workers, options
    for name, options in (SYNCHRONIZED | PRECISION).items():
        for base in ("default", "sign"):
            yield f"{name}, {base}, 3", 3, {**COMPRESSIONS[base], **options}


CASES = {name: (workers, options) for name, workers, options in cases()}


def gradient_of(step: int, rank: int, i: int) -> Tensor | None:
    """None for some ranks, and for all of them for one parameter; not finite once."""
    if i == 2 and step % 3 == 1:
        return None
    if i == (step + rank) % 7:
        return None
    generator = torch.Generator().manual_seed(1000 * step + 100 * rank + i)
    grad = torch.randint(-3, 4, SHAPES[i], generator=generator).float() / 4
    if (step, rank, i) == (5, 0, 0):
        grad[0, 0] = torch.inf
    return grad


def run_steps(rank: int, group: Any, options: Options) -> tuple[str, str]:
    """Hashes of parameters and masters, and of this rank's momentum, after all steps."""
    given = dict(options)
    dtype = given.pop("dtype", torch.float32)
    params = []
    for i, shape in enumerate(SHAPES):
        values = torch.randint(-99, 100, shape, generator=torch.Generator().manual_seed(i)).float() / 64
        param = nn.Parameter(values.to(dtype))
        if len(shape) == 4:
            param.data = param.data.to(memory_format=torch.channels_last)
        params.append((f"p{i}", param))
    groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 0.25, "betas": (0.8, 0.95)}]
    opt = LionCub(groups, lr=0.125, process_group=group, on_nonfinite="skip", impl="cpu", **given)
    for step in range(STEPS):
        for i, (_, param) in enumerate(params):
            grad = gradient_of(step, rank, i)
            if grad is not None and opt_overlaps(given) and param.numel():
                # as backward does, so that hooks are called
                param.grad = None
                like = grad.to(dtype).contiguous(memory_format=memory_format_of(param))
                (param * like).sum().backward()
            else:
                param.grad = None if grad is None else torch.empty_like(param).copy_(grad)
        opt.step()
        opt.param_groups[0]["lr"] *= 0.5
    states = [opt.state[param] for _, param in params]
    masters = [state["master"] for state in states if "master" in state]
    found = digest([param.detach() for _, param in params] + masters), digest([s["exp_avg"] for s in states])
    opt.close()
    return found


def opt_overlaps(options: Options) -> bool:
    return bool(options.get("overlap"))


def memory_format_of(param: Tensor) -> torch.memory_format:
    return torch.channels_last if param.dim() == 4 else torch.contiguous_format


def digest(tensors: list[Tensor]) -> str:
    """A hash of all bits, in storage order."""
    found = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        flat = tensor.as_strided((tensor.numel(),), (1,)) if tensor.numel() else tensor.reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def simulated(workers: int, options: Options, **further: Any) -> list[tuple[str, str]]:
    if workers == 1:
        return [run_steps(0, None, {**options, **further})]
    local_size = 2 if workers == 4 else None
    with Workers(workers, local_size=local_size) as simulation:
        return simulation.run(lambda rank, group: run_steps(rank, group, {**options, **further}))


def as_stored(found: list[tuple[str, str]]) -> dict[str, Any]:
    """All ranks' hashes of parameters, which are one, and of momentum."""
    replicas = {params for params, _ in found}
    assert len(replicas) == 1, "replicas differ"
    return {"parameters": replicas.pop(), "momentum": [momentum for _, momentum in found]}


def expected(name: str) -> dict[str, Any]:
    return dict(json.loads(GOLDEN.read_text())[name])


@pytest.mark.parametrize("name", CASES)
def test_bits_are_golden_by_every_algorithm(name: str) -> None:
    workers, options = CASES[name]
    algorithms = ["all_gather", "reduce_scatter", "all_reduce", *(["hierarchical"] if workers == 4 else [])]
    for algorithm in algorithms if workers > 1 else ["auto"]:
        # small buckets by the one, one bucket by the others
        further = {"bucket_mb": 1e-4} if algorithm == "reduce_scatter" else {}
        found = as_stored(simulated(workers, options, algorithm=algorithm, **further))
        assert found == expected(name), (name, algorithm)


def in_processes(rank: int, world_size: int, how: str) -> dict[str, tuple[str, str]]:
    """What workers that overlap or capture find, by the names of the cases."""
    found = {}
    for name, (workers, options) in CASES.items():
        if workers == world_size and is_possible(options, how):
            found[name] = run_steps(rank, None, {**options, how: True, "algorithm": "reduce_scatter"})
    return found


def is_possible(options: Options, how: str) -> bool:
    if how == "overlap":
        # backward computes in the parameter's dtype, and autograd sums no bf16 exactly
        return "dtype" not in options
    # a captured step votes by signs, and does not synchronize
    return options.get("compression") == SignVote() and not {"momentum_sync", "drift_every"} & set(options)


@pytest.mark.parametrize(("how", "workers"), [("overlap", 2), ("overlap", 3), ("capturable", 2), ("capturable", 3)])
def test_bits_are_golden_with_overlap_and_captured(how: str, workers: int) -> None:
    answers = results_of(in_processes, workers, how)
    assert len(answers[0]) >= 1
    for name in answers[0]:
        assert as_stored([answer[name] for answer in answers]) == expected(name), (name, how)


def write(make: Callable[[int, Options], list[tuple[str, str]]]) -> None:
    rows = [f"{json.dumps(name)}: {json.dumps(as_stored(make(*case)))}" for name, case in CASES.items()]
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    write(lambda workers, options: simulated(workers, options, **({"algorithm": "all_gather"} if workers > 1 else {})))
