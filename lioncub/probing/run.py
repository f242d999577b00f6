"""A measurement from settings to report: what ``lioncub probe`` does once its flags are understood."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from lioncub.collectives.profile import Profile
from lioncub.probing.job import ProbeJob, Progress
from lioncub.probing.plots import write_plot
from lioncub.probing.report import print_report
from lioncub.training.config import UserError
from lioncub.training.launch import run_workers
from lioncub.training.worker import run_joined


def measure(job: ProbeJob, *, joined: bool) -> None:
    """Measure, then print the table and write the files.

    Raises:
        UserError: a file cannot be written.
        WorkerFailedError: a worker failed.
    """
    if joined and os.environ["RANK"] != "0":
        run_joined(job, lambda report: None)
        return
    found: list[Profile] = []
    with _shown_progress(job) as on_progress:

        def on_report(report: Progress | Profile) -> None:
            if isinstance(report, Profile):
                found.append(report)
            else:
                on_progress(report)

        if joined:
            run_joined(job, on_report)
        else:
            run_workers(job, on_report)
    (profile,) = found
    _write(profile, job)
    print_report(profile)
    print(f"written: {', '.join(filter(None, (job.out, job.plot)))}")


def _write(profile: Profile, job: ProbeJob) -> None:
    try:
        Path(job.out).write_text(profile.to_json(), encoding="utf-8")
        if job.plot is not None:
            write_plot(profile, Path(job.plot))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def _shown_progress(job: ProbeJob) -> Iterator[Callable[[Progress], None]]:
    """A live bar on a terminal; one line elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        told: list[Progress] = []

        def on_progress(progress: Progress) -> None:
            if not told:
                console.print(f"measuring {job.workers} workers for about {job.budget:g} s", highlight=False)
            told[:] = [progress]

        yield on_progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("measuring", total=1.0, what="starting")
        yield lambda progress: bar.update(task, completed=progress.fraction, what=progress.what)
