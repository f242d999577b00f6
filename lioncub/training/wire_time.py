"""Arithmetic of bytes on the wire: what a step would take on a network of a given speed. Nothing here is measured."""

from lioncub.collectives.traffic import ring_all_reduce_bytes

__all__ = ["NETWORKS", "overlapped_step_seconds", "ring_all_reduce_bytes", "sequential_step_seconds", "wire_seconds"]

NETWORKS = {"100 Mb/s": 1e8, "1 Gb/s": 1e9, "10 Gb/s": 1e10}


def wire_seconds(bytes_sent: float, bits_per_second: float) -> float:
    """Time of `bytes_sent` at full link speed, both directions at once, without latency or protocol overhead."""
    return 8 * bytes_sent / bits_per_second


def overlapped_step_seconds(*, forward: float, backward: float, optimizer: float, wire: float) -> float:
    """A step whose communication hides behind the whole backward pass: the best that DDP can do."""
    return forward + max(backward, wire) + optimizer


def sequential_step_seconds(*, forward: float, backward: float, optimizer: float, wire: float) -> float:
    """A step that communicates after the backward pass, with nothing hidden."""
    return forward + backward + optimizer + wire
