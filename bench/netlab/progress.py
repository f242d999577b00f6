"""Progress on stderr with the time that remains: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

# elsewhere than on a terminal, a line at most this often
LINE_SECONDS = 20.0


class Pace:
    """Remaining time from estimates, corrected by how the estimates have fared so far."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0

    def remaining(self, elapsed: float) -> float:
        """Seconds; the estimates are believed for the first tenth."""
        factor = elapsed / self.done if self.done > self.total / 10 else 1.0
        return max(self.total - self.done, 0.0) * factor


def clock_text(seconds: float) -> str:
    """75 -> "1:15"."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


@contextmanager
def shown_progress(total: float) -> Iterator[Callable[[float, str], None]]:
    """Yields what is to be called with the estimated seconds of what is done, and what comes now ("": the same)."""
    console, pace, begin = Console(stderr=True), Pace(total), time.monotonic()
    if not console.is_terminal:
        yield _line_writer(console, pace, begin)
        return
    left = TextColumn("{task.fields[left]} left")
    with Progress(
        BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), left, TextColumn("{task.description}"), console=console
    ) as bar:
        task = bar.add_task("starting", total=total, left=clock_text(total))

        def show(seconds: float, what: str) -> None:
            pace.done += seconds
            text = clock_text(pace.remaining(time.monotonic() - begin))
            bar.update(task, completed=min(pace.done, total), left=text, description=what or None)

        yield show


def _line_writer(console: Console, pace: Pace, begin: float) -> Callable[[float, str], None]:
    last = -LINE_SECONDS

    def write(seconds: float, what: str) -> None:
        nonlocal last
        pace.done += seconds
        elapsed = time.monotonic() - begin
        if what and elapsed - last >= LINE_SECONDS:
            last = elapsed
            console.print(
                f"{clock_text(elapsed)} gone, {clock_text(pace.remaining(elapsed))} left  {what}", highlight=False
            )

    return write
