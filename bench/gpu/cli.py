"""``python bench/gpu prepare | run``: what `make gpu-bench` runs, on a machine that may have no network.

python bench/gpu prepare                        # here: fills build/gpu, which travels with the checkout
python bench/gpu run --stages speed --out DIR   # there; gpu.md, gpu.json and log.txt, written as it goes
python bench/gpu run --device cpu --out DIR     # a dry run of every stage, without meaning
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.driver import STAGES, run_stages


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 where a row failed, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    return int(options.command(options))


def _prepare(options: argparse.Namespace) -> int:
    from gpu.prepare import prepare

    return prepare()


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
    """One stage, in this process."""
    from gpu.workbench import Workbench

    bench = Workbench(options.name, options.out, options.device, options.seconds, options.only)
    importlib.import_module(f"gpu.{STAGES[options.name].module}").run(bench)
    return int(bench.failed > 0)


def _worker(options: argparse.Namespace) -> int:
    """One rank of the stage `dist`, which torch.distributed's variables name."""
    from gpu.dist import work

    return work(options.out, options.device, options.seconds, options.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python bench/gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="prepare | run")
    one = commands.add_parser("prepare", help="fill build/gpu with the package and what such a machine lacks")
    one.set_defaults(command=_prepare)
    others = {
        "run": (_run, "run stages, each in its own process"),
        "stage": (_stage, "one stage, as `run` starts it"),
        "worker": (_worker, "one rank of the stage dist, as it starts it"),
    }
    for name, (command, words) in others.items():
        one = commands.add_parser(name, help=words)
        one.set_defaults(command=command)
        one.add_argument("--device", default="cuda:0", help="cpu is a dry run (default: %(default)s)")
        one.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
        one.add_argument("--only", default="", help="measure rows whose name contains this")
        if name == "run":
            one.add_argument("--stages", default=",".join(STAGES), help="default: %(default)s")
        else:
            one.add_argument("name")
            one.add_argument("--seconds", type=float, default=60)
    return parser
