"""Means summed in rank order, so that every rank, and a simulation, gets the same bits (rule 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.agreement import agreement
from lioncub.collectives.algorithms import Done, Exchange, Phases
from lioncub.collectives.transport import SECOND, SINGLE_AVERAGE, Group, Transport, check_carried
from lioncub.kernels import dequantize, quantize

# elements per scale of 8-bit values; chunks are whole blocks, so that a value's scale does not depend on N
BLOCK = 64
DTYPES = ("fp32", "bf16", "int8")


def payload_bytes(n: int, dtype: str = "fp32") -> int:
    """Return the bytes of ``n`` values on the wire, n a multiple of `BLOCK`: "int8" has one fp32 scale per block.

    Raises ValueError for an unknown ``dtype``.
    """
    check_dtype(dtype)
    return n // BLOCK * {"fp32": 4 * BLOCK, "bf16": 2 * BLOCK, "int8": BLOCK + 4}[dtype]


def average_bytes(n: int, workers: int, dtype: str = "fp32") -> int:
    """Return the bytes that each of ``workers`` ranks sends to average ``n`` values."""
    return 2 * (workers - 1) * payload_bytes(_chunk(n, workers), dtype) if n else 0


def average_phases(transport: Transport, n: int, *, dtype: str, tag: int, eager: bool) -> Phases[Tensor]:
    """Average fp32[n] over ranks.

    1. All-to-all: rank k receives everyone's k-th chunk. 2. It adds them in rank order, in fp32, and divides by N.
    3. All-gather of the averaged chunks. Both ways values are sent as ``dtype``. Averages in flight at once need
    different ``tag`` numbers; ``eager`` as in `Transport.channel`.
    """
    size = _chunk(n, transport.size)
    n_bytes = payload_bytes(size, dtype)
    there, back = (transport.channel(n_bytes, t, eager=eager) for t in (tag, tag + SECOND))
    values = yield None
    padded = torch.nn.functional.pad(values, (0, transport.size * size - n)).view(transport.size, size)
    received = yield there.send(_encode(padded, dtype))
    mean = rank_order_mean(_decode(received, size, dtype))
    replies = yield back.send(_encode(mean[None], dtype)[0])
    yield Done(_decode(replies, size, dtype).reshape(-1)[:n])


def average_(values: Tensor, *, group: Group = None, dtype: str = "fp32") -> None:
    """Replace ``values`` (contiguous fp32[n]) on every rank by their mean over ranks; a collective.

    Each rank sends a handshake of `HANDSHAKE_BYTES`, then `average_bytes`. "bf16" and "int8" (blocks of `BLOCK`) round
    values on the way there and means on the way back. Raises ValueError or TypeError for another ``dtype`` or other
    values, WorkersDisagreeError on all other ranks, and on all where sizes or dtypes differ.
    """
    with agreement(group, values.device if isinstance(values, Tensor) else None) as fingerprint:
        check_dtype(dtype)
        if not isinstance(values, Tensor):
            raise TypeError(f"values: expected a float32 tensor, got {type(values).__name__}")
        if values.dtype != torch.float32 or values.dim() != 1 or not values.is_contiguous():
            raise ValueError(f"values: expected a contiguous float32 [n], got {values.dtype} {tuple(values.shape)}")
        check_carried("values", values, group)
        fingerprint |= {
            "the number of values": values.numel(),
            "the device type": values.device.type,
            "the dtype": dtype,
        }
    average_agreed_(values, group=group, dtype=dtype)


def average_agreed_(values: Tensor, *, group: Group, dtype: str = "fp32") -> None:
    """`average_` without a handshake: the caller has made sure that all ranks' arguments are valid and equal."""
    if values.numel():
        transport = Transport(group, values.device)
        phases = average_phases(transport, values.numel(), dtype=dtype, tag=SINGLE_AVERAGE, eager=False)
        exchange: Exchange[Tensor] = Exchange(phases, 2)
        exchange.start(values)
        values.copy_(exchange.result())


def rank_order_mean(rows: Tensor) -> Tensor:
    """Return the mean of fp32[N, n] over rows, added one after the other."""
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    return total.div_(len(rows))


def check_dtype(dtype: str) -> None:
    """Raise ValueError unless values can be sent as ``dtype``."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype!r}")


def _chunk(n: int, workers: int) -> int:
    """Return the values of a rank's chunk: whole blocks, as many on every rank."""
    return -(-n // (workers * BLOCK)) * BLOCK


def _encode(rows: Tensor, dtype: str) -> Tensor:
    """Encode fp32[R, n] as uint8[R, payload_bytes(n, dtype)]."""
    if dtype == "fp32":
        return rows.view(torch.uint8)
    if dtype == "bf16":
        return rows.to(torch.bfloat16).view(torch.uint8)
    codes, scale = quantize(rows.reshape(-1), bits=8, norm="linf", block=BLOCK)
    return torch.cat([codes.view(len(rows), -1), scale.view(torch.uint8).view(len(rows), -1)], dim=1)


def _decode(payload: Tensor, n: int, dtype: str) -> Tensor:
    """Return what `_encode` was given, as far as ``dtype`` holds it."""
    if dtype == "fp32":
        return payload.view(torch.float32)
    if dtype == "bf16":
        return payload.view(torch.bfloat16).float()
    codes, scale = payload[:, :n].reshape(-1), payload[:, n:].contiguous().view(torch.float32).view(-1)
    return dequantize(codes, scale, codes.numel(), bits=8, norm="linf", block=BLOCK).view(len(payload), n)
