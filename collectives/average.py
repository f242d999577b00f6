"""Means summed in rank order, so that every worker, and a simulation, gets the same bits (rule 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.exchange import Phase
from lioncub.collectives.handshake import agreement
from lioncub.collectives.transport import (
    AVERAGES,
    LATER,
    AtOnce,
    Group,
    all_gather,
    all_to_all,
    check_carried,
    has_point_to_point,
    world_size_of,
)
from lioncub.kernels import dequantize, quantize

# elements per scale of 8-bit values; chunks are whole blocks, so that a value's scale does not depend on N
BLOCK = 64
DTYPES = ("fp32", "bf16", "int8")


def payload_bytes(n: int, dtype: str = "fp32") -> int:
    """Bytes of ``n`` values on the wire, n a multiple of `BLOCK`: "int8" has one fp32 scale per block.

    Raises ValueError for an unknown ``dtype``.
    """
    check_dtype(dtype)
    return n // BLOCK * {"fp32": 4 * BLOCK, "bf16": 2 * BLOCK, "int8": BLOCK + 4}[dtype]


def average_bytes(n: int, workers: int, dtype: str = "fp32") -> int:
    """Bytes that each of ``workers`` sends to average ``n`` values."""
    return 2 * (workers - 1) * payload_bytes(_chunk(n, workers), dtype) if n else 0


class Averaging:
    """A mean over workers under way. All workers start it with as many values; ``seconds`` is the host's time for it.

    1. all-to-all: worker k receives everyone's k-th chunk; 2. it adds them in rank order, in fp32, and divides by N;
    3. all-gather of the averaged chunks. Both ways values travel as ``dtype``; values in flight at once on one group
    need different ``tag`` numbers. ``at_once``: by single messages both ways, where the backend has them, so that it
    may run on any thread.
    """

    def __init__(
        self, values: Tensor, *, group: Group, dtype: str = "fp32", tag: int = AVERAGES, at_once: bool = False
    ) -> None:
        self._group, self._dtype, self._n, self._tag = group, dtype, values.numel(), tag
        self._at_once = at_once and has_point_to_point(group, values.device)
        workers = world_size_of(group)
        self._size = _chunk(self._n, workers)
        padded = values.new_zeros(workers, self._size)
        padded.view(-1)[: self._n] = values
        message = _encode(padded, dtype)
        self._received = torch.empty_like(message)
        self._phase = Phase(values.device)
        self._replies: Tensor | None = None
        self._phase.start(
            lambda: (
                AtOnce(self._received, group, tag).send(message)
                if self._at_once
                else all_to_all(self._received, message, group, tag=tag)
            )
        )

    @property
    def bytes_sent(self) -> int:
        """Bytes that this worker sends in both legs."""
        return 2 * (len(self._received) - 1) * self._received.shape[1]

    @property
    def seconds(self) -> float:
        """Time that the host spent starting and awaiting collectives."""
        return self._phase.seconds

    def advance(self) -> bool:
        """Wait for the chunks, average them, start gathering the means; False where that has been done."""
        if self._replies is not None:
            return False
        self._phase.wait()
        replies = torch.empty_like(self._received)
        mean = _encode(rank_order_mean(_decode(self._received, self._size, self._dtype))[None], self._dtype)[0]
        self._phase.start(
            lambda: (
                AtOnce(replies, self._group, self._tag + LATER).send(mean)
                if self._at_once
                else all_gather(replies.view(-1), mean, self._group)
            )
        )
        self._replies = replies
        return True

    def result(self) -> Tensor:
        """fp32[n]: the mean, the same bits on every worker."""
        self.advance()
        self._phase.wait()
        assert self._replies is not None
        return _decode(self._replies, self._size, self._dtype).view(-1)[: self._n]


def average_(values: Tensor, *, group: Group = None, dtype: str = "fp32") -> None:
    """Replace ``values`` (contiguous fp32[n]) on every worker by their mean over workers; a collective call.

    See `Averaging`; each worker sends a handshake of `HANDSHAKE_BYTES`, then `average_bytes`. "bf16" and "int8" (blocks
    of `BLOCK`) round values on the way there and means on the way back. Raises ValueError or TypeError for another
    ``dtype`` or other values, WorkersDisagreeError on all other workers, and on all where sizes or dtypes differ.
    """
    with agreement(group, values.device if isinstance(values, Tensor) else None) as facts:
        check_dtype(dtype)
        _check_values(values, group)
        facts |= {"the number of values": values.numel(), "the device type": values.device.type, "the dtype": dtype}
    average_agreed_(values, group=group, dtype=dtype)


def average_agreed_(values: Tensor, *, group: Group, dtype: str = "fp32") -> None:
    """`average_` without a handshake: the caller has made sure that all workers' arguments are alike."""
    _check_values(values, group)
    check_dtype(dtype)
    if values.numel():
        values.copy_(Averaging(values, group=group, dtype=dtype).result())


def _check_values(values: Tensor, group: Group) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a float32 tensor, got {type(values).__name__}")
    if values.dtype != torch.float32 or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"values: expected a contiguous float32 [n], got {values.dtype} {tuple(values.shape)}")
    check_carried("values", values, group)


def rank_order_mean(rows: Tensor) -> Tensor:
    """The mean of fp32[N, n] over rows, added one after the other."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total.div_(len(rows))


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless values can travel as ``dtype``."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")


def _chunk(n: int, workers: int) -> int:
    """Values of a worker's chunk: whole blocks, as many on every worker."""
    return -(-n // (workers * BLOCK)) * BLOCK


def _encode(rows: Tensor, dtype: str) -> Tensor:
    """fp32[R, n] as uint8[R, payload_bytes(n, dtype)]."""
    if dtype == "fp32":
        return rows.view(torch.uint8)
    if dtype == "bf16":
        return rows.to(torch.bfloat16).view(torch.uint8)
    codes, scale = quantize(rows.view(-1), bits=8, norm="linf", block=BLOCK)
    return torch.cat([codes.view(len(rows), -1), scale.view(torch.uint8).view(len(rows), -1)], dim=1)


def _decode(payload: Tensor, n: int, dtype: str) -> Tensor:
    """What `_encode` was given, as far as ``dtype`` holds it."""
    if dtype == "fp32":
        return payload.view(torch.float32)
    if dtype == "bf16":
        return payload.view(torch.bfloat16).float()
    codes, scale = payload[:, :n].reshape(-1), payload[:, n:].contiguous().view(torch.float32).view(-1)
    return dequantize(codes, scale, codes.numel(), bits=8, norm="linf", block=BLOCK).view(len(payload), n)
