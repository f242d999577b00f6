"""Memory that an op writes must be apart from all other memory of the call: threads and blocks run in any order."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping

from torch import Tensor

from lioncub.kernels.tensor_lists import TensorList

# first byte, and the one behind the last
Span = tuple[int, int]


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
    """`check_apart` of lists of contiguous tensors; of one list that is written, also its tensors among themselves."""
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
        (*_hull(tensor), name in written, f"{name}[{i}]")
        for name, tensors in {**written, **read}.items()
        for i, tensor in enumerate(tensors)
        if tensor.numel()
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


def _hull(tensor: Tensor) -> Span:
    """From the first byte to the last of a tensor with elements."""
    start, size = tensor.data_ptr(), tensor.element_size()
    last = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _rows_meet(one: Tensor, other: Tensor) -> bool:
    """Whether any rows overlap, of adjacent elements along the last axis."""
    others = _rows(other)
    return any(_meet(row, each) for row in _rows(one) for each in others)


def _rows(tensor: Tensor) -> list[Span]:
    if tensor.dim() < 2 or tensor.is_contiguous():
        return [_hull(tensor)]
    return [span for row in tensor for span in _rows(row)]
