"""Every kernel against a copy of as many bytes on the same device, and peers, all in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from speed.cases import CASES, packed
from speed.data import BETA1, BETA2, DECAY, LR, PACKED, Call, Data, new
from speed.peers import COMPILED, PEERS, Peer, leaves, lion_pytorch_step

from gpu.workbench import Workbench
from lioncub import kernels

Make = Callable[[Data], Call]
_F32, _B16 = torch.float32, torch.bfloat16
# codes are small: votes are timed on those of four times as many elements
_PACKED_FACTOR = 4
# dtypes of the cases, of parameters with gradients, and of momentum
KINDS = {
    PACKED: (PACKED, _F32, _F32),
    "fp32": ("fp32", _F32, _F32),
    "bf16": ("bf16", _B16, _B16),
    "mixed": ("bf16", _B16, _F32),
}


def unaligned_vote(data: Data, impl: str) -> Call:
    """8 voters whose rows begin 8 bytes off, where no 128-bit access is."""
    rows = torch.empty(8, data.n // 8 + 8, dtype=torch.uint8, device=data.device)
    rows[:, 8:] = data.voters(8)
    votes, out = rows[:, 8:], data.codes()
    return Call(partial(kernels.majority_vote, votes, out=out, impl=impl), (votes,), (out,))


def _lion_triton(d: Data) -> Callable[[], object]:
    return lion_pytorch_step([d.param], [d.grad], use_triton=True)


def _bitsandbytes(d: Data) -> Callable[[], object]:
    import bitsandbytes

    options = {"lr": LR, "betas": (BETA1, BETA2), "weight_decay": DECAY}
    step: Callable[[], object] = bitsandbytes.optim.Lion32bit(leaves([d.param], [d.grad]), **options).step
    return step


def _adamw(d: Data) -> Call:
    step = torch.optim.AdamW(leaves([d.param], [d.grad]), lr=LR, weight_decay=DECAY, fused=True).step
    moments = (new(d.n, torch.float32), new(d.n, torch.float32))
    return Call(step, (d.param, d.grad, *moments), (d.param, *moments))


# what each needs: a package, and whether it runs on a GPU alone
_NEEDS = {"plain_torch": "torch", COMPILED: "torch", "torch_foreach": "torch", "lion-pytorch": "lion_pytorch"}
GPU_PEERS = (
    *((_NEEDS[peer.way], False, peer) for peer in PEERS if peer.way in _NEEDS),
    ("lion_pytorch", True, Peer("lion_step_", "lion-pytorch's Triton", _lion_triton)),
    ("bitsandbytes", True, Peer("lion_step_", "bitsandbytes", _bitsandbytes)),
    ("torch", False, Peer("lion_step_", "torch AdamW fused, 28 bytes", _adamw)),
)


def run(bench: Workbench) -> None:
    """Votes first, then fp32 and its peers, then the narrow dtypes, until the time is over."""
    n = bench.real(2**26, 4096)
    copy_seconds = cache(partial(_copy_seconds, bench))
    for kind, (dtype, param, momentum) in KINDS.items():
        elements = n * bench.real(_PACKED_FACTOR if kind == PACKED else 1, 1)
        make_data = partial(Data, elements, param, str(bench.device), momentum, bench.real(64, 2))
        # a set of data for each call that takes its turn
        data = cache(lambda _, make=make_data: make())
        measure = partial(_measure, bench, data, copy_seconds)
        for case in (*CASES, packed(unaligned_vote)):
            if "triton" in case.impls and dtype in case.dtypes:
                bench.attempt(f"{case.name}/{kind}", partial(measure, partial(case.make, impl="triton")))
        if kind == "fp32":
            # what a compiler would make of peers on a CPU is not what a dry run is for
            with torch._dynamo.config.patch(disable=bench.is_dry):
                for package, is_gpu_only, peer in GPU_PEERS:
                    needs = "a GPU" if is_gpu_only and bench.is_dry else package
                    bench.attempt(f"{peer.of}/{peer.way}/fp32", partial(measure, peer.make), needs=needs)


def _measure(
    bench: Workbench, data: Callable[[int], Data], copy_seconds: Callable[[int], float], make: Make
) -> dict[str, Any]:
    first = make(data(0))
    n_bytes = first.bytes_moved
    sets = bench.clock.data_sets(n_bytes)
    timing = bench.clock.device_seconds([first.run, *(make(data(i)).run for i in range(1, sets))])
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
    """Time a copy that reads and writes as many bytes together."""

    def copy() -> Callable[[], object]:
        source, target = (torch.ones(n_bytes // 2, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return partial(target.copy_, source)

    return bench.clock.device_seconds([copy() for _ in range(bench.clock.data_sets(n_bytes))]).seconds
