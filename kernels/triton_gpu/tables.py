"""Many tensors in one launch: a table on the device says which tensor a program works on, and where it lies.

A table has one row per tensor: its addresses in each of the lists, its number of elements, its first program, its
form and the number of its random stream. A program works on one tile; ``owners`` has the row of each. Rows are made
anew where an address has changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.triton_gpu.launch import BLOCK_SIZE

# columns behind the addresses: number of elements, first program, form, number of the stream
_FURTHER = 4
_FURTHER_COLUMNS = tl.constexpr(_FURTHER)
_KINDS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
# bytes of a 128-bit access
_WIDE = 16
# codes of a tensor begin with a 64-bit word
_CODES = 8
# tables that are kept; an optimizer needs two for each bucket
_KEPT = 1024
# what captured graphs copy from whenever they are replayed
_captured: list[Tensor] = []


class Table(NamedTuple):
    """What a launch over lists of tensors takes: ``rows`` int64[n, lists + 4], ``owners`` int32[programs], ``kinds``.

    ``kinds`` are the combinations of dtypes that occur, as numbers; kernels are compiled for each set of them.
    """

    rows: Tensor
    owners: Tensor
    kinds: tuple[tuple[int, ...], ...]

    @property
    def grid(self) -> tuple[int]:
        """One program per tile."""
        return (self.owners.numel(),)


def only_one(tensors: Sequence[Tensor]) -> int | None:
    """The number of the only tensor that has elements, which needs no table; None where there are others."""
    filled = [i for i, tensor in enumerate(tensors) if tensor.numel()]
    return filled[0] if len(filled) == 1 else None


def table_of(*lists: Sequence[Tensor], numbers: Sequence[int] | None = None) -> Table | None:
    """The table of tensors that stand at the same place in each list; None where all are empty.

    Numbers of elements are those of the first list. uint8 lists are of packed codes, whose addresses need not be wide.
    ``numbers`` are those of the tensors' random streams, where a kernel takes any.
    """
    first = lists[0][0]
    device, stream = first.device, 0
    if first.is_cuda:
        # a table may be read only behind the copy that filled it
        stream = torch.cuda.current_stream(device).cuda_stream
    numels = tuple([tensor.numel() for tensor in lists[0]])
    if not any(numels):
        return None
    addresses = tuple([tensor.data_ptr() for tensors in lists for tensor in tensors])
    dtypes = tuple([tuple([tensor.dtype for tensor in tensors]) for tensors in lists])
    make_rows: Callable[..., Tensor] = _rows
    make_owners: Callable[..., Tensor] = _owners
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        # the memory of a captured copy is filled only when the graph runs, so nobody else may use it
        make_rows, make_owners = _rows.__wrapped__, _owners.__wrapped__
    of_streams = (0,) * len(numels) if numbers is None else tuple(numbers)
    rows = make_rows(numels, addresses, dtypes, of_streams, device, stream)
    return Table(rows, make_owners(numels, device, stream), _kinds(dtypes)[0])


def pointer_or(optional: Tensor | None, unused: Tensor) -> Tensor:
    """What a kernel takes where there is no ``optional``: a pointer that it never follows."""
    return unused if optional is None else optional


Dtypes = tuple[tuple[torch.dtype, ...], ...]


@functools.lru_cache(maxsize=_KEPT)
def _kinds(dtypes: Dtypes) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """The combinations of dtypes that occur, and for each tensor the number of its own."""
    combinations = [tuple(_KINDS[dtype] for dtype in column) for column in zip(*dtypes, strict=True)]
    kinds = tuple(sorted(set(combinations)))
    return kinds, tuple(kinds.index(combination) for combination in combinations)


@functools.lru_cache(maxsize=_KEPT)
def _owners(numels: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    tiles = torch.tensor([triton.cdiv(n, BLOCK_SIZE) for n in numels], dtype=torch.int64, device="cpu")
    numbers = torch.arange(len(numels), dtype=torch.int32, device="cpu")
    return _on_device(torch.repeat_interleave(numbers, tiles), device)


@functools.lru_cache(maxsize=_KEPT)
def _rows(
    numels: tuple[int, ...],
    addresses: tuple[int, ...],
    dtypes: Dtypes,
    of_streams: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> Tensor:
    n = len(numels)
    columns = [addresses[i * n : (i + 1) * n] for i in range(len(dtypes))]
    floats = [column for column, of in zip(columns, dtypes, strict=True) if of[0] != torch.uint8]
    numbers, first, rows = _kinds(dtypes)[1], 0, []
    for i, numel in enumerate(numels):
        is_wide = all(column[i] % (_WIDE if column in floats else _CODES) == 0 for column in columns)
        rows.append([*(column[i] for column in columns), numel, first, 2 * numbers[i] + is_wide, of_streams[i]])
        first += triton.cdiv(numel, BLOCK_SIZE)
    return _on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    if device.type == "cpu":
        return values
    pinned = values.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@triton.jit
def tile_of(rows_ptr, owners_ptr, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """This program's tile: its tensor's number and row, its first element, and the tensor's number of elements."""
    tensor = tl.load(owners_ptr + tl.program_id(0))
    row_ptr = row_at(rows_ptr, tensor, LISTS)
    n_elements = tl.load(row_ptr + LISTS)
    start = (tl.program_id(0) - tl.load(row_ptr + LISTS + 1)) * BLOCK_SIZE
    return tensor, row_ptr, start, n_elements


@triton.jit
def row_at(rows_ptr, tensor, LISTS: tl.constexpr):
    """The row of a tensor."""
    return rows_ptr + tensor.to(tl.int64) * (LISTS + _FURTHER_COLUMNS)


@triton.jit
def form_of(row_ptr, start, n_elements, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The number of the tensor's kind, and whether the tile is wide: whole, and its floats aligned to 128 bits."""
    form = tl.load(row_ptr + LISTS + 2)
    return form >> 1, ((form & 1) != 0) & (start + BLOCK_SIZE <= n_elements)


@triton.constexpr_function
def kind_at(kinds, k):
    """The k-th kind; indexed by the kernel, a tuple of tuples gives no constant before triton 3.8."""
    return kinds[k]


@triton.jit
def stream_of(row_ptr, seed_low, seed_high, step, LISTS: tl.constexpr):
    """The tensor's random stream: (seed_low, seed_high, step, number); the number is loaded where it is used."""
    return seed_low, seed_high, step, tl.load(row_ptr + LISTS + 3)


@triton.jit
def is_shut(gate_ptr, HAS_GATE: tl.constexpr):
    """Whether the tensor must stay as it is."""
    shut = False
    if HAS_GATE:
        shut = tl.load(gate_ptr) == 0
    return shut


@triton.jit
def pointer_at(row_ptr, LIST: tl.constexpr, KIND: tl.constexpr, n_elements):
    """The tensor's address in a list, as a pointer to elements of its kind.

    ``n_elements`` is None where the tile is wide: then addresses of floats are multiples of 16.
    """
    address = tl.load(row_ptr + LIST)
    if KIND[LIST] == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
    elif KIND[LIST] == 1:
        pointer = address.to(tl.pointer_type(tl.bfloat16))
    elif KIND[LIST] == 2:
        pointer = address.to(tl.pointer_type(tl.float16))
    else:
        pointer = address.to(tl.pointer_type(tl.uint8))
    if n_elements is None:
        pointer = tl.multiple_of(pointer, 8 if KIND[LIST] == 3 else 16)
    return pointer
