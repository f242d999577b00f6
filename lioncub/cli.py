"""Command line: ``lioncub probe`` measures a group of workers, ``lioncub plan`` predicts a cluster."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lioncub.collectives.cost import Link
from lioncub.collectives.profile import Profile

if TYPE_CHECKING:
    from lioncub.plan import Cluster

EXTRA = ("matplotlib", "rich")
PROBE = """\
Measure every algorithm on a group of workers, for small and large messages, on all workers and on each level of a group
with several workers on several nodes: torchrun --nproc-per-node 4 -m lioncub probe. Writes a profile for
Comm(profile=...) and lioncub plan --profile."""
PLAN = """\
Predict communication and step time of a cluster for every algorithm, and for fp32 and bf16 all-reduce, from the speed
of its links or from a profile that lioncub probe wrote. Nothing is measured and no group is needed."""
_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done, 1 failed, 2 bad arguments, 130 interrupted, 143 terminated."""
    parser = build_parser()
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        parser.exit(2, f"lioncub {command}: {' and '.join(missing)} not found: pip install 'lioncub[cli]'\n")
    return {"probe": run_probe, "plan": run_plan}[command](parser, given)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of both commands."""
    parser = argparse.ArgumentParser(prog="lioncub", description="Data-parallel training with one-bit Lion updates.")
    parser.add_argument("--version", action="version", version=f"lioncub {importlib.metadata.version('lioncub')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    probe = commands.add_parser("probe", help="measure a group of workers", description=PROBE)
    add = probe.add_argument
    add("--out", default="profile.json", metavar="FILE", help="the profile, JSON (default: profile.json)")
    add("--plot", metavar="FILE", help="plot of measured against modelled times, PNG")
    add("--budget", type=_unit(seconds), default=15.0, metavar="S", help="about how long to measure (default: 15)")
    add("--timeout", type=_unit(seconds), default=60.0, metavar="S", help="wait for a silent rank (default: 60)")
    add("--overwrite", action="store_true", help="replace files that exist")
    plan = commands.add_parser("plan", help="predict step times of a cluster", description=PLAN)
    add = plan.add_argument
    add("--params", type=_unit(parameters), required=True, metavar="N", help="parameters: 25M, 1.3B, 1.3e9")
    add("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    add("--gpus-per-node", type=int, default=1, metavar="N", help="workers on each node (default: 1)")
    add("--inter", type=_unit(bandwidth), metavar="RATE", help="a node's link to the others: 10gbit")
    add("--intra", type=_unit(bandwidth), metavar="RATE", help="a worker's link inside its node: 400gbit")
    add("--latency-us", type=float, metavar="X", help="per message between nodes (default: 50)")
    add("--intra-latency-us", type=float, metavar="X", help="per message inside a node (default: 10)")
    add("--compute-ms", type=float, default=0.0, metavar="X", help="forward and backward pass of a step (default: 0)")
    add("--profile", metavar="FILE", help="take what --inter and --intra do not say from a profile")
    add("--plot", metavar="FILE", help="plot over 2 to 4096 workers, PNG")
    add("--json", metavar="FILE", help="all figures, JSON")
    add("--overwrite", action="store_true", help="replace files that exist")
    return parser


def run_probe(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Measure the group that torchrun has started, as one of its ranks; return the exit code."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        parser.exit(
            2,
            "lioncub probe: expected to be started by torchrun, as in torchrun --nproc-per-node 4 -m lioncub probe, "
            f"got no {', '.join(missing)} in the environment\n",
        )
    # here, since it is slow to import
    from lioncub.probe import work

    overwrite: bool = given.pop("overwrite")
    if os.environ["RANK"] == "0":
        try:
            check_new_files({"--out": given["out"], "--plot": given["plot"]}, overwrite=overwrite)
        except ValueError as error:
            return _fail("probe", str(error), 1)
    work(**given)
    return 0


def run_plan(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Predict a cluster; return the exit code."""
    # here, since it needs the extra
    from rich.console import Console

    from lioncub.plan import build_table, forecast, notes, over_worlds, to_dict, write_plot

    try:
        profile = None if given["profile"] is None else Profile.load(given["profile"])
        check_new_files({"--plot": given["plot"], "--json": given["json"]}, overwrite=given["overwrite"])
    except ValueError as error:
        return _fail("plan", str(error), 1)
    try:
        cluster = cluster_of(given, profile)
    except ValueError as error:
        parser.exit(2, f"lioncub plan: {error}\n")
    rows = forecast(cluster)
    try:
        if given["json"] is not None:
            text = json.dumps(to_dict(cluster, rows, over_worlds(cluster)), indent=2)
            Path(given["json"]).write_text(text + "\n", encoding="utf-8")
        if given["plot"] is not None:
            write_plot(cluster, over_worlds(cluster), Path(given["plot"]))
    except OSError as error:
        # an error while data is written has no name
        name = error.filename or " or ".join(filter(None, (given["json"], given["plot"])))
        return _fail("plan", f"{name}: cannot be written: {error.strerror}", 1)
    Console().print(build_table(cluster, rows))
    print(*notes(cluster), sep="\n")
    return 0


def cluster_of(given: dict[str, Any], profile: Profile | None) -> Cluster:
    """Return the cluster that the flags describe; a profile's links stand in for flags that were not given.

    Raises:
        ValueError: a flag is missing, or its value out of range.
    """
    from lioncub.plan import Cluster

    measured: tuple[Link | None, Link | None] = (None, None)
    if profile is not None:
        shape = profile.topology
        measured = (
            profile.inter if shape.n_nodes > 1 else None,
            profile.intra if shape.n_nodes < shape.workers else None,
        )
    inter = _link("inter", given["inter"], given["latency_us"], measured[0], 50.0, needed=True)
    intra = _link(
        "intra", given["intra"], given["intra_latency_us"], measured[1], 10.0, needed=given["gpus_per_node"] > 1
    )
    used = [link for link, name in zip(measured, ("inter", "intra"), strict=True) if link and given[name] is None]
    origin = f"fitted to a profile of {profile.about}" if profile is not None and used else "as given"
    compute_s = given["compute_ms"] / 1e3
    return Cluster(given["params"], given["nodes"], given["gpus_per_node"], inter, intra, compute_s, origin)


def _link(
    name: str,
    bytes_per_s: float | None,
    latency_us: float | None,
    measured: Link | None,
    usual_us: float,
    *,
    needed: bool,
) -> Link:
    if bytes_per_s is None and measured is None:
        if needed:
            raise ValueError(
                f"--{name}: expected a bandwidth such as 10gbit, or a --profile that measured it, got none"
            )
        # no message takes this link
        return Link()
    if latency_us is not None:
        if not 0 <= latency_us < float("inf"):
            flag = "--latency-us" if name == "inter" else "--intra-latency-us"
            raise ValueError(f"{flag}: expected a number >= 0, got {latency_us:g}")
        latency_s = latency_us / 1e6
    else:
        latency_s = measured.latency_s if measured is not None else usual_us / 1e6
    if bytes_per_s is None:
        assert measured is not None
        bytes_per_s = measured.bytes_per_s
    return Link(latency_s, bytes_per_s)


def check_new_files(files: Mapping[str, str | None], *, overwrite: bool) -> None:
    """Check that files, by their flags, can be written.

    Raises:
        ValueError: one exists and may not be replaced, or its folder is missing.
    """
    for flag, name in files.items():
        if name is not None and Path(name).exists() and not overwrite:
            raise ValueError(f"{flag} {name}: expected a new file, got one that exists; replace it with --overwrite")
        if name is not None and not Path(name).parent.is_dir():
            raise ValueError(
                f"{flag} {name}: expected a file in a folder that exists, got no folder {Path(name).parent}"
            )


def parameters(text: str) -> int:
    """Parse a number of parameters: ``1.3e9``, ``1.3B``, ``25M``, ``1000``. Raises ValueError for anything else."""
    count = _scaled(text, _COUNTS)
    if count is None or not math.isfinite(count) or count < 1 or count != round(count):
        raise ValueError(f"expected a whole number of parameters such as 25M, 1.3B or 1.3e9, got {text!r}")
    return round(count)


def bandwidth(text: str) -> float:
    """Parse ``100mbit`` or ``10gbit`` into bytes per second. Raises ValueError for anything else."""
    bits = _scaled(text, _BITS)
    if bits is None or not math.isfinite(bits) or bits <= 0:
        raise ValueError(f"expected a bandwidth such as 100mbit or 10gbit, got {text!r}")
    return bits / 8


def seconds(text: str) -> float:
    """Parse a number of seconds. Raises ValueError unless it is finite and > 0."""
    value = float(text)
    # written so that nan fails too
    if not 0 < value < math.inf:
        raise ValueError(f"expected a finite number of seconds > 0, got {text}")
    return value


def _scaled(text: str, units: dict[str, float]) -> float | None:
    found = re.fullmatch(_NUMBER + "([a-z]*)", text.strip().lower())
    if found is None or found[2] not in units:
        return None
    # rounded, since 1.3e9 may be written as 1.3 and a unit, whose product need not be whole
    return round(float(found[1]) * units[found[2]], 3)


def _unit(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``parse`` with errors whose text argparse shows."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _fail(command: str, message: str, code: int) -> int:
    print(f"lioncub {command}: {message}", file=sys.stderr)
    return code
