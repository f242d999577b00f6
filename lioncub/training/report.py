"""The final table."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lioncub.training.config import TrainConfig
from lioncub.training.summary import LAST_STEPS, Summary
from lioncub.training.wire_time import NETWORKS

SUMMARY_NAME = "summary.json"
TITLES = {"lion": "lion\n(DDP, fp32)", "lioncub": "lioncub\n(1-bit votes)"}
CAPTION = """\
Medians over steps, means over {workers} workers sharing this machine. Communication of lion: from the moment a \
bucket of gradients is ready until its sum has arrived, by a communication hook that otherwise does what DDP does; \
"waited for" is what remains of it once the last bucket is ready. Bytes of lion: computed for a ring all-reduce, \
2(N-1)/N x 4 bytes per parameter; of lioncub: counted, headers included.
Computed step times: measured computation plus bytes / bandwidth, no latency. lion is credited with perfect overlap: \
forward + max(backward, wire) + optimizer; lioncub with none: forward + backward + wire + optimizer."""


@dataclasses.dataclass(frozen=True)
class _Row:
    label: str
    value: Callable[[Summary], float]
    text: Callable[[float], str]
    ratio: bool = True


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"


def _bytes(count: float) -> str:
    return f"{count:,.0f}"


def _loss(value: float) -> str:
    return f"{value:.3f}"


def _computed(network: str) -> Callable[[Summary], float]:
    return lambda summary: summary.computed_step_seconds[network]


MEASURED = (
    _Row(f"train loss, last {LAST_STEPS} steps (nats/byte)", lambda s: s.train_loss, _loss, ratio=False),
    _Row("validation loss, final (nats/byte)", lambda s: s.val_loss, _loss, ratio=False),
    _Row("step", lambda s: s.step_seconds, _milliseconds),
    _Row("  forward + backward", lambda s: s.forward_seconds + s.backward_seconds, _milliseconds),
    _Row("  optimizer", lambda s: s.optimizer_seconds, _milliseconds),
    _Row("  communication", lambda s: s.communication_seconds, _milliseconds),
    _Row("  communication waited for", lambda s: s.exposed_seconds, _milliseconds),
    _Row("bytes sent per worker and step", lambda s: s.bytes_sent, _bytes),
)
COMPUTED = tuple(_Row(f"computed step at {network}", _computed(network), _milliseconds) for network in NETWORKS)


def build_table(summaries: Sequence[Summary], config: TrainConfig, parameters: int) -> Table:
    """The table of all methods; a ratio lion / lioncub where both are there."""
    table = Table(
        title=f"GPT with {parameters:,} parameters, workers: {config.workers}, steps: {summaries[0].steps}",
        caption=CAPTION.format(workers=config.workers),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for summary in summaries:
        table.add_column(TITLES[summary.method], justify="right")
    by_method = {summary.method: summary for summary in summaries}
    compared = len(by_method) == 2
    if compared:
        table.add_column("lion /\nlioncub", justify="right")
    for section in (MEASURED, COMPUTED):
        for row in section:
            cells = [row.text(row.value(summary)) for summary in summaries]
            if compared:
                cells.append(_ratio(row, by_method["lion"], by_method["lioncub"]))
            table.add_row(row.label, *cells)
        table.add_section()
    return table


def _ratio(row: _Row, lion: Summary, lioncub: Summary) -> str:
    if not row.ratio:
        return ""
    denominator = row.value(lioncub)
    return f"{row.value(lion) / denominator:.2f}x" if denominator > 0 else ""


def print_report(summaries: Sequence[Summary], config: TrainConfig, parameters: int) -> None:
    """Print the table to stdout, and store its figures as summary.json in the run's folder."""
    path = Path(config.out) / SUMMARY_NAME
    path.write_text(json.dumps([dataclasses.asdict(summary) for summary in summaries], indent=2) + "\n")
    Console().print(build_table(summaries, config, parameters))
