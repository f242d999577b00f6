"""How the kernels are launched: tiles, grids, the device, arithmetic without fusion; and one launch for many tensors.

A table on the device says which tensor a program works on, and where it is. It has one row per tensor: its addresses in
each of the lists, its number of elements, its first program, its form and the key of its random stream. A program works
on one tile; ``owners`` has the row of each. Rows are made anew where an address has changed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lioncub.kernels.lists import TensorList
from lioncub.kernels.rounding import Stream, Streams
from lioncub.kernels.triton_gpu.arithmetic import INTERPRETED

# a thread holds one row of 8 elements
ROW_THREADS = 128
# a thread holds 4 elements
WIDE_THREADS = 256
# arguments with one flag per tensor: slices of any alignment, which must not compile a kernel anew
FLAGS = ["nonfinite_ptr", "active_ptr"]
# arguments that are never specialized, since a step or a seed must not compile anything anew
STREAM_ARGUMENTS = ["seed_low", "seed_high", "stream_step", "worker"]
# the interpreter takes as long for a tile of any size
BLOCK_SIZE = 16384 if INTERPRETED else 8 * ROW_THREADS
# columns behind the addresses: number of elements, first program, form, key of the stream
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


def elementwise_threads(*dtypes: torch.dtype) -> int:
    """Return threads per tile where each has one 128-bit load per tensor: 4 elements where any tensor is fp32, else 8.

    With more elements triton would exchange them through shared memory to keep stores contiguous.
    """
    return WIDE_THREADS if torch.float32 in dtypes else ROW_THREADS


def run(kernel: Any, n: int, block_size: int, device: torch.device, *args: Any, threads: int = ROW_THREADS) -> None:
    """Run ``kernel(*args, block_size)``, a program for each ``block_size`` of ``n`` items, without fusion (rule 1)."""
    how = {"num_warps": threads // _warp_size(device), "enable_fp_fusion": False}
    with launching_on(device):
        kernel[(triton.cdiv(n, block_size),)](*args, block_size, **how)


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a device current, since triton launches on the current one; on CPU, be as silent as a GPU."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    # only the interpreter, which computes in numpy, gets here; numpy warns of every Inf and NaN
    import numpy as np

    return np.errstate(all="ignore")


@functools.cache
def _warp_size(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).warp_size) if device.type == "cuda" else 32


def signed_words(*words: int) -> tuple[int, ...]:
    """int32 of the same low 32 bits, so that each has one type at launch."""
    return tuple((word + 2**31) % 2**32 - 2**31 for word in words)


def stream_words(streams: Streams | None) -> tuple[Any, ...]:
    """Return values of `STREAM_ARGUMENTS`; a step on the device is passed as it is."""
    if streams is None:
        return 0, 0, 0, 0
    seed_low, seed_high, worker = signed_words(*Stream(streams.seed, 0, 0, 0).key, streams.worker or 0)
    return (
        seed_low,
        seed_high,
        streams.step if isinstance(streams.step, Tensor) else signed_words(streams.step)[0],
        worker,
    )


class Table(NamedTuple):
    """What a launch over lists of tensors takes: ``rows`` int64[n, lists + 4], ``owners`` int32[programs], ``kinds``.

    ``kinds`` are the combinations of dtypes that occur, as numbers; kernels are compiled for each set of them.
    """

    rows: Tensor
    owners: Tensor
    kinds: tuple[tuple[int, ...], ...]

    def launch(self, kernel: Any, flags: Tensor | None, numbers: Sequence[Any], *constants: Any, threads: int) -> None:
        """Run ``kernel(rows, owners, flags, *numbers, kinds, has_flags, *constants, BLOCK_SIZE)``, a program per tile.

        ``flags`` are None or int32[n].
        """
        pointers = (self.rows, self.owners, self.owners if flags is None else flags)
        constants = (self.kinds, flags is not None, *constants)
        n = self.owners.numel() * BLOCK_SIZE
        run(kernel, n, BLOCK_SIZE, self.rows.device, *pointers, *numbers, *constants, threads=threads)


def table_of(*lists: TensorList | None, streams: Streams | None = None) -> Table | None:
    """Return the table of tensors at the same place in each list, the first in place of None; None where all are empty.

    Numbers of elements are those of the first list. uint8 lists are of packed codes, whose addresses need not be wide.
    ``streams`` have the keys of the tensors' random streams, where a kernel takes any.
    """
    first = lists[0]
    assert first is not None
    if not any(first.sizes):
        return None
    device, stream = first.given[0].device, 0
    columns = [first if column is None else column for column in lists]
    addresses, dtypes = tuple([column.addresses for column in columns]), tuple([column.dtypes for column in columns])
    keys = (0,) * len(first) if streams is None else streams.keys
    make_rows: Callable[..., Tensor] = _rows
    make_owners: Callable[..., Tensor] = _owners
    with launching_on(device):
        if device.type == "cuda":
            # a table may be read only behind the copy that filled it
            stream = torch.cuda.current_stream(device).cuda_stream
            if torch.cuda.is_current_stream_capturing():
                # the memory of a captured copy is filled only when the graph runs, so nobody else may use it
                make_rows, make_owners = _rows.__wrapped__, _owners.__wrapped__
        rows = make_rows(first.sizes, addresses, dtypes, keys, device, stream)
        return Table(rows, make_owners(first.sizes, device, stream), _kinds(dtypes)[0])


Dtypes = tuple[tuple[torch.dtype, ...], ...]


@functools.lru_cache(maxsize=_KEPT)
def _kinds(dtypes: Dtypes) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Return the combinations of dtypes that occur, and for each tensor the number of its own."""
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
    addresses: tuple[tuple[int, ...], ...],
    dtypes: Dtypes,
    keys: tuple[int, ...],
    device: torch.device,
    stream: int,
) -> Tensor:
    # what the address of a column must be a multiple of
    widths = [_CODES if of[0] == torch.uint8 else _WIDE for of in dtypes]
    numbers, first, rows = _kinds(dtypes)[1], 0, []
    for i, numel in enumerate(numels):
        own = [column[i] for column in addresses]
        is_wide = not any(map(operator.mod, own, widths))
        rows.append([*own, numel, first, 2 * numbers[i] + is_wide, keys[i]])
        first += triton.cdiv(numel, BLOCK_SIZE)
    return _on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy that the host does not wait for."""
    if device.type == "cpu":
        return values
    pinned = values.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


@triton.jit
def tile_of(rows_ptr, owners_ptr, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return this program's tile: its tensor's number and row, its first element, and its number of elements."""
    tensor = tl.load(owners_ptr + tl.program_id(0))
    row_ptr = row_at(rows_ptr, tensor, LISTS)
    n_elements = tl.load(row_ptr + LISTS)
    start = (tl.program_id(0) - tl.load(row_ptr + LISTS + 1)) * BLOCK_SIZE
    return tensor, row_ptr, start, n_elements


@triton.jit
def row_at(rows_ptr, tensor, LISTS: tl.constexpr):
    """Return the row of a tensor."""
    return rows_ptr + tensor.to(tl.int64) * (LISTS + _FURTHER_COLUMNS)


@triton.jit
def form_of(row_ptr, start, n_elements, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Return the number of the tensor's kind, and whether the tile is whole with floats aligned to 128 bits."""
    form = tl.load(row_ptr + LISTS + 2)
    return form >> 1, ((form & 1) != 0) & (start + BLOCK_SIZE <= n_elements)


@triton.constexpr_function
def kind_at(kinds, k):
    """Return the k-th kind; indexed by the kernel, a tuple of tuples gives no constant before triton 3.8."""
    return kinds[k]


@triton.jit
def stream_of(row_ptr, seed_low, seed_high, step, LISTS: tl.constexpr):
    """Return the tensor's random stream: (seed_low, seed_high, step, key); the key is loaded where it is used."""
    return seed_low, seed_high, step, tl.load(row_ptr + LISTS + 3)


@triton.jit
def is_inactive(active_ptr, HAS_FLAGS: tl.constexpr):
    """Whether the tensor must stay as it is."""
    inactive = False
    if HAS_FLAGS:
        inactive = tl.load(active_ptr) == 0
    return inactive


@triton.jit
def pointer_at(row_ptr, LIST: tl.constexpr, KIND: tl.constexpr, n_elements):
    """Return the tensor's address in a list, as a pointer to elements of its kind.

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
