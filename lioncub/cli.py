"""The command line: ``lioncub train``, ``lioncub probe``, ``lioncub plan``."""

import argparse
import importlib.metadata
from collections.abc import Sequence

from lioncub.commands import plan, probe, train

COMMANDS = {"train": train.run, "probe": probe.run, "plan": plan.run}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 failed, 2 bad arguments, 130 interrupted, 143 terminated."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    return COMMANDS[given.pop("command")](parser, given)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="lioncub", description="Data-parallel training with one-bit Lion updates.")
    parser.add_argument("--version", action="version", version=f"lioncub {importlib.metadata.version('lioncub')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (train, probe, plan):
        command.add_parser(commands)
    return parser
