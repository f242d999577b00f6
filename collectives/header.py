"""The header in front of every message: enough to notice that workers are not voting on the same thing.

Eight-byte little-endian words: wire version, step, hash of the layout, hash of the hyperparameters, first tensor with
a non-finite element (1 + its index; 0: none), flags, then a bitmap of the tensors that have a gradient, padded to 16
bytes. A voted chunk goes back behind four words: wire version, combined status, numbers of ties and of unanimous votes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lioncub.collectives.errors import WorkersDisagreeError, by_value
from lioncub.collectives.handshake import WIRE_VERSION
from lioncub.collectives.traffic import aligned

FIXED_WORDS = 6
FOUND_INF = 1
FAILED = 2
UNVERIFIED = 4
STALE = 8
STATUS_OK, STATUS_NONFINITE, STATUS_DISAGREE = 0, 1, 2
_NONFINITE_WORD = 4
# what must be equal on all workers, with the names that an error gives them
_AGREED = (
    "the wire version",
    "the step",
    "the bucket layout",
    "the hyperparameters (lr, betas, weight_decay, maximize)",
)


@dataclass(frozen=True)
class Header:
    """What one worker says about its message."""

    step: int = 0
    layout: int = 0
    hyperparameters: int = 0
    nonfinite: int = 0
    flags: int = 0
    has_gradient: tuple[bool, ...] = ()
    version: int = WIRE_VERSION


def header_bytes(n_tensors: int) -> int:
    """Bytes of the header of a message about ``n_tensors`` tensors."""
    return aligned(8 * (FIXED_WORDS + -(-n_tensors // 64)))


def encode_header(header: Header, device: torch.device, status: Tensor | None = None) -> Tensor:
    """uint8[header_bytes(n)]; ``status`` (int32[n], non-zero where not finite) becomes its word on its own device."""
    words = [header.version, header.step, header.layout, header.hyperparameters, header.nonfinite, header.flags]
    for start in range(0, len(header.has_gradient), 64):
        bits = sum(1 << i for i, present in enumerate(header.has_gradient[start : start + 64]) if present)
        words.append(bits - (1 << 64) if bits >> 63 else bits)
    words += [0] * (header_bytes(len(header.has_gradient)) // 8 - len(words))
    if status is not None and status.device.type == "cpu":
        # there is no device to wait for, and one call is cheaper than many
        words[_NONFINITE_WORD] = next((i for i, bad in enumerate(status.tolist(), start=1) if bad), 0)
        status = None
    encoded = torch.tensor(words, dtype=torch.int64, device=device)
    if status is not None and status.numel():
        encoded[_NONFINITE_WORD] = first_nonfinite(status)
    return encoded.view(torch.uint8)


def first_nonfinite(status: Tensor) -> Tensor:
    """1 + the index of the first non-zero of int32[n], n > 0, or 0; int64 scalar, computed without waiting."""
    bad = status != 0
    # argmax finds the first of equal maxima only for integers on some devices, hence the descending weights
    order = torch.arange(status.numel(), 0, -1, dtype=torch.int64, device=status.device)
    first = status.numel() - (bad * order).max()
    return torch.where(bad.any(), first + 1, 0)


def decode_headers(raw: Tensor, n_tensors: int) -> list[Header]:
    """Headers of all workers from uint8[N, header_bytes(n_tensors)]; waits for the device."""
    rows = [tuple(words) for words in raw.contiguous().view(torch.int64).tolist()]
    # workers mostly say the same
    decoded = {words: _decode(words, n_tensors) for words in set(rows)}
    return [decoded[words] for words in rows]


def combined_status(raw: Tensor) -> Tensor | int:
    """STATUS_OK, STATUS_NONFINITE or STATUS_DISAGREE of uint8[N, H]; on a device int64, computed without waiting."""
    words = raw.contiguous().view(torch.int64)
    if words.device.type != "cpu":
        return status_on_device(words)
    # one call is cheaper than many
    rows = words[:, : _NONFINITE_WORD + 1].tolist()
    if any(row[: len(_AGREED)] != rows[0][: len(_AGREED)] for row in rows):
        return STATUS_DISAGREE
    return STATUS_NONFINITE if any(row[_NONFINITE_WORD] for row in rows) else STATUS_OK


def status_on_device(words: Tensor) -> Tensor:
    """`combined_status` of int64[N, H / 8], for any device; int64 scalar."""
    agreed = (words[:, : len(_AGREED)] == words[0, : len(_AGREED)]).all()
    finite = (words[:, _NONFINITE_WORD] == 0).all()
    return torch.where(agreed, torch.where(finite, STATUS_OK, STATUS_NONFINITE), STATUS_DISAGREE)


def check_agreement(headers: Sequence[Header]) -> None:
    """Raise WorkersDisagreeError unless all workers voted on the same thing and none had failed before."""
    failed = [rank for rank, header in enumerate(headers) if header.flags & FAILED]
    if failed:
        raise WorkersDisagreeError(
            f"step {headers[0].step} was taken by no worker, because of an error on rank {failed[0]} (reported there)"
        )
    rows = [(h.version, h.step, h.layout, h.hyperparameters) for h in headers]
    for i, name in enumerate(_AGREED):
        values = [row[i] for row in rows]
        if any(value != values[0] for value in values):
            shown = values if i < 2 else [f"hash {value & (2**64 - 1):016x}" for value in values]
            raise WorkersDisagreeError(f"workers disagree on {name} at step {headers[0].step}: {by_value(shown)}")


def _decode(words: Sequence[int], n_tensors: int) -> Header:
    version, step, layout, hyperparameters, nonfinite, flags = words[:FIXED_WORDS]
    bitmap = words[FIXED_WORDS:]
    has_gradient = tuple(bool(bitmap[i // 64] >> (i % 64) & 1) for i in range(n_tensors))
    return Header(step, layout, hyperparameters, nonfinite, flags, has_gradient, version)
