"""Every kernel against a copy of as many bytes on the same device, and peers, all in one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from speed.cases import CASES, Case, packed
from speed.data import BETA1, BETA2, DECAY, LR, PACKED, Call, Data, new
from speed.peers import COMPILED, PEERS, Peer, leaves

from gpu.workbench import Workbench
from lioncub import kernels

_N, _DRY_N = 2**26, 4096
# codes are small: votes are timed on those of four times as many elements
_PACKED_FACTOR = 4
_NEEDS = {"plain_torch": "torch", COMPILED: "torch", "torch_foreach": "torch", "lion-pytorch": "lion_pytorch"}


@dataclass(frozen=True)
class Kind:
    """Dtypes of parameters with gradients and of momentum; the cases that are timed with them are of ``dtype``."""

    name: str
    dtype: str
    param: torch.dtype = torch.float32
    momentum: torch.dtype = torch.float32


KINDS = (
    Kind(PACKED, PACKED),
    Kind("fp32", "fp32"),
    Kind("bf16", "bf16", torch.bfloat16, torch.bfloat16),
    Kind("mixed", "bf16", torch.bfloat16),
)


def unaligned_vote(data: Data, impl: str) -> Call:
    """8 voters whose rows begin 8 bytes off, where no 128-bit access is."""
    rows = torch.empty(8, data.n // 8 + 8, dtype=torch.uint8, device=data.device)
    rows[:, 8:] = data.voters(8)
    packed, out = rows[:, 8:], data.codes()
    return Call(lambda: kernels.majority_vote(packed, out=out, impl=impl), (packed,), (out,))


ALL_CASES = (*CASES, packed(unaligned_vote))


def _lion_triton(d: Data) -> Call:
    from lion_pytorch.triton import update_fn

    x, g, m = d.param, d.grad, d.exp_avg
    return Call(lambda: update_fn(x, g, m, LR, DECAY, BETA1, BETA2), (x, g, m), (x, m))


def _bitsandbytes(d: Data) -> Call:
    import bitsandbytes

    options = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY}
    step = bitsandbytes.optim.Lion32bit(leaves([d.param], [d.grad]), **options).step
    return Call(step, (d.param, d.grad, d.exp_avg), (d.param, d.exp_avg))


def _adamw(d: Data) -> Call:
    step = torch.optim.AdamW(leaves([d.param], [d.grad]), lr=LR, weight_decay=DECAY, fused=True).step
    moments = (new(d.n, torch.float32), new(d.n, torch.float32))
    return Call(step, (d.param, d.grad, *moments), (d.param, *moments))


# by what each needs
GPU_PEERS = (
    ("a GPU", "lion_pytorch", Peer("lion_step_", "lion-pytorch's Triton", _lion_triton)),
    ("a GPU", "bitsandbytes", Peer("lion_step_", "bitsandbytes", _bitsandbytes)),
    ("", "torch", Peer("lion_step_", "torch AdamW fused, 28 bytes", _adamw)),
)


def run(bench: Workbench) -> None:
    """Votes first, then fp32 and its peers, then the narrow dtypes, until the time is over."""
    n = _DRY_N if bench.is_dry else _N
    copy_seconds = cache(partial(_copy_seconds, bench))
    for kind in KINDS:
        elements = n * _PACKED_FACTOR if kind.name == PACKED and not bench.is_dry else n
        parts = 2 if bench.is_dry else 64
        make_data = partial(Data, elements, kind.param, str(bench.device), kind.momentum, parts)
        measure = partial(_measure, bench, cache(lambda _, make=make_data: make()), copy_seconds)
        for case in ALL_CASES:
            if "triton" in case.impls and kind.dtype in case.dtypes:
                bench.attempt(f"{case.name}/{kind.name}", partial(measure, _on_triton(case)))
        if kind.name == "fp32":
            # what a compiler would make of peers on a CPU is not what a dry run is for
            with torch._dynamo.config.patch(disable=bench.is_dry):
                _peers(bench, measure)


def _on_triton(case: Case) -> Callable[[Data], Call]:
    return lambda data: case.make(data, "triton")


def _peers(bench: Workbench, measure: Callable[[Callable[[Data], Call]], dict[str, Any]]) -> None:
    for peer in PEERS:
        if peer.way in _NEEDS:
            bench.attempt(f"{peer.of}/{peer.way}/fp32", partial(measure, peer.make), needs=_NEEDS[peer.way])
    for device, package, peer in GPU_PEERS:
        needs = device if device and bench.is_dry else package
        bench.attempt(f"{peer.of}/{peer.way}/fp32", partial(measure, peer.make), needs=needs)


def _measure(
    bench: Workbench, data: Callable[[int], Data], copy_seconds: Callable[[int], float], make: Callable[[Data], Call]
) -> dict[str, Any]:
    first = make(data(0))
    n_bytes = first.bytes_moved
    sets = bench.clock.data_sets(n_bytes)
    runs = [first.run, *(make(data(i)).run for i in range(1, sets))]
    timing = bench.clock.device_seconds(runs)
    return {
        "bytes": n_bytes,
        "microseconds": 1e6 * timing.seconds,
        "gigabytes_per_second": n_bytes / timing.seconds / 1e9,
        "of_copy": copy_seconds(n_bytes) / timing.seconds,
        "spread": timing.spread,
        "host_microseconds": 1e6 * timing.host_seconds,
        "data_sets": sets,
    }


def _copy_seconds(bench: Workbench, n_bytes: int) -> float:
    """A copy that reads and writes as many bytes together."""

    def copy() -> Callable[[], object]:
        source, target = (torch.ones(n_bytes // 2, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return lambda: target.copy_(source)

    return bench.clock.device_seconds([copy() for _ in range(bench.clock.data_sets(n_bytes))]).seconds
