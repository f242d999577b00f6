"""``python bench/gpu prepare | run``: `make gpu-bench` runs the second, on a machine that may have no network.

python bench/gpu prepare                        # here: fills build/gpu, which is copied with the checkout
python bench/gpu run --stages speed --out DIR   # there; gpu.md, gpu.jsonl and log.txt, written as it goes
python bench/gpu run --device cpu --out DIR     # a dry run of every stage, without meaning
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.driver import STAGES, run_stages
from gpu.prepare import prepare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 where a row failed, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _run(options: argparse.Namespace) -> int:
    names = options.stages.split(",")
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"gpu: --stages: expected some of {', '.join(STAGES)}, got {unknown[0]!r}", file=sys.stderr)
        return 2
    if options.device != "cpu":
        import torch

        if not torch.cuda.is_available():
            print(f"gpu: --device: expected a GPU for {options.device}, got none; cpu is a dry run", file=sys.stderr)
            return 2
    return run_stages(names, options.out.absolute(), options.device, options.only)


def _stage(options: argparse.Namespace) -> int:
    """Run stages in this process."""
    from gpu.workbench import Workbench

    failed = 0
    for name in options.names:
        bench = Workbench(name, options.out, options.device, options.seconds, options.only)
        pkgutil.resolve_name(f"gpu.{STAGES[name].function}")(bench)
        failed += bench.failed
    return int(failed > 0)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python bench/gpu", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="prepare | run")
    one = commands.add_parser("prepare", help="fill build/gpu with the package and what such a machine lacks")
    one.set_defaults(command=lambda options: prepare())
    run = commands.add_parser("run", help="run stages, each in its own process")
    run.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
    stage = commands.add_parser("stage", help="stages in one process, as `run` starts each")
    stage.add_argument("names", nargs="+", choices=STAGES, metavar="NAME")
    stage.add_argument("--seconds", type=float, default=60)
    for one, command in ((run, _run), (stage, _stage)):
        one.set_defaults(command=command)
        one.add_argument("--device", default="cuda:0", help="cpu is a dry run (default: %(default)s)")
        one.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
        one.add_argument("--only", default="", metavar="PATTERN", help="measure rows whose name it matches")
    return parser
