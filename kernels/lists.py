"""Lists of tensors in one call of an op: their sizes and addresses, and checks before anything is written.

An optimizer makes the checks in every step, and a call per tensor takes longer than the kernels themselves where
tensors are small. While all is well they are a few methods of C mapped over each list; the fault, and its place, is
looked for only where there is one. What addresses and sizes alone decide is remembered.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lioncub.kernels.checks import (
    FLOAT_DTYPES,
    check_dense,
    check_device,
    check_flat,
    check_integer,
    check_same_storage_order,
    is_dense,
    storage_order_view,
)
from lioncub.kernels.layout import WORD_SIGNS
from lioncub.kernels.scalars import NO_MIX, Mix, mix_of

_DTYPE: Callable[[Tensor], torch.dtype] = Tensor.dtype.__get__  # type: ignore[attr-defined]
_SHAPE: Callable[[Tensor], torch.Size] = Tensor.shape.__get__  # type: ignore[attr-defined]
_IS_CPU: Callable[[Tensor], bool] = Tensor.is_cpu.__get__  # type: ignore[attr-defined]
_WIDTH: Callable[[torch.dtype], int] = torch.dtype.itemsize.__get__  # type: ignore[attr-defined]
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
# a list of tensors or, with ``starts``, one flat buffer
Tensors = Sequence[Tensor] | Tensor
# name, addresses, sizes and dtypes of a list
_Spans = tuple[str, tuple[int, ...], tuple[int, ...], tuple[torch.dtype, ...]]
# lists whose addresses are remembered; an optimizer has a few for each bucket
KEPT = 256


class TensorList:
    """Tensors of one call of an op, which nobody changes meanwhile; each item is 1-d, in storage order.

    Attributes:
        name: of the argument.
        given: the tensors, or a list of the one buffer, as the op was given them.
        sizes: numbers of elements.
        dtypes: of each tensor.
        addresses: of each tensor's first element; 0 for an empty one.
    """

    addresses: tuple[int, ...]

    def __init__(
        self,
        name: str,
        given: Sequence[Tensor],
        sizes: tuple[int, ...] | None = None,
        firsts: tuple[int, ...] | None = None,
    ) -> None:
        """With ``firsts``, the tensors are consecutive parts of one buffer, each of a first element and a size."""
        self.name, self.given, self._firsts = name, given, firsts
        if firsts is None or sizes is None:
            self.sizes = tuple(map(Tensor.numel, given))
            self.dtypes = tuple(map(_DTYPE, given))
        else:
            self.sizes, self.dtypes = sizes, (given[0].dtype,) * len(sizes)
            self.addresses = _part_addresses(given[0].data_ptr(), given[0].element_size(), firsts, sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i: int) -> Tensor:
        if self._firsts is None:
            return storage_order_view(self.name, self.given[i])
        return self.given[0][self._firsts[i] : self._firsts[i] + self.sizes[i]]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.__getitem__, range(len(self.sizes)))

    def place(self, i: int) -> str:
        """Name the i-th tensor for an error."""
        return place(self.name, i, len(self.sizes))


def place(name: str, i: int, count: int) -> str:
    """Name the i-th of ``count`` tensors for an error."""
    return name if count == 1 else f"{name}[{i}]"


def tensor_lists(
    lists: Mapping[str, object], flats: Mapping[str, object], starts: Sequence[int] | None
) -> list[Sequence[Tensor]]:
    """Return the arguments as an op takes them: ``lists`` and, with ``starts``, ``flats`` as lists of one buffer each.

    Raises TypeError for an argument that is no list of tensors, or no tensor where a buffer is expected.
    """
    found: list[Sequence[Tensor]] = []
    for name, tensors in lists.items() if starts is not None else {**lists, **flats}.items():
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        if not _PLAIN.issuperset(map(type, tensors)):
            for i, tensor in enumerate(tensors):
                if not isinstance(tensor, Tensor):
                    where = place(name, i, len(tensors))
                    raise TypeError(f"{where}: expected a torch.Tensor, got {type(tensor).__name__}")
        found.append(tensors)
    if starts is not None:
        for i, start in enumerate(starts):
            if type(start) is not int:
                check_integer(f"starts[{i}]", start)
        for name, buffer in flats.items():
            if not isinstance(buffer, Tensor):
                raise TypeError(f"{name}: expected one flat tensor with starts, got {type(buffer).__name__}")
            found.append([buffer])
    return found


def float_list(
    name: str, given: Sequence[Tensor], peers: TensorList | None = None, firsts: tuple[int, ...] | None = None
) -> TensorList:
    """Return ``given`` or, with ``firsts``, the parts of the one buffer in it that belong to ``peers``.

    Raise TypeError or ValueError unless they are dense fp32, bf16 or fp16 tensors on one device, and those at one place
    of the shape and storage order of the peer there; those that are 1-d are in storage order already, and only as many
    elements.
    """
    if peers is not None and firsts is not None:
        return _parts(name, given, firsts, peers.sizes, FLOAT_DTYPES, peers)
    found = TensorList(name, given)
    like = found if peers is None else peers
    is_alike = like is found or set(map(Tensor.dim, given)) == {1} or _shapes(given) == _shapes(like.given)
    if not (is_alike and _is_plain(found, FLOAT_DTYPES, like.sizes, like)):
        _check_count(found, like)
        for i, (tensor, peer) in enumerate(zip(given, like.given, strict=True)):
            _check_float(found.place(i), tensor, like.place(i), peer)
            check_device(found.place(i), tensor, like.name, like.given[0])
    found.addresses = tuple(map(Tensor.data_ptr, given))
    return found


def master_lists(given: Sequence[Tensor], params: TensorList) -> tuple[list[TensorList], TensorList | None]:
    """Return the masters that there are, to be checked for overlap, and what a backend takes; nothing for none.

    A backend takes one for each parameter; those of fp32 parameters are these themselves. Raise TypeError or ValueError
    unless ``given`` has an fp32 tensor for each bf16 and fp16 parameter, of its shape and storage order.
    """
    if not given:
        return [], None
    low = [i for i, dtype in enumerate(params.dtypes) if dtype != torch.float32]
    own = float_list("master", given, TensorList("bf16 or fp16 param", [params.given[i] for i in low]))
    for i, dtype in enumerate(own.dtypes):
        if dtype != torch.float32:
            raise TypeError(f"{own.place(i)}: expected a float32 tensor, got {dtype}")
    tensors, addresses = list(params.given), list(params.addresses)
    for i, tensor, address in zip(low, given, own.addresses, strict=True):
        tensors[i], addresses[i] = tensor, address
    everyone = TensorList("master", tensors)
    everyone.addresses = tuple(addresses)
    return [own], everyone


def update_lists(
    exp_avg: Sequence[Tensor],
    grad: Sequence[Tensor],
    beta1: Tensor | None,
    grad_scale: Tensor | None,
    places: tuple[int, ...] | None,
) -> tuple[TensorList, TensorList | None, Mix]:
    """Return the lists of momentum and gradients, and their mix; without ``beta1`` those of values, None and no mix."""
    if beta1 is None:
        return float_list("x", exp_avg), None, NO_MIX
    g = float_list("grad", grad)
    return float_list("exp_avg", exp_avg, g, firsts_of(places, g.sizes)), g, mix_of(beta1, grad_scale)


def flat_list(
    name: str,
    given: Sequence[Tensor],
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    peers: TensorList,
    firsts: tuple[int, ...] | None = None,
) -> TensorList:
    """Return ``given`` or, with ``firsts``, the parts of ``sizes`` elements of the one buffer in it.

    Raise unless all are contiguous, of ``dtype``, on the device of ``peers`` and of so many elements.
    """
    if firsts is not None:
        return _parts(name, given, firsts, sizes, (dtype,), peers)
    found = TensorList(name, given)
    if not (set(map(Tensor.dim, given)) == {1} and _is_plain(found, (dtype,), sizes, peers)):
        _check_count(found, peers)
        for i, (tensor, size) in enumerate(zip(given, sizes, strict=True)):
            check_flat(found.place(i), tensor, dtype, size, peers.name, peers.given[0])
    found.addresses = tuple(map(Tensor.data_ptr, given))
    return found


def _parts(
    name: str,
    given: Sequence[Tensor],
    firsts: tuple[int, ...],
    sizes: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    peers: TensorList,
) -> TensorList:
    (buffer,) = given
    least = max(map(operator.add, firsts, sizes), default=0)
    is_flat = buffer.dtype in dtypes and buffer.dim() == 1 and buffer.is_contiguous() and buffer.numel() >= least
    if not (is_flat and (not peers.given or buffer.device == peers.given[0].device)):
        check_dense(name, buffer, dtypes)
        if not is_flat:
            raise ValueError(
                f"{name}: expected a contiguous tensor of shape [n] with n >= {least}, got shape {tuple(buffer.shape)} "
                f"with strides {buffer.stride()}"
            )
        check_device(name, buffer, peers.name, peers.given[0])
    return TensorList(name, given, sizes, firsts)


@functools.lru_cache(maxsize=KEPT)
def firsts_of(starts: tuple[int, ...] | None, sizes: tuple[int, ...], bits: int = 8) -> tuple[int, ...] | None:
    """Return where in a flat buffer each tensor begins: at which element or, of codes of ``bits``, at which byte.

    Raise ValueError unless ``starts`` are ascending multiples of 64, one for each tensor and behind the one before.
    """
    if starts is None:
        return None
    if len(starts) != len(sizes):
        raise ValueError(f"starts: expected {len(sizes)} numbers, one per tensor, got {len(starts)}")
    end = 0
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        check_integer(f"starts[{i}]", start, least=end)
        if start % WORD_SIGNS:
            raise ValueError(f"starts[{i}]: expected a multiple of {WORD_SIGNS}, got {start}")
        end = start + size
    return tuple([start * bits // 8 for start in starts])


@functools.lru_cache(maxsize=KEPT)
def _part_addresses(base: int, width: int, firsts: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([base + width * first if n else 0 for first, n in zip(firsts, sizes, strict=True)])


def _check_count(tensors: TensorList, peers: TensorList) -> None:
    if len(tensors) != len(peers):
        raise ValueError(
            f"{tensors.name}: expected {len(peers)} tensors, one for each of {peers.name}, got {len(tensors)}"
        )


def _check_float(name: str, tensor: Tensor, peer_name: str, peer: Tensor) -> None:
    check_dense(name, tensor, FLOAT_DTYPES)
    if tensor.shape != (peer.numel(),) or not tensor.is_contiguous():
        check_same_storage_order(name, tensor, peer_name, peer)
    if not is_dense(tensor.shape, tensor.stride()):
        storage_order_view(name, tensor)


def _is_plain(tensors: TensorList, dtypes: Sequence[torch.dtype], sizes: tuple[int, ...], peers: TensorList) -> bool:
    """Whether all tensors are contiguous, of these dtypes and sizes, and on the device of ``peers``."""
    given = tensors.given
    if tensors.sizes != sizes or not given:
        return False
    first = peers.given[0]
    return (
        set(tensors.dtypes).issubset(dtypes)
        and all(map(Tensor.is_contiguous, given))
        # an index of -1 is that of several devices
        and (all(map(_IS_CPU, given)) if first.is_cpu else _index_of(given) == first.get_device() >= 0)
    )


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return list(map(_SHAPE, tensors))


def _index_of(tensors: Sequence[Tensor]) -> int:
    """Return the device index of all ``tensors``, -1 where they differ."""
    indices = set(map(Tensor.get_device, tensors))
    return indices.pop() if len(indices) == 1 else -1


def check_apart(written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming both, where a written tensor overlaps another one, or has no memory.

    Rows that lie apart may have others between them.
    """
    spans = [(name, tensor, _hull(tensor)) for name, tensor in {**written, **read}.items() if tensor.numel()]
    for name, _, (start, end) in spans:
        _check_memory(name, start, end)
    for (name, one, hull), (other_name, other, other_hull) in itertools.combinations(spans, 2):
        if (name in written or other_name in written) and _meet(hull, other_hull) and _rows_meet(one, other):
            first, second = (name, other_name) if name in written else (other_name, name)
            raise ValueError(f"{first}: expected memory apart from that of {second}, got memory that overlaps it")


def check_lists_apart(written: Sequence[TensorList], read: Sequence[TensorList]) -> None:
    """`check_apart` of lists of dense tensors; of one list that is written, also its tensors among themselves."""
    facts = [(each.name, each.addresses, each.sizes, each.dtypes) for each in (*written, *read)]
    _check_spans_apart(len(written), *facts)


@functools.lru_cache(maxsize=KEPT)
def _check_spans_apart(n_written: int, *lists: _Spans) -> None:
    """Check lists of names, addresses, sizes and dtypes; several may share what is only read."""
    starts: list[int] = []
    ends: list[int] = []
    for number, (_, addresses, sizes, dtypes) in enumerate(lists):
        own_ends = map(operator.add, addresses, map(operator.mul, sizes, map(_WIDTH, dtypes)))
        if number < n_written:
            starts += addresses
            ends += own_ends
        else:
            # zeros in place of missing gradients share their start: of those the longest is enough
            spans_read = dict(sorted(zip(addresses, own_ends, strict=True)))
            starts += spans_read.keys()
            ends += spans_read.values()
    # an empty tensor has no address
    starts, ends = sorted(filter(None, starts)), sorted(filter(None, ends))
    # nothing overlaps where every span but the first begins behind as many ends as there are spans before it
    if len(starts) != len(ends) or not all(map(operator.le, ends, starts[1:])):
        _find_overlap(n_written, lists)


def _find_overlap(n_written: int, lists: Sequence[_Spans]) -> None:
    spans = [
        (start, start + size * dtype.itemsize, number < n_written, place(name, i, len(sizes)))
        for number, (name, addresses, sizes, dtypes) in enumerate(lists)
        for i, (start, size, dtype) in enumerate(zip(addresses, sizes, dtypes, strict=True))
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
    """Return the span from the first byte to the last of a tensor with elements."""
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
