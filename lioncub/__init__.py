"""lioncub: data-parallel training with one-bit Lion updates (Lion Cub, arXiv 2411.16462)."""

from lioncub import simulate
from lioncub.collectives import PeerLostError, WorkersDisagreeError
from lioncub.compression import BySize, Quantized, SignMean, SignVote, TernaryVote
from lioncub.config import Comm, Precision
from lioncub.control import NonFiniteError
from lioncub.ddp import keep_gradients_local, keep_gradients_local_once_wrapped, local_gradients_hook
from lioncub.lion import Lion
from lioncub.momentum_sync import MomentumSync
from lioncub.optimizer import LionCub
from lioncub.replicas import broadcast_module
from lioncub.stats import BucketStats, Stats
from lioncub.transaction import PendingStep

__version__ = "0.1.0"

__all__ = [
    "BucketStats",
    "BySize",
    "Comm",
    "Lion",
    "LionCub",
    "MomentumSync",
    "NonFiniteError",
    "PeerLostError",
    "PendingStep",
    "Precision",
    "Quantized",
    "SignMean",
    "SignVote",
    "Stats",
    "TernaryVote",
    "WorkersDisagreeError",
    "__version__",
    "broadcast_module",
    "keep_gradients_local",
    "keep_gradients_local_once_wrapped",
    "local_gradients_hook",
    "simulate",
]
