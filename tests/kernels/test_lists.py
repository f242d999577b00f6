"""Lists of tensors: any sizes, dtypes and alignments in one call, inactive ones, and one launch on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from samples import DTYPES, assert_same_bits, listed
from torch import Tensor

pytest.importorskip("triton")

from lioncub import kernels
from lioncub.kernels import reference, triton_gpu
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.scalars import Mix, mix_of, round_to_float32
from lioncub.kernels.triton_gpu import launch, lion, signs
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE

pytestmark = pytest.mark.skipif(not triton_gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")

# with some that need several tiles, whole ones among them
NUMELS = (0, 1, 7, 8, 64, 65, 1009, BLOCK_SIZE, 2 * BLOCK_SIZE + 5)
Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]
Op = Callable[..., list[Tensor]]


def tensors(seed: int, dtypes: Sequence[torch.dtype], shift: int) -> list[Tensor]:
    """One of each number of elements; every other begins ``shift`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, n in enumerate(NUMELS):
        values = torch.randn(n + shift, generator=generator).to(dtypes[i % len(dtypes)])
        found.append(values[shift:] if i % 2 else values[:n])
    return found


def lists(
    dtypes: Sequence[torch.dtype] = DTYPES, momentum: Sequence[torch.dtype] = (torch.float32,), shift: int = 0
) -> Lists:
    return tensors(0, dtypes, shift), tensors(1, dtypes, shift), tensors(2, momentum, shift)


def votes(bits: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = [bits * packed_bytes(n) for n in NUMELS]
    return [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in sizes]


def poisoned() -> list[Tensor]:
    """Packed codes of each, of no meaning."""
    return [torch.full((packed_bytes(n),), 0xA5, dtype=torch.uint8) for n in NUMELS]


def encode(x: list[Tensor], g: list[Tensor], m: list[Tensor], impl: str) -> list[Tensor]:
    g[5][3], g[8][BLOCK_SIZE + 1] = float("nan"), float("inf")
    out, flags = poisoned(), torch.zeros(len(NUMELS), dtype=torch.int32)
    kernels.foreach_lion_encode(m, g, beta1=0.9, parity=1, out=out, nonfinite=flags, impl=impl)
    assert flags.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]
    return out


def encode_(x: list[Tensor], g: list[Tensor], m: list[Tensor], impl: str) -> list[Tensor]:
    betas, out = [torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99)], poisoned()
    torch.ops.lioncub.lion_encode_(m, g, *betas, torch.tensor(0), out, None, impl)
    return out


def apply(bits: int, step: int, offset: int, momentum: bool = True) -> Op:
    def run(x: list[Tensor], g: list[Tensor], m: list[Tensor], **options: Any) -> list[Tensor]:
        form = {"bits": bits, "step": step, "offset": offset, "lr": 0.01, "weight_decay": 0.1}
        advance: dict[str, Any] = {"grad": g, "exp_avg": m, "beta2": 0.99} if momentum else {}
        kernels.foreach_lion_apply_(x, votes(bits), **form, **advance, **options)
        return []

    return run


def step(x: list[Tensor], g: list[Tensor], m: list[Tensor], **options: Any) -> list[Tensor]:
    kernels.foreach_lion_step_(x, g, m, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, **options)
    return []


MOVES: dict[str, Op] = {"votes": apply(1, 2, 1), "codes": apply(2, 1, 1), "step": step}
OPS = {**MOVES, "encode": encode, "encode_": encode_, "no momentum": apply(1, 2, 1, False), "wide": apply(16, 2, 3)}
# all of one dtype, momentum of fp32 beside others, and all dtypes mixed
KINDS = [
    ((torch.float32,), (torch.float32,)),
    ((torch.bfloat16,), (torch.float32,)),
    (DTYPES, (torch.float32,)),
    (DTYPES, DTYPES),
]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("dtypes", "momentum"), KINDS)
@pytest.mark.parametrize("op", list(OPS))
def test_lists_have_the_reference_s_bits(op: str, dtypes: Any, momentum: Any, shift: int) -> None:
    expected = lists(dtypes, momentum, shift)
    expected_codes = OPS[op](*expected, impl="reference")
    for impl in ("cpu", "triton"):
        found = lists(dtypes, momentum, shift)
        codes = OPS[op](*found, impl=impl)
        for name, one, other in zip("xgm", found, expected, strict=True):
            for a, b in zip(one, other, strict=True):
                assert_same_bits(a, b, f"{impl}: {name} of {a.numel()} elements")
        for a, b in zip(codes, expected_codes, strict=True):
            assert_same_bits(a, b, f"{impl}: codes")


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("op", list(MOVES))
def test_an_inactive_tensor_stays_as_it_is(op: str, impl: str) -> None:
    before, moved, found = lists(), lists(), lists()
    MOVES[op](*moved, impl="reference")
    gate = torch.tensor([i % 3 != 0 for i in range(len(NUMELS))], dtype=torch.int32)
    MOVES[op](*found, active=gate, impl=impl)
    for k in (0, 2):
        for i, is_open in enumerate(gate.tolist()):
            assert_same_bits(found[k][i], (moved if is_open else before)[k][i], f"tensor {i}")


def test_numbers_can_stand_on_the_device() -> None:
    (x, g, m), (plain, _, plain_m) = lists(), lists()
    beta1, beta2 = (mix_of(torch.tensor(beta, dtype=torch.float64)) for beta in (0.9, 0.99))
    # an update that is zero shows the parity
    zeros = [torch.zeros_like(tensor) for tensor in g]
    m[7].zero_()
    plain_m[7].zero_()
    rates = round_to_float32(1e-2), round_to_float32(1 - 1e-3)
    on_device = [Mix(*map(torch.tensor, beta)) for beta in (beta1, beta2)]
    for parity in (6, 7):
        found, expected = poisoned(), poisoned()
        how = (on_device[0], torch.tensor(parity))
        triton_gpu.lion_encode(listed(m), listed(zeros), *how, listed(found), None)
        reference.lion_encode(m, zeros, beta1, parity & 1, expected, None)
        for a, b in zip(found, expected, strict=True):
            assert_same_bits(a, b, "codes")
    how = (*map(torch.tensor, rates), listed(g), listed(m), on_device[1])
    triton_gpu.lion_apply_(listed(x), listed(votes()), 1, 2, 1, *how)
    reference.lion_apply_(plain, votes(), 1, 2, 1, *rates, g, plain_m, beta2)
    for a, b in zip([*x, *m], [*plain, *plain_m], strict=True):
        assert_same_bits(a, b)


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def test_a_list_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [(signs, "_encode_signs_kernel"), (lion, "_apply_codes_kernel"), (lion, "_step_lion_kernel")]
    counted = {}
    for module, name in names:
        counted[name] = Counted(getattr(module, name))
        monkeypatch.setattr(module, name, counted[name])
    for op in (encode, *MOVES.values()):
        op(*lists(shift=1), impl="triton")
    assert [kernel.launches for kernel in counted.values()] == [1, 2, 1]
    empty = [torch.empty(0), torch.empty(0)]
    step(empty, empty, empty, impl="triton")
    assert counted["_step_lion_kernel"].launches == 1


def test_tables_are_kept_as_long_as_addresses_are() -> None:
    x, g, _ = lists()
    first, again = launch.table_of(listed(x), listed(g)), launch.table_of(listed(x), listed(g))
    assert first is not None
    assert again is not None
    assert first.rows is again.rows
    assert first.owners is again.owners
    other = [*g[:-1], g[-1].clone()]
    moved = launch.table_of(listed(x), listed(other))
    assert moved is not None
    assert moved.owners is first.owners
    # of the last tensor's row, the address in the second list
    changed = (moved.rows != first.rows).nonzero().tolist()
    assert changed == [[len(NUMELS) - 1, 1]]
    assert moved.rows[-1, 1] == other[-1].data_ptr()
