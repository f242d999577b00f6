"""Lists of tensors in one call of an op: their sizes and addresses, and checks before anything is written.

An optimizer makes the checks in every step, and a call per tensor takes longer than the kernels themselves where
tensors are small. While all is well they are a few methods of C mapped over each list; the fault, and its place, is
looked for only where there is one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import (
    FLOAT_DTYPES,
    check_dense,
    check_device,
    check_integer,
    check_same_storage_order,
    is_dense,
    storage_order_view,
)
from lioncub.kernels.layout import WORD_SIGNS

_DTYPE: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]
_SHAPE: Callable[[Tensor], torch.Size] = Tensor.shape.__get__  # type: ignore[attr-defined]
_IS_CPU: Callable[[Tensor], bool] = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# a list of tensors or, with ``starts``, one flat buffer
Tensors = Sequence[Tensor] | Tensor


class TensorList:
    """Tensors of one call of an op, which nobody changes meanwhile; each item is 1-d, in storage order.

    Attributes:
        given: the tensors, or the buffer, as the op was given them.
        sizes: numbers of elements.
        dtypes: of each tensor.
    """

    _addresses: list[int] | None = None

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.given = given
        self.sizes = list(map(Tensor.numel, given))
        self.dtypes = list(map(_DTYPE, given))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Tensor:
        return storage_order_view("tensor", self.given[i])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    @property
    def device(self) -> torch.device:
        """Of all tensors."""
        return self.given[0].device

    @property
    def addresses(self) -> list[int]:
        """Of each tensor's first element; 0 for an empty one. Tensors that are not dense have none."""
        if self._addresses is None:
            self._addresses = list(map(Tensor.data_ptr, self.given))
        return self._addresses

    @property
    def ends(self) -> list[int]:
        """Addresses behind each dense tensor's last element."""
        if self.dtypes and self.dtypes.count(self.dtypes[0]) == len(self.dtypes):
            width = self.dtypes[0].itemsize
            return list(map(operator.add, self.addresses, map(width.__mul__, self.sizes)))
        rows = zip(self.addresses, self.sizes, self.dtypes, strict=True)
        return [start + dtype.itemsize * size for start, size, dtype in rows]

    def where(self, chosen: Sequence[int]) -> TensorList:
        """The tensors whose flag is not zero."""
        return TensorList(list(itertools.compress(self.given, chosen)))


class BufferParts(TensorList):
    """Consecutive parts of one flat buffer, each of a given first element and size."""

    def __init__(self, buffer: Tensor, firsts: Sequence[int], sizes: Sequence[int]) -> None:
        self.given, self._firsts, self.sizes = [buffer], firsts, list(sizes)
        self.dtypes = [buffer.dtype] * len(sizes)
        base, width = buffer.data_ptr(), buffer.element_size()
        self._addresses = [base + width * first if n else 0 for first, n in zip(firsts, sizes, strict=True)]

    def __getitem__(self, i: int) -> Tensor:
        return self.given[0][self._firsts[i] : self._firsts[i] + self.sizes[i]]

    def where(self, chosen: Sequence[int]) -> BufferParts:
        """See `TensorList.where`."""
        firsts, sizes = (list(itertools.compress(numbers, chosen)) for numbers in (self._firsts, self.sizes))
        return BufferParts(self.given[0], firsts, sizes)


def tensor_list(tensors: Sequence[Tensor] | TensorList) -> TensorList:
    """``tensors`` as a `TensorList`; one that it is already stays."""
    return tensors if isinstance(tensors, TensorList) else TensorList(tensors)


def place(name: str, i: int, count: int) -> str:
    """How an error names the i-th of ``count`` tensors."""
    return name if count == 1 else f"{name}[{i}]"


def check_list_types(**lists: object) -> None:
    """Raise TypeError unless each argument is a sequence of tensors."""
    for name, tensors in lists.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        if _PLAIN.issuperset(map(type, tensors)):
            continue
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                where = place(name, i, len(tensors))
                raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")


def one_or_list(name: str, tensors: Tensors, starts: Sequence[int] | None) -> Sequence[Tensor]:
    """A list as an op takes it: ``tensors`` or, with ``starts``, one flat buffer. Raises TypeError for other types."""
    if starts is None:
        check_list_types(**{name: tensors})
        assert not isinstance(tensors, Tensor)
        return tensors
    if not isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected one flat tensor with starts, got {type(tensors).__name__}")
    return [tensors]


def check_starts(starts: Sequence[int] | None, like: Sequence[Tensor]) -> None:
    """Raise unless ``starts`` is None or has an ascending multiple of 64 for each tensor, behind the one before."""
    if starts is None:
        return
    if len(starts) != len(like):
        raise ValueError(f"starts: expected {len(like)} numbers, one per tensor, got {len(starts)}")
    end = 0
    for i, (start, tensor) in enumerate(zip(starts, like, strict=True)):
        check_integer(f"starts[{i}]", start, least=end)
        if start % WORD_SIGNS:
            raise ValueError(f"starts[{i}]: expected a multiple of {WORD_SIGNS}, got {start}")
        end = start + tensor.numel()


def float_parts(name: str, given: Sequence[Tensor], starts: Sequence[int] | None, peers: TensorList) -> TensorList:
    """``given`` itself or, with ``starts``, the parts of the flat buffer in it that belong to ``peers``."""
    return TensorList(given) if starts is None else _parts(name, given, starts, peers.sizes, FLOAT_DTYPES)


def code_parts(
    name: str, given: Sequence[Tensor], starts: Sequence[int] | None, bits: int, sizes: Sequence[int]
) -> TensorList:
    """``given`` itself or, with ``starts``, parts of ``sizes`` bytes of the flat buffer of codes in it."""
    if starts is None:
        return TensorList(given)
    return _parts(name, given, [start * bits // 8 for start in starts], sizes, (torch.uint8,))


def scale_parts(
    given: Sequence[Tensor], starts: Sequence[int] | None, counts: Sequence[int], firsts: Sequence[int]
) -> TensorList:
    """``given`` itself or, with ``starts`` and one buffer, its parts of ``counts`` elements from ``firsts`` on."""
    if starts is None or len(given) != 1:
        return TensorList(given)
    return _parts("scale", given, firsts, counts, (torch.float32,))


def _parts(
    name: str, given: Sequence[Tensor], firsts: Sequence[int], sizes: Sequence[int], dtypes: Sequence[torch.dtype]
) -> BufferParts:
    (buffer,) = given
    check_dense(name, buffer, dtypes)
    least = max([first + size for first, size in zip(firsts, sizes, strict=True)], default=0)
    if buffer.dim() != 1 or not buffer.is_contiguous() or buffer.numel() < least:
        raise ValueError(
            f"{name}: expected a contiguous tensor of shape [n] with n >= {least}, got shape {tuple(buffer.shape)} "
            f"with strides {buffer.stride()}"
        )
    return BufferParts(buffer, firsts, sizes)


def check_float_lists(**lists: TensorList) -> None:
    """Raise TypeError or ValueError unless all lists are as long as the first, and tensors of one place alike.

    They are dense fp32, bf16 or fp16 tensors on one device, of one shape and storage order; those that are 1-d are in
    storage order already, and only as many elements.
    """
    peer_name, peers = next(iter(lists.items()))
    for name, tensors in lists.items():
        _check_count(name, tensors, peers.sizes, peer_name)
        if not peers.sizes:
            continue
        if isinstance(tensors, BufferParts):
            check_device(name, tensors.given[0], peer_name, peers.given[0])
        elif not (_is_plain(tensors, FLOAT_DTYPES, peers.sizes, peers.given[0]) and _are_alike(tensors, peers)):
            for i, (tensor, peer) in enumerate(zip(tensors.given, peers.given, strict=True)):
                _check_float(place(name, i, len(tensors)), tensor, place(peer_name, i, len(tensors)), peer)
                check_device(place(name, i, len(tensors)), tensor, peer_name, peers.given[0])


def check_flat_list(
    name: str, tensors: TensorList, dtype: torch.dtype, sizes: Sequence[int], peer_name: str, peers: TensorList
) -> None:
    """Raise unless ``tensors`` are contiguous, of ``dtype``, on the device of ``peers`` and of so many elements."""
    _check_count(name, tensors, sizes, peer_name)
    if not sizes:
        return
    if isinstance(tensors, BufferParts):
        check_device(name, tensors.given[0], peer_name, peers.given[0])
    elif not (_is_plain(tensors, (dtype,), sizes, peers.given[0]) and _are_flat(tensors)):
        for i, (tensor, size) in enumerate(zip(tensors.given, sizes, strict=True)):
            where = place(name, i, len(tensors))
            check_dense(where, tensor, (dtype,))
            if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() != size:
                raise ValueError(
                    f"{where}: expected a contiguous {str(dtype).removeprefix('torch.')} tensor of shape ({size},), "
                    f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}"
                )
            check_device(where, tensor, peer_name, peers.given[0])


def _check_count(name: str, tensors: TensorList, sizes: Sequence[int], peer_name: str) -> None:
    if len(tensors) != len(sizes):
        raise ValueError(f"{name}: expected {len(sizes)} tensors, one for each of {peer_name}, got {len(tensors)}")


def _check_float(name: str, tensor: Tensor, peer_name: str, peer: Tensor) -> None:
    check_dense(name, tensor, FLOAT_DTYPES)
    if tensor.shape != (peer.numel(),) or not tensor.is_contiguous():
        check_same_storage_order(name, tensor, peer_name, peer)
    if not is_dense(tensor.shape, tensor.stride()):
        storage_order_view(name, tensor)


def _is_plain(tensors: TensorList, dtypes: Sequence[torch.dtype], sizes: Sequence[int], first: Tensor) -> bool:
    """Whether all tensors are contiguous, of these dtypes and sizes, and on the device of ``first``."""
    given = tensors.given
    return (
        tensors.sizes == sizes
        and set(tensors.dtypes).issubset(dtypes)
        and all(map(Tensor.is_contiguous, given))
        # an index of -1 is that of several devices
        and (all(map(_IS_CPU, given)) if first.is_cpu else _index_of(given) == first.get_device() >= 0)
    )


def _are_flat(tensors: TensorList) -> bool:
    return list(map(Tensor.dim, tensors.given)).count(1) == len(tensors)


def _are_alike(tensors: TensorList, peers: TensorList) -> bool:
    return _are_flat(tensors) or list(map(_SHAPE, tensors.given)) == list(map(_SHAPE, peers.given))


def _index_of(tensors: Sequence[Tensor]) -> int:
    """The device index of all ``tensors``, -1 where they differ."""
    indices = set(map(Tensor.get_device, tensors))
    return indices.pop() if len(indices) == 1 else -1


def check_apart(written: Mapping[str, Tensor | None], read: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError, naming both, where a written tensor overlaps another one, or has no memory.

    Rows that lie apart may have others between them.
    """
    given = [(name, tensor) for name, tensor in {**written, **read}.items() if tensor is not None and tensor.numel()]
    spans = [(name, tensor, _hull(tensor)) for name, tensor in given]
    for name, _, (start, end) in spans:
        _check_memory(name, start, end)
    for (name, one, hull), (other_name, other, other_hull) in itertools.combinations(spans, 2):
        if (name in written or other_name in written) and _meet(hull, other_hull) and _rows_meet(one, other):
            first, second = (name, other_name) if name in written else (other_name, name)
            raise ValueError(f"{first}: expected memory apart from that of {second}, got memory that overlaps it")


def check_lists_apart(written: Mapping[str, TensorList], read: Mapping[str, TensorList]) -> None:
    """`check_apart` of lists of dense tensors; of one list that is written, also its tensors among themselves."""
    starts: list[int] = []
    ends: list[int] = []
    for tensors in written.values():
        starts += tensors.addresses
        ends += tensors.ends
    # zeros in place of missing gradients share their start: of those the longest is enough
    pairs = (zip(tensors.addresses, tensors.ends, strict=True) for tensors in read.values())
    spans = dict(sorted(itertools.chain.from_iterable(pairs)))
    starts += spans.keys()
    ends += spans.values()
    # an empty tensor has no address
    starts, ends = sorted(filter(None, starts)), sorted(filter(None, ends))
    # nothing overlaps where every span but the first begins behind as many ends as there are spans before it
    if len(starts) != len(ends) or not all(map(operator.le, ends, starts[1:])):
        _check_named(written, read)


def _check_named(written: Mapping[str, TensorList], read: Mapping[str, TensorList]) -> None:
    """`check_lists_apart` tensor by tensor: several may share what is only read."""
    spans = [
        (start, end, name in written, place(name, i, len(tensors)))
        for name, tensors in {**written, **read}.items()
        for i, (start, end, size) in enumerate(zip(tensors.addresses, tensors.ends, tensors.sizes, strict=True))
        if size
    ]
    # behind what has been seen: the end of all of it, and of what is written, with its name
    furthest = furthest_written = (0, "")
    for start, end, is_written, name in sorted(spans):
        _check_memory(name, start, end)
        before = furthest if is_written else furthest_written
        if start < before[0]:
            first, second = (name, before[1]) if is_written else (before[1], name)
            raise ValueError(f"{first}: expected memory apart from that of {second}, got memory that overlaps it")
        furthest = max(furthest, (end, name))
        if is_written:
            furthest_written = max(furthest_written, (end, name))


def _check_memory(name: str, start: int, end: int) -> None:
    if not start:
        raise ValueError(f"{name}: expected {end - start} bytes of memory, got a tensor whose storage is empty")


def _hull(tensor: Tensor) -> tuple[int, int]:
    """From the first byte to the last of a tensor with elements."""
    start, size = tensor.data_ptr(), tensor.element_size()
    last = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _rows_meet(one: Tensor, other: Tensor) -> bool:
    """Whether any rows overlap, of adjacent elements along the last axis."""
    others = _rows(other)
    return any(_meet(row, each) for row in _rows(one) for each in others)


def _rows(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.dim() < 2 or tensor.is_contiguous():
        return [_hull(tensor)]
    return [span for row in tensor for span in _rows(row)]
