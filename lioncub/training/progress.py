"""Progress on stderr: a live bar on a terminal, a line at each evaluation elsewhere."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lioncub.training.config import TrainConfig
from lioncub.training.log import StepRecord
from lioncub.training.loop import OnRecord


@contextlib.contextmanager
def shown_progress(config: TrainConfig, first_step: int) -> Iterator[OnRecord]:
    """Yields the function to be called with each record; `first_step` is the last step already done, or 0."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda record: _print_line(console, config, record)
        return
    columns = [
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as progress:
        tasks = {
            name: progress.add_task(name, total=config.steps, completed=first_step, losses="starting")
            for name in config.methods
        }
        validation = dict.fromkeys(config.methods, "")

        def on_record(record: StepRecord) -> None:
            if record.val_loss is not None:
                validation[record.method] = f" val {record.val_loss:.3f}"
            losses = f"loss {record.loss:.3f}{validation[record.method]}"
            progress.update(tasks[record.method], completed=record.step, losses=losses)

        yield on_record


def _print_line(console: Console, config: TrainConfig, record: StepRecord) -> None:
    if record.val_loss is not None:
        console.print(
            f"{record.method:>8}  step {record.step}/{config.steps}  loss {record.loss:.3f}"
            f"  val {record.val_loss:.3f}  {1e3 * record.step_seconds:.0f} ms",
            highlight=False,
        )
