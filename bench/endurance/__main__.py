"""Endurance: random schedules, ends of processes at random moments, many constructions; counts, and exit code 1 if any
replica diverges, a rank hangs past the timeout, a process is left behind, or threads, descriptors or memory leak.

    python bench/endurance --minutes 20 --seed 0
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# started by its folder's name, which puts the folder itself on the path instead of the one that holds the package
sys.path[0] = str(Path(__file__).parents[1])

from endurance.ends import end_trials  # noqa: E402
from endurance.leaks import construct_often  # noqa: E402
from endurance.schedule import run_schedules  # noqa: E402

# of the time that is given, to schedules
_SHARE = 0.6


def main() -> int:
    """Run all parts; return the exit code."""
    parser = argparse.ArgumentParser(prog="endurance", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="time for all parts (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--trials", type=int, default=60, help="ends of processes (default: 60)")
    parser.add_argument("--constructions", type=int, default=200, help="for leaks (default: 200)")
    given = parser.parse_args()
    began = time.monotonic()
    parts = (
        ("schedules", lambda: run_schedules(given.seed, 60 * given.minutes * _SHARE)),
        ("ends", lambda: end_trials(given.seed, given.trials)),
        ("leaks", lambda: construct_often(given.constructions)),
    )
    failures = []
    for name, part in parts:
        counts, wrong = part()
        print(f"{name}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}", flush=True)
        failures += [f"{name}: {text}" for text in wrong]
    for text in failures:
        print(f"FAILED {text}", file=sys.stderr)
    print(f"{len(failures)} failures in {(time.monotonic() - began) / 60:.1f} minutes")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
