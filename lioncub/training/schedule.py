"""When what happens: the learning rate of each step and the blocks in which the methods take turns."""

import math
from typing import NamedTuple


def learning_rate(step: int, *, steps: int, peak: float, warmup: int) -> float:
    """Rate of step 1..steps: linear warm-up over `warmup` steps, then a cosine down to a tenth of `peak`."""
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.55 + 0.45 * math.cos(math.pi * progress))


class Turn(NamedTuple):
    """Every method trains steps first..last (both included), in the order given."""

    first: int
    last: int
    methods: tuple[str, ...]


def turns(methods: tuple[str, ...], *, steps: int, block: int, checkpoint_every: int) -> list[Turn]:
    """Blocks of `block` steps, cut also where a checkpoint is due, so that all methods then stand at one step.

    The order turns round in every second block: a machine that slowly gets busier favours no method.
    """
    checkpoints = range(checkpoint_every, steps, checkpoint_every) if checkpoint_every else range(0)
    ends = sorted({*range(block, steps, block), *checkpoints, steps})
    starts = [0, *ends[:-1]]
    return [
        Turn(start + 1, end, methods if index % 2 == 0 else methods[::-1])
        for index, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]


def is_due(step: int, *, every: int, steps: int) -> bool:
    """True at each multiple of `every` (0: none) and at the last step."""
    return step == steps or (every > 0 and step % every == 0)
