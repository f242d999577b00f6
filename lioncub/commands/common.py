"""What the commands share: the extra that they need, torchrun's environment, ends."""

import argparse
import importlib.util
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lioncub.training.config import UserError

EXTRA = ("matplotlib", "rich")


def need_extra(parser: argparse.ArgumentParser, command: str) -> None:
    """Exit with code 2 where the packages that tables and plots are made with are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(2, f"lioncub {command}: {' and '.join(missing)} not found: pip install 'lioncub[train]'\n")


def fail(command: str, message: str, code: int) -> int:
    """Say why the command ends; returns the exit code."""
    print(f"lioncub {command}: {message}", file=sys.stderr)
    return code


def stored(traceback: str, path: Path) -> str:
    """Store the traceback of a worker; where it now is, in words, and nothing where there is none."""
    if not traceback:
        return ""
    try:
        path.write_text(traceback, encoding="utf-8")
    except OSError as error:
        return f" (its traceback could not be stored: {error})"
    return f" (traceback in {path})"


def check_new_files(files: Mapping[str, str | None], *, overwrite: bool) -> None:
    """Check that files, by their flags, can be written.

    Raises:
        UserError: one exists and may not be replaced, or its folder is missing.
    """
    for flag, name in files.items():
        if name is not None and Path(name).exists() and not overwrite:
            raise UserError(f"{flag} {name}: expected a new file, got one that exists; replace it with --overwrite")
        if name is not None and not Path(name).parent.is_dir():
            raise UserError(
                f"{flag} {name}: expected a file in a folder that exists, got no folder {Path(name).parent}"
            )


def end_on_sigterm(command: str) -> None:
    """End by SystemExit(143) on SIGTERM."""

    def terminated(number: int, frame: FrameType | None) -> NoReturn:
        # an exception, so that the workers are ended on the way out
        print(f"lioncub {command}: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminated)


def torchrun_workers(workers: int | None, environment: Mapping[str, str]) -> int:
    """The size of the group that torchrun started; `workers` is what the user asked for.

    Raises:
        UserError: the environment is not torchrun's, or `workers` contradicts it.
    """
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise UserError(f"WORLD_SIZE is set, as torchrun does, but not {', '.join(missing)}")
    try:
        world_size = int(environment["WORLD_SIZE"])
    except ValueError:
        raise UserError(f"WORLD_SIZE: expected an integer, got {environment['WORLD_SIZE']!r}") from None
    if workers not in (None, world_size):
        raise UserError(f"--workers: expected {world_size}, which WORLD_SIZE says, or no --workers, got {workers}")
    return world_size
