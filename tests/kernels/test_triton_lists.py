"""Triton kernels over lists, run by Triton's interpreter: any sizes, dtypes and alignments in one launch, and flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from samples import assert_same_bits

from lioncub import kernels
from lioncub.kernels import reference, triton_gpu
from lioncub.kernels.layout import packed_bytes
from lioncub.kernels.scalars import Mix, mix_of, round_to_float32
from lioncub.kernels.triton_gpu import launch, lion, signs
from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE

pytestmark = pytest.mark.skipif(not triton_gpu.INTERPRETED, reason="needs TRITON_INTERPRET=1")

# with some that need several tiles, whole ones among them
NUMELS = (0, 1, 7, 8, 64, 65, 1009, BLOCK_SIZE, 2 * BLOCK_SIZE + 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BETA1, BETA2 = mix_of(torch.tensor(0.9, dtype=torch.float64)), mix_of(torch.tensor(0.99, dtype=torch.float64))
LR, DECAY = round_to_float32(1e-2), round_to_float32(1 - 1e-3)


def tensors(seed: int, dtypes: Sequence[torch.dtype], shift: int) -> list[Tensor]:
    """One of each number of elements; every other begins ``shift`` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, n in enumerate(NUMELS):
        values = torch.randn(n + shift, generator=generator).to(dtypes[i % len(dtypes)])
        found.append(values[shift:] if i % 2 else values[:n])
    return found


def poisoned(bits: int = 1) -> list[Tensor]:
    """Packed codes of each, of no meaning."""
    return [torch.full((bits * packed_bytes(n),), 0xA5, dtype=torch.uint8) for n in NUMELS]


def votes(seed: int, bits: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [bits * packed_bytes(n) for n in NUMELS]
    return [torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8) for size in sizes]


def clones(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Copies at addresses as aligned as theirs."""
    return [[torch.empty_like(t).copy_(t) if t.storage_offset() == 0 else shifted(t) for t in each] for each in lists]


def shifted(tensor: Tensor) -> Tensor:
    offset = tensor.storage_offset()
    return torch.empty(tensor.numel() + offset, dtype=tensor.dtype)[offset:].copy_(tensor)


def assert_equal_lists(found: Sequence[Tensor], expected: Sequence[Tensor], name: str) -> None:
    for n, a, b in zip(NUMELS, found, expected, strict=True):
        assert_same_bits(a, b, f"{name} of {n} elements")


def cases(of: Callable[..., None]) -> Any:
    """All of one dtype, momentum of fp32 beside others, and all dtypes mixed; aligned and not."""
    kinds = [((torch.float32,), (torch.float32,)), ((torch.bfloat16,), (torch.float32,)), (DTYPES, (torch.float32,))]
    kinds.append((DTYPES, DTYPES))
    marked = pytest.mark.parametrize("shift", [0, 1])(of)
    return pytest.mark.parametrize(("dtypes", "momentum"), kinds)(marked)


@cases
def test_encode(dtypes: Any, momentum: Any, shift: int) -> None:
    m, g = tensors(0, momentum, shift), tensors(1, dtypes, shift)
    g[5][3], g[8][BLOCK_SIZE + 1] = float("nan"), float("inf")
    found, expected = poisoned(), poisoned()
    flags, expected_flags = (torch.zeros(len(NUMELS), dtype=torch.int32) for _ in range(2))
    triton_gpu.lion_encode(m, g, BETA1, 1, found, flags)
    reference.lion_encode(m, g, BETA1, 1, expected, expected_flags)
    assert_equal_lists(found, expected, "codes")
    assert flags.tolist() == expected_flags.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 1]


@cases
def test_encode_that_advances(dtypes: Any, momentum: Any, shift: int) -> None:
    m, g = tensors(0, momentum, shift), tensors(1, dtypes, shift)
    (plain,) = clones(m)
    found, expected = poisoned(), poisoned()
    triton_gpu.lion_encode_(m, g, BETA1, BETA2, 0, found, None)
    reference.lion_encode_(plain, g, BETA1, BETA2, 0, expected, None)
    assert_equal_lists(found, expected, "codes")
    assert_equal_lists(m, plain, "momentum")


@cases
@pytest.mark.parametrize("advance", [False, True])
def test_apply_votes(dtypes: Any, momentum: Any, shift: int, advance: bool) -> None:
    x, g, m = tensors(0, dtypes, shift), tensors(1, dtypes, shift), tensors(2, momentum, shift)
    plain, plain_m = clones(x, m)
    further = (g, m, BETA2) if advance else (None, None, None)
    triton_gpu.lion_apply_(x, votes(3), 1, 2, 1, LR, DECAY, *further)
    reference.lion_apply_(plain, votes(3), 1, 2, 1, LR, DECAY, *((g, plain_m, BETA2) if advance else further))
    assert_equal_lists(x, plain, "parameter")
    assert_equal_lists(m, plain_m, "momentum")


@cases
@pytest.mark.parametrize("bits", [2, 16])
def test_apply_codes(dtypes: Any, momentum: Any, shift: int, bits: int) -> None:
    x, g, m = tensors(0, dtypes, shift), tensors(1, dtypes, shift), tensors(2, momentum, shift)
    plain, plain_m = clones(x, m)
    form = (bits, 2, 3, LR, DECAY)
    triton_gpu.lion_apply_(x, votes(3, bits), *form, g, m, BETA2)
    reference.lion_apply_(plain, votes(3, bits), *form, g, plain_m, BETA2)
    assert_equal_lists(x, plain, "parameter")
    assert_equal_lists(m, plain_m, "momentum")


@cases
def test_step(dtypes: Any, momentum: Any, shift: int) -> None:
    x, g, m = tensors(0, dtypes, shift), tensors(1, dtypes, shift), tensors(2, momentum, shift)
    plain, plain_m = clones(x, m)
    triton_gpu.lion_step_(x, g, m, LR, DECAY, BETA1, BETA2)
    reference.lion_step_(plain, g, plain_m, LR, DECAY, BETA1, BETA2)
    assert_equal_lists(x, plain, "parameter")
    assert_equal_lists(m, plain_m, "momentum")


def test_numbers_can_stand_on_the_device() -> None:
    x, g, m = tensors(0, DTYPES, 0), tensors(1, DTYPES, 0), tensors(2, (torch.float32,), 0)
    plain, plain_m = clones(x, m)
    # an update that is zero shows the parity
    zeros = [torch.zeros_like(tensor) for tensor in g]
    m[7].zero_()
    plain_m[7].zero_()
    lr, decay = torch.tensor(LR), torch.tensor(DECAY)
    betas = [Mix(torch.tensor(beta.kept), torch.tensor(beta.new)) for beta in (BETA1, BETA2)]
    for parity in (6, 7):
        found, expected = poisoned(), poisoned()
        triton_gpu.lion_encode(m, zeros, betas[0], torch.tensor(parity), found, None)
        reference.lion_encode(m, zeros, BETA1, parity & 1, expected, None)
        assert_equal_lists(found, expected, "codes")
    triton_gpu.lion_apply_(x, votes(3), 1, 2, 1, lr, decay, g, m, betas[1])
    reference.lion_apply_(plain, votes(3), 1, 2, 1, LR, DECAY, g, plain_m, BETA2)
    assert_equal_lists(x, plain, "parameter")
    assert_equal_lists(m, plain_m, "momentum")


OPS: dict[str, Callable[..., None]] = {
    "votes": lambda x, g, m, **options: kernels.foreach_lion_apply_(
        x, votes(3), lr=0.01, weight_decay=0.1, grad=g, exp_avg=m, beta2=0.99, **options
    ),
    "codes": lambda x, g, m, **options: kernels.foreach_lion_apply_(
        x, votes(3, 2), bits=2, step=1, offset=1, lr=0.01, weight_decay=0.1, grad=g, exp_avg=m, beta2=0.99, **options
    ),
    "step": lambda x, g, m, **options: kernels.foreach_lion_step_(
        x, g, m, lr=0.01, beta1=0.9, beta2=0.99, weight_decay=0.1, **options
    ),
}


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("op", list(OPS))
def test_an_inactive_tensor_stays_as_it_is(op: str, impl: str) -> None:
    x, g, m = tensors(0, DTYPES, 0), tensors(1, DTYPES, 0), tensors(2, (torch.float32,), 0)
    before, before_m = clones(x, m)
    moved, moved_m = clones(x, m)
    OPS[op](moved, g, moved_m, impl="reference")
    gate = torch.tensor([i % 3 != 0 for i in range(len(NUMELS))], dtype=torch.int32)
    OPS[op](x, g, m, active=gate, impl=impl)
    for i, is_open in enumerate(gate.tolist()):
        assert_same_bits(x[i], moved[i] if is_open else before[i], f"parameter {i}")
        assert_same_bits(m[i], moved_m[i] if is_open else before_m[i], f"momentum {i}")


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_the_flag_of_the_only_tensor(impl: str) -> None:
    for is_open in (0, 1):
        x, g, m = torch.ones(9), torch.ones(9), torch.zeros(9)
        gate = torch.tensor([1, is_open], dtype=torch.int32)
        empty = torch.empty(0)
        kernels.foreach_lion_step_(
            [empty, x], [empty, g], [empty, m], lr=0.5, beta1=0.9, beta2=0.99, weight_decay=0.0, active=gate, impl=impl
        )
        assert x.tolist() == [0.5 if is_open else 1.0] * 9


def test_bad_flags_are_named() -> None:
    x, g, m = [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)]
    with pytest.raises(ValueError, match=r"^active: expected .* int32 tensor of shape \(1,\), got torch.int64"):
        OPS["step"](x, g, m, active=torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^active: expected a contiguous int32 tensor .*, got shape \(2,\)"):
        OPS["step"](x, g, m, active=torch.ones(2, dtype=torch.int32))


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
    x, g, m = tensors(0, DTYPES, 1), tensors(1, DTYPES, 0), tensors(2, (torch.float32,), 0)
    triton_gpu.lion_encode(m, g, BETA1, 0, poisoned(), None)
    for op in OPS.values():
        op(x, g, m, impl="triton")
    assert {name: kernel.launches for name, kernel in counted.items() if kernel.launches} == {
        "_encode_signs_kernel": 1,
        "_apply_codes_kernel": 2,
        "_step_lion_kernel": 1,
    }
    empty = [torch.empty(0), torch.empty(0)]
    triton_gpu.lion_step_(empty, empty, empty, LR, DECAY, BETA1, BETA2)
    assert counted["_step_lion_kernel"].launches == 1


def test_tables_are_kept_as_long_as_addresses_are() -> None:
    x, g = tensors(0, DTYPES, 0), tensors(1, DTYPES, 0)
    first, again = launch.table_of(x, g), launch.table_of(x, g)
    assert first is not None
    assert again is not None
    assert first.rows is again.rows
    assert first.owners is again.owners
    other = [*g[:-1], g[-1].clone()]
    moved = launch.table_of(x, other)
    assert moved is not None
    assert moved.owners is first.owners
    # of the last tensor's row, the address in the second list
    changed = (moved.rows != first.rows).nonzero().tolist()
    assert changed == [[len(NUMELS) - 1, 1]]
    assert moved.rows[-1, 1] == other[-1].data_ptr()
