"""``lioncub probe``."""

import argparse
import os
from pathlib import Path
from typing import Any

from lioncub.commands.common import check_new_files, end_on_sigterm, fail, need_extra, stored, torchrun_workers
from lioncub.training.config import UserError

DESCRIPTION = """\
Measure what each way of voting takes on a group of workers, for small and large messages, on all workers and on each
level of a group with several workers on several nodes. Workers are processes on this machine over Gloo; under torchrun
the command joins torchrun's group instead. Writes a profile for LionCub(profile=...) and lioncub plan --profile."""


def add_parser(commands: Any) -> None:
    """Add the command's flags; those that were not given are absent from the result."""
    parser = commands.add_parser(
        "probe",
        help="measure a group of workers, for the choice of algorithms",
        description=DESCRIPTION,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--workers", type=int, metavar="N", help="processes to start; under torchrun: WORLD_SIZE (default: 4)")
    add("--out", metavar="FILE", help="the profile, JSON (default: profile.json)")
    add("--plot", metavar="FILE", help="plot of measured against modelled times, PNG")
    add("--budget", type=float, metavar="S", help="seconds that the measurement may take, about (default: 15)")
    add("--timeout", type=float, metavar="S", help="seconds to wait for a silent worker (default: 60)")
    add("--overwrite", action="store_true", help="replace files that exist")


def run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Run the command; returns the exit code."""
    need_extra(parser, "probe")
    # here, since it needs the extra
    from lioncub.probing.job import ProbeJob
    from lioncub.probing.run import measure
    from lioncub.training.worker import WorkerFailedError

    joined = "WORLD_SIZE" in os.environ
    overwrite: bool = given.pop("overwrite", False)
    try:
        if joined:
            given["workers"] = torchrun_workers(given.get("workers"), os.environ)
        job = ProbeJob(**given)
    except UserError as error:
        parser.exit(2, f"lioncub probe: {error}\n")
    if not joined:
        # a worker of torchrun keeps the default, which ends it at once even in the middle of a collective
        end_on_sigterm("probe")
    try:
        if os.environ.get("RANK", "0") == "0" or not joined:
            check_new_files({"--out": job.out, "--plot": job.plot}, overwrite=overwrite)
        measure(job, joined=joined)
    except KeyboardInterrupt:
        return fail("probe", "interrupted", 130)
    except WorkerFailedError as error:
        return fail("probe", f"{error}{stored(error.traceback, Path(job.out).with_suffix('.error.txt'))}", 1)
    except (UserError, OSError) as error:
        return fail("probe", str(error), 1)
    return 0
