"""What is compared, by name: Lion on averaged gradients, AdamW on them, and LionCub in its many ways."""

from __future__ import annotations

from dataclasses import dataclass

from lioncub import BySize, MomentumSync, Quantized, SignMean, SignVote, TernaryVote
from lioncub.compression import AnyCompression

REFERENCE = "Lion"


@dataclass(frozen=True)
class Method:
    """How workers' gradients become a step. Without a compression, gradients are averaged in full precision.

    ``family`` is the method whose learning rate it takes: only those are tuned that differ in kind.
    """

    family: str
    compression: AnyCompression | None = None
    sync: MomentumSync | None = None
    adamw: bool = False


def _methods() -> dict[str, Method]:
    compressions: dict[str, AnyCompression] = {
        "SignVote": SignVote(),
        # what LionCub takes unless told otherwise
        "BySize": BySize(),
        "SignMean": SignMean(),
        "TernaryVote": TernaryVote(),
        "2-bit l1": Quantized(bits=2, norm="l1"),
        "2-bit l2": Quantized(bits=2, norm="l2"),
        "2-bit linf": Quantized(bits=2, norm="linf"),
        "2-bit l1 stochastic": Quantized(bits=2, norm="l1", stochastic=True),
        "2-bit l1 blocks of 256": Quantized(bits=2, norm="l1", block=256),
        "2-bit l1 stochastic blocks of 256": Quantized(bits=2, norm="l1", stochastic=True, block=256),
        # levels of all workers mean the same
        "2-bit l2 shared": Quantized(bits=2, norm="l2", stochastic=True, block=64, share_scales_every=8),
        "4-bit l1": Quantized(bits=4, norm="l1"),
        "4-bit linf": Quantized(bits=4, norm="linf"),
        "8-bit l1": Quantized(bits=8, norm="l1"),
        "8-bit linf": Quantized(bits=8, norm="linf"),
    }
    syncs = {
        "every 1 fp32": MomentumSync(),
        "every 8 fp32": MomentumSync(every=8),
        "every 64 fp32": MomentumSync(every=64),
        "staggered 4 int8": MomentumSync(every=4, schedule="staggered", dtype="int8"),
        "staggered 8 int8": MomentumSync(every=8, schedule="staggered", dtype="int8"),
        # the most that a fifteenth of fp32's bytes leaves room for
        "staggered 9 int8": MomentumSync(every=9, schedule="staggered", dtype="int8"),
        "staggered 16 int8": MomentumSync(every=16, schedule="staggered", dtype="int8"),
        "staggered 32 int8": MomentumSync(every=32, schedule="staggered", dtype="int8"),
        "staggered 64 int8": MomentumSync(every=64, schedule="staggered", dtype="int8"),
        "staggered 8 bf16": MomentumSync(every=8, schedule="staggered", dtype="bf16"),
        "auto 0.25": MomentumSync(select="auto", budget=0.25, every=8, schedule="staggered", dtype="int8"),
        "auto 0.5": MomentumSync(select="auto", budget=0.5, every=8, schedule="staggered", dtype="int8"),
        "auto 1.0": MomentumSync(select="auto", budget=1.0, every=4, schedule="staggered", dtype="int8"),
    }
    found = {REFERENCE: Method(REFERENCE), "AdamW": Method("AdamW", adamw=True)}
    found |= {name: Method(_family(name), compression) for name, compression in compressions.items()}
    shared = "2-bit l2 shared"
    few = {shared: ("staggered 16 int8", "staggered 32 int8")}
    for name in ("SignVote", "SignMean", "2-bit l1", shared):
        kept = syncs if name == "SignVote" else {key: syncs[key] for key in few.get(name, ("staggered 8 int8",))}
        found |= {f"{name} + {key}": Method(_family(name), compressions[name], sync) for key, sync in kept.items()}
    return found


def _family(name: str) -> str:
    """Methods of a family step alike, so one learning rate is tuned for all of it."""
    if name.startswith(("SignVote", "BySize", "TernaryVote")):
        return "SignVote"
    if name.startswith(("2-bit l1", "2-bit l2")):
        return "2-bit l1"
    return name.replace("8-bit", "4-bit")


METHODS = _methods()
