"""Native sums of packed codes: one all-reduce of fields that are wide enough for all workers (rule 9)."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.handshake import agreement
from lioncub.collectives.transport import Group, all_reduce, check_carried, world_size_of
from lioncub.kernels import field_bits, packed_bytes, resolve_impl, spread_codes, unpack_fields
from lioncub.kernels.checks import check_choice, check_flat, check_integer
from lioncub.kernels.layout import CODE_BITS, largest_level


def sum_bytes(n_bytes: int, bits: int, world_size: int) -> int:
    """Bytes that each worker sends for the sum of a message of ``n_bytes`` of ``bits``-bit codes, by a ring."""
    fields = n_bytes * field_bits(_largest_code(bits), world_size) // bits
    return -(-2 * (world_size - 1) * fields // world_size)


def sum_codes(
    packed: Tensor, n: int, *, bits: int = 1, group: Group = None, fields: int | None = None, impl: str = "auto"
) -> Tensor:
    """Sum over workers of packed signs or quantized levels, by one native all-reduce (Lion Cub, section 1).

    A collective call. 1. Each b-bit code is spread into a field of f bits, wide enough for the sum of all workers;
    2. one all-reduce(SUM) of the fields; 3. they are unpacked once. A handshake of `HANDSHAKE_BYTES` goes first.

    Args:
        packed: uint8[packed_bytes(n, bits)], not changed.
        n: number of codes.
        bits: 1 for signs, which count +1 and -1; 2, 4 or 8 for levels -K..K as `quantize` packs them.
        group: process group; the default group unless given.
        fields: f, one of 1, 2, 4, 8 and 16; the narrowest that suffices unless given.
        impl: implementation of the kernels.

    Returns:
        int32[n]; divided by the number of workers it is the mean of signs, Distributed Lion's averaging (arXiv
        2404.00438). Raises ValueError where ``fields`` is too narrow, WorkersDisagreeError where workers disagree.
    """
    workers = world_size_of(group)
    with agreement(group, packed.device if isinstance(packed, Tensor) else None) as facts:
        check_integer("n", n)
        check_choice("bits", bits, CODE_BITS)
        check_flat("packed", packed, torch.uint8, packed_bytes(n, bits))
        check_carried("packed", packed, group)
        resolve_impl(impl, packed.device)
        width = field_bits(_largest_code(bits), workers, fields)
        facts |= {
            "the number of codes": n,
            "the device type": packed.device.type,
            "the bits of a code": bits,
            "the bits of a field": width,
        }
    total = spread_codes(packed, bits=bits, field_bits=width, impl=impl)
    # fields never carry into one another, so wider integers give the same sums
    all_reduce(total.view(torch.int32) if width == 16 else total, group).wait()
    if bits == 1:
        return unpack_fields(total, n, field_bits=width, step=2, offset=workers, impl=impl)
    return unpack_fields(total, n, field_bits=width, offset=workers * largest_level(bits), impl=impl)


def _largest_code(bits: int) -> int:
    return 1 if bits == 1 else 2 * largest_level(bits)
