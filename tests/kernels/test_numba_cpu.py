"""Numba kernels: the same bytes for any number of threads, forks and signals survived, rows at any address."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

numba = pytest.importorskip("numba")

from lioncub import kernels  # noqa: E402
from lioncub.kernels import numba_cpu, reference  # noqa: E402
from lioncub.kernels.layout import packed_bytes  # noqa: E402
from lioncub.kernels.numba_cpu import launch as threads  # noqa: E402

RATES: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "beta2": 0.99, "impl": "cpu"}
# one tensor that is cut among threads, small ones, an empty one
SIZES = [300_001, 1, 0, 63, 65, *[1000] * 40, 140_000]


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in SIZES]


def _poisoned(bits: int = 1) -> list[Tensor]:
    return [torch.full((packed_bytes(n, bits),), 0xA5, dtype=torch.uint8) for n in SIZES]


def _lion_results() -> list[Tensor]:
    param, grad, exp_avg, encoded = _tensors(0), _tensors(1), _tensors(2), _poisoned()
    status = torch.zeros(len(SIZES), dtype=torch.int32)
    how: dict[str, Any] = {"beta1": 0.9, "parity": 1, "out": encoded, "nonfinite": status, "impl": "cpu"}
    kernels.foreach_lion_encode(exp_avg, grad, **how)
    moved = exp_avg[0].clone()
    advanced = kernels.lion_encode_(moved, grad[0], beta1=0.9, beta2=0.99, impl="cpu")
    kernels.foreach_lion_apply_(param, encoded, grad=grad, exp_avg=exp_avg, **RATES)
    kernels.foreach_lion_step_(param, grad, exp_avg, beta1=0.9, **RATES)
    return [*param, *exp_avg, *encoded, advanced, moved, status]


def _other_results() -> list[Tensor]:
    x, exp_avg = _tensors(3)[0], _tensors(4)[0]
    n = x.numel()
    packed = kernels.pack_signs(x, impl="cpu")
    fields, scale = kernels.quantize(x, stochastic=True, seed=1, worker=3, impl="cpu")
    lion_fields, lion_scale = kernels.lion_quantize(exp_avg, x, beta1=0.9, norm="l2", block=128, impl="cpu")
    unpacked, restored = kernels.unpack_signs(packed, n, impl="cpu"), kernels.dequantize(fields, scale, n, impl="cpu")
    return [packed, unpacked, scale, lion_scale, fields, lion_fields, restored]


def _vote_results() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    packed = torch.randint(0, 256, (6, 50_003), dtype=torch.uint8, generator=generator)
    out, counts = torch.full((50_003,), 0xA5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    numba_cpu.majority_vote(packed, 1, out, counts)
    return [out, counts]


@pytest.mark.parametrize("run", [_lion_results, _other_results, _vote_results])
def test_any_number_of_threads_gives_the_same_bytes(run: Any, torch_threads: None) -> None:
    torch.set_num_threads(1)
    alone = run()
    for count in (2, 5, 3):
        torch.set_num_threads(count)
        for i, (expected, actual) in enumerate(zip(alone, run(), strict=True)):
            assert torch.equal(expected, actual), f"result {i} differs with {count} threads"


def test_slices_cover_all_elements_once_at_multiples_of_64(torch_threads: None) -> None:
    torch.set_num_threads(3)
    for total in (0, 1, 65536, 131071, 131072, 200_001, 1_000_003):
        parts = threads.slices(total)
        assert len(parts) == min(3, max(total // threads.MIN_SLICE, 1))
        assert parts[0][0] == 0
        assert parts[-1][1] == total
        for (_, last), (first, _) in itertools.pairwise(parts):
            assert last == first
            assert first % 64 == 0
    assert len(threads.slices(2 * threads.MIN_SLICE // 64 - 1, 64)) == 1
    assert len(threads.slices(2 * threads.MIN_SLICE // 64, 64)) == 2


def test_each_slice_raises_the_status_of_its_own_tensor(torch_threads: None) -> None:
    torch.set_num_threads(2)
    grad, exp_avg, out = _tensors(1), _tensors(2), _poisoned()
    grad[0][0] = float("nan")
    grad[-1][-1] = float("-inf")
    status = torch.zeros(len(SIZES), dtype=torch.int32)
    kernels.foreach_lion_encode(exp_avg, grad, beta1=0.9, parity=0, out=out, nonfinite=status, impl="cpu")
    assert status.nonzero().flatten().tolist() == [0, len(SIZES) - 1]


def test_a_forked_child_runs_kernels_after_its_parent_used_the_pool() -> None:
    script = """
import os, torch
from lioncub.kernels import pack_signs
from lioncub.kernels.numba_cpu.launch import _POOL
torch.set_num_threads(2)
x = torch.ones(200_000)
expected = pack_signs(x)
assert _POOL.size, "the parent did not use the pool"
child = os.fork()
if child == 0:
    inherited = _POOL.size
    out = pack_signs(x)
    used_own_pool = inherited == 0 and _POOL.size > 0
    os._exit(0 if used_own_pool and bytes(out.numpy()) == bytes(expected.numpy()) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def _dispatchers() -> dict[str, Any]:
    found = {}
    for info in pkgutil.iter_modules(numba_cpu.__path__):
        module = importlib.import_module(f"{numba_cpu.__name__}.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, numba.core.dispatcher.Dispatcher):
                found[f"{value.__module__}.{name}"] = value
    return found


def test_kernels_release_the_gil_and_keep_exact_arithmetic() -> None:
    assert len([name for name in _dispatchers() if name.endswith("_kernel")]) == 14
    for name, dispatcher in _dispatchers().items():
        assert dispatcher.targetoptions["nogil"] is True, name
        assert not dispatcher.targetoptions.get("fastmath", False), name
        assert not dispatcher.targetoptions.get("parallel", False), name


INTERRUPTED = """
import os, random, signal, threading, time, torch
from lioncub.kernels import lion_step_
from lioncub.kernels.numba_cpu import launch as threads

torch.set_num_threads(4)
armed, rng = False, random.Random(0)
begun, ended = [], []

def interrupt(*_):
    if armed:
        raise KeyboardInterrupt

def slow(first, last):
    if first == 0:
        # the calling thread's, which the signal itself may stop
        time.sleep(0.002)
        return
    begun.append(first)
    time.sleep(0.004 * first)
    ended.append(first)
    if first == 1:
        raise ValueError("slice 1")

def send():
    for _ in range(2):
        time.sleep(rng.random() * 0.006)
        os.kill(os.getpid(), signal.SIGINT)

def rounds(work, check, count):
    global armed
    interrupted = 0
    for _ in range(count):
        sender = threading.Thread(target=send)
        try:
            try:
                armed = True
                sender.start()
                while True:
                    work()
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
        except KeyboardInterrupt:
            # the second signal, before it was ignored
            armed = False
            interrupted += 1
        check()
        sender.join()
    assert interrupted == count

def slices():
    try:
        threads.run_parts(slow, [(i, i + 1) for i in range(4)])
    except ValueError:
        check_ended()

def check_ended():
    # slices that have not begun would begin and end together with the others
    assert sorted(begun) == sorted(ended), f"slices {begun} began, {ended} have ended"

signal.signal(signal.SIGINT, interrupt)
rounds(slices, check_ended, 40)
assert begun

x, g, m = (torch.ones(1 << 21) for _ in range(3))
def unchanged():
    before = x.clone()
    time.sleep(0.02)
    assert torch.equal(x, before), "a kernel wrote behind KeyboardInterrupt"
def step():
    lion_step_(x, g, m, lr=1e-3, beta1=0.9, beta2=0.9, weight_decay=0.0)
step()
rounds(step, unchanged, 15)
print("ok")
"""


def test_no_slice_runs_on_behind_an_interrupt_or_an_error() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 33, 64, 70, 130])
def test_unaligned_rows_equal_the_reference(workers: int) -> None:
    for offset, n_bytes in itertools.product((0, 1, 3, 7), (1, 7, 8, 13, 512, 517, 1100)):
        _check_rows(workers, offset, n_bytes)


def _check_rows(workers: int, offset: int, n_bytes: int) -> None:
    generator = torch.Generator().manual_seed(workers)
    memory = torch.randint(0, 256, (workers, n_bytes + offset + 5), dtype=torch.uint8, generator=generator)
    # columns on which all agree and columns that are tied where the number is even
    memory[:, ::3] = memory[0, ::3].clone()
    memory[::2, 1::3], memory[1::2, 1::3] = 0xFF, 0x00
    packed = memory[:, offset : offset + n_bytes]
    assert packed.data_ptr() % 8 == offset
    for parity in (0, 1):
        results = []
        for impl in (numba_cpu, reference):
            around = torch.full((n_bytes + 9,), 0xA5, dtype=torch.uint8)
            counts = torch.tensor([100, 200])
            impl.majority_vote(packed, parity, around[offset : offset + n_bytes], counts)
            results.append((around, counts))
        (actual, counted), (expected, expected_counts) = results
        # what lies before and behind out is compared too
        assert torch.equal(actual, expected)
        assert counted.tolist() == expected_counts.tolist()
