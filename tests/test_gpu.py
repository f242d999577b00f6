"""On a GPU: real kernels, streams, several devices, far offsets, captured steps, NCCL. `pytest -m gpu` runs them.

Where a check makes sense on the CPU too, Triton's interpreter runs it there, so that it is known to work.
"""

from __future__ import annotations

import pytest
import torch
from gloo_workers import results_of
from gpu_checks import OPS, check_far_offsets, check_op, fill_gradients, two_optimizers
from samples import assert_same_bits

pytest.importorskip("triton")

from lioncub.kernels import triton_gpu

HAS_GPU = torch.cuda.is_available()
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")]
interpreted = pytest.mark.skipif(not triton_gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")
DEVICES = [
    pytest.param(torch.device("cpu"), marks=interpreted, id="interpreter"),
    pytest.param(
        torch.device("cuda"),
        marks=[
            *needs_gpu,
            pytest.mark.skipif(triton_gpu.INTERPRETED, reason="needs real kernels: TRITON_INTERPRET unset"),
        ],
        id="gpu",
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", list(OPS))
def test_kernels_have_the_reference_s_bits(op: str, device: torch.device) -> None:
    check_op(op, device, (1, 65, 1009) if device.type == "cpu" else (1, 7, 64, 65, 1009, 70001, 2**20 + 13))


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_can_be_far(device: torch.device) -> None:
    # on a GPU, past what 32 bits count
    check_far_offsets(device, 1000 if device.type == "cpu" else 2**31 + 4099)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_on_the_device_and_a_gate_instead_of_the_host(device: torch.device) -> None:
    ones, others, ordinary, capturable = two_optimizers(device, "triton")
    for step in range(4):
        for params in (ones, others):
            fill_gradients(params, step)
        ordinary.step()
        capturable.step()
        ordinary.param_groups[0]["lr"].mul_(0.9)
    capturable.raise_errors()
    for one, other in zip(ones, others, strict=True):
        assert_same_bits(one.detach().cpu(), other.detach().cpu(), "parameter")


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_step_is_captured_in_a_graph(device: torch.device) -> None:
    ones, others, ordinary, capturable = two_optimizers(device, "triton")
    for params in (ones, others):
        fill_gradients(params, 0)
    # the first step compiles kernels and fills tables
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        capturable.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        capturable.step()
    ordinary.step()
    for step in range(1, 5):
        for params in (ones, others):
            fill_gradients(params, step)
        ordinary.step()
        graph.replay()
    capturable.raise_errors()
    for one, other in zip(ones, others, strict=True):
        assert_same_bits(one.detach().cpu(), other.detach().cpu(), "parameter")


# the mode warns that it is a prototype
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_capturable_step_synchronizes_nothing(device: torch.device) -> None:
    _, others, _, capturable = two_optimizers(device, "triton")
    fill_gradients(others, 0)
    capturable.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        capturable.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES[1:])
def test_streams_of_their_own(device: torch.device) -> None:
    expected = OPS["list"](2**20 + 13, torch.float32, torch.device("cpu"), "reference")
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy
    with torch.cuda.stream(stream):
        found = OPS["list"](2**20 + 13, torch.float32, device, "triton")
    stream.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a.cpu(), b, "list on a stream")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2 or triton_gpu.INTERPRETED, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    torch.cuda.set_device(0)
    for op in OPS:
        check_op(op, torch.device("cuda", 1), (1009,))


def vote_of(rank: int, size: int, backend: str) -> list[bool]:
    """Every algorithm's majority is that of plain counting."""
    import torch.distributed as dist

    from lioncub.collectives import vote

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    group = dist.new_group(backend=backend)
    ballots = torch.stack(
        [
            torch.randint(0, 256, (512,), generator=torch.Generator().manual_seed(r), dtype=torch.uint8)
            for r in range(size)
        ]
    )
    bits = ((ballots[:, :, None] >> torch.arange(8)) & 1).sum(0).flatten()
    parity = torch.arange(4096) & 1
    expected = torch.where(2 * bits == size, parity, (2 * bits > size).long())
    found = []
    for algorithm in ("all_gather", "reduce_scatter", "all_reduce"):
        packed = vote(ballots[rank].to(device), group=group, algorithm=algorithm).cpu()
        found.append(torch.equal(((packed[:, None] >> torch.arange(8)) & 1).flatten().long(), expected))
    return found


@pytest.mark.parametrize(
    "backend",
    [
        "gloo",
        pytest.param(
            "nccl",
            marks=[pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")],
        ),
    ],
)
def test_votes_by_every_backend(backend: str) -> None:
    assert results_of(vote_of, 2, backend) == [[True] * 3] * 2
