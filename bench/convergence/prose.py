"""The words between the tables of docs/study.md."""

from convergence.results import FACTORS, LR_SEEDS
from convergence.stages import LIMIT, SCREEN_SEEDS

INTRODUCTION = [
    "# What compression costs in loss",
    "",
    "Written by `make study`. Reference: plain Lion on gradients averaged in fp32. Every other method is run on the",
    "same batches from the same start, seed by seed; each simulated worker has its own gradients and momentum.",
    "",
]
CLAIMS = [
    "## Claims, and what the runs say",
    "",
    "Intervals are Student's t, 95 %, over paired seeds. A verdict holds for its cell; several cells are not corrected",
    "for being several: of twenty true nulls, one interval excludes 0. Deciding runs got more seeds, six at a time,",
    "until the interval told, which makes intervals a little too narrow.",
    "",
]
LOSSES = [
    "## Final validation loss",
    "",
    "Nats, after the last step. Without an interval: one seed. Bytes are one worker's in a step, headers and momentum",
    "included, against a ring all-reduce of fp32; these models are so small that headers count.",
    f"Methods that the screen alone has tried have {SCREEN_SEEDS} seeds: too few to tell them apart.",
    "",
]
SHARES = [
    "## What synchronization wins back",
    "",
    "The share of the loss that unsynchronized votes lose against Lion which a method recovers; bootstrap over paired",
    "seeds. Only where something is lost for certain.",
    "",
]
RATES = [
    "## Learning rates",
    "",
    f"Tried: {', '.join(f'{factor:.2g}' for factor in FACTORS)} times a default, on equal shards with "
    f"{' and '.join(f'{workers} workers ({seeds} seeds)' for workers, seeds in LR_SEEDS.items())}. A method with",
    "momentum synchronization takes that of its votes. Unless another is better by more than a standard error, it is",
    "the same multiple as the reference's. At the edge, a better one may lie outside.",
    "",
]
DIAGNOSTICS = [
    "## What happened on the way",
    "",
    "In the middle of the runs. Agrees with Lion: elements that moved as the sign of the update that the mean momentum",
    "and mean gradient give; drift: variance of momentum over workers relative to its mean square, mean over kinds of",
    "layers.",
    "",
]
LIMITS = [
    "## What this cannot tell",
    "",
    "Models of some ten thousand to a hundred thousand parameters and a few hundred steps: no word on large ones or",
    f"long runs. {LIMIT:.0%} is the difference that the deciding runs were to resolve.",
    "",
    "Processors differ in the last bits of a convolution, so a run repeats bit for bit on its own machine only. Runs",
    "of other code that a date names were made on another machine, and kept by their losses, curves and bytes; what",
    "happened on the way is the mean over the runs of their method, and their hours are estimated shares.",
    "",
]
