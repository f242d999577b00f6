"""Other tile shapes, which the report compares with those that are launched."""

from __future__ import annotations

from dataclasses import replace

from gpu_report.variants import Variant

LABELS = ("encode a list", "apply with momentum", "step", "vote")
DTYPES = ("fp32", "bf16", "codes")
TARGETS = ("sm_80", "sm_90", "gfx942")
# factors of the elements and of the threads
SHAPES = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (0.5, 0.5))


def trials_of(variant: Variant) -> list[Variant]:
    """The variant in each shape; none where it is not compared."""
    if variant.label not in LABELS or variant.dtype not in DTYPES:
        return []
    block = variant.constants["BLOCK_SIZE"]
    assert isinstance(block, int)
    found = []
    for more, wider in SHAPES:
        constants = {**variant.constants, "BLOCK_SIZE": round(more * block)}
        shape = {"elements": round(more * variant.elements), "threads": round(wider * variant.threads)}
        found.append(replace(variant, constants=constants, **shape))
    return found
