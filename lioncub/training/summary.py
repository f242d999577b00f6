"""From a run's records to the figures of its final table. Pure functions."""

import dataclasses
from collections.abc import Sequence
from statistics import fmean, median

from lioncub.training.log import StepRecord
from lioncub.training.wire_time import NETWORKS, overlapped_step_seconds, sequential_step_seconds, wire_seconds

# the training loss of a single step is noisy
LAST_STEPS = 20


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one method: losses in nats per byte, medians over steps in seconds, bytes per worker and step.

    `computed_step_seconds` maps a network's name to the step time it would allow: computed, not measured.
    """

    method: str
    steps: int
    train_loss: float
    val_loss: float
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    communication_seconds: float
    exposed_seconds: float
    optimizer_seconds: float
    bytes_sent: float
    computed_step_seconds: dict[str, float]


def summarize(records: Sequence[StepRecord], method: str) -> Summary:
    """Figures of `method`, of which there must be at least one record."""
    own = [record for record in records if record.method == method]
    val_losses = [record.val_loss for record in own if record.val_loss is not None]
    forward = median(record.forward_seconds for record in own)
    backward = median(record.backward_seconds for record in own)
    optimizer = median(record.optimizer_seconds for record in own)
    bytes_sent = median(record.bytes_sent for record in own)
    step_time = overlapped_step_seconds if method == "lion" else sequential_step_seconds
    computed = {
        network: step_time(
            forward=forward, backward=backward, optimizer=optimizer, wire=wire_seconds(bytes_sent, speed)
        )
        for network, speed in NETWORKS.items()
    }
    return Summary(
        method=method,
        steps=own[-1].step,
        train_loss=fmean(record.loss for record in own[-LAST_STEPS:]),
        val_loss=val_losses[-1] if val_losses else float("nan"),
        step_seconds=median(record.step_seconds for record in own),
        forward_seconds=forward,
        backward_seconds=backward,
        communication_seconds=median(record.communication_seconds for record in own),
        exposed_seconds=median(record.exposed_seconds for record in own),
        optimizer_seconds=optimizer,
        bytes_sent=bytes_sent,
        computed_step_seconds=computed,
    )
