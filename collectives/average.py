"""Averages summed in rank order, so that every worker, and a simulation, gets the same bits (rule 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from lioncub.collectives.transport import AVERAGES, Group, all_gather, all_to_all, world_size_of


def average_(values: Tensor, *, group: Group = None) -> None:
    """Replace ``values`` (contiguous fp32[n]) on every worker by their mean over workers; a collective call.

    1. all-to-all: worker k receives everyone's k-th chunk; 2. it adds them in rank order and divides by N;
    3. all-gather of the averaged chunks. Each worker sends 2*(N-1)/N * 4n bytes, padded to N equal chunks.
    """
    if values.dtype != torch.float32 or values.dim() != 1 or not values.is_contiguous():
        raise ValueError(f"values: expected a contiguous float32 [n], got {values.dtype} {tuple(values.shape)}")
    workers, n = world_size_of(group), values.numel()
    if n == 0:
        return
    chunk = -(-n // workers)
    sent = values.new_zeros(workers, chunk)
    sent.view(-1)[:n] = values
    received = torch.empty_like(sent)
    all_to_all(received, sent, group, tag=AVERAGES).wait()
    total = received[0].clone()
    for row in received[1:]:
        total += row
    total /= workers
    all_gather(sent.view(-1), total, group).wait()
    values.copy_(sent.view(-1)[:n])
