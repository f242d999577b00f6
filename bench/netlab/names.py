"""The methods that are compared, by name."""

from __future__ import annotations

from lioncub.collectives import ALGORITHMS

FLOOR = "no_communication"
BASELINE = "ddp_fp32_lion_pytorch"
OTHERS = {
    FLOOR: "no communication (compute floor)",
    BASELINE: "DDP fp32, lion-pytorch",
    "ddp_fp32": "DDP fp32, our Lion",
    "ddp_bf16": "DDP bf16 hook, our Lion",
    "ddp_powersgd": "DDP PowerSGD rank 4, our Lion",
    "int8_vote": "naive int8 majority",
}
_CHOICES = (*ALGORITHMS, "auto")
OVERLAP = "_overlap"
# name of a LionCub method -> its algorithm
ALGORITHM_OF = {f"lioncub_{name}{suffix}": name for suffix in ("", OVERLAP) for name in _CHOICES}
TITLES = {
    **OTHERS,
    **{
        method: f"LionCub {algorithm}{', overlap' if method.endswith(OVERLAP) else ''}"
        for method, algorithm in ALGORITHM_OF.items()
    },
}
# a lab of one worker per host has one level
COMPARED = tuple(name for name in TITLES if ALGORITHM_OF.get(name) != "hierarchical")
TWO_LEVEL = (
    FLOOR,
    "ddp_fp32",
    *(name for name, algorithm in ALGORITHM_OF.items() if algorithm != "auto" and not name.endswith(OVERLAP)),
)
