"""lioncub: data-parallel training with one-bit Lion updates (Lion Cub, arXiv 2411.16462)."""

from lioncub.collectives import WorkersDisagreeError
from lioncub.ddp import keep_gradients_local
from lioncub.lion import Lion
from lioncub.optimizer import LionCub
from lioncub.replicas import broadcast_module
from lioncub.stats import BucketStats, Stats
from lioncub.voting import NonFiniteError

__version__ = "0.1.0"

__all__ = [
    "BucketStats",
    "Lion",
    "LionCub",
    "NonFiniteError",
    "Stats",
    "WorkersDisagreeError",
    "__version__",
    "broadcast_module",
    "keep_gradients_local",
]
