"""``lioncub plan``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lioncub.collectives.cost import Link
from lioncub.collectives.profile import Profile
from lioncub.commands.common import check_new_files, fail, need_extra
from lioncub.planning import units
from lioncub.training.config import UserError

if TYPE_CHECKING:
    from lioncub.planning.forecast import Cluster

DESCRIPTION = """\
Predict communication and step time of a cluster for every algorithm, and for fp32 and bf16 all-reduce, from the speed
of its links or from a profile that lioncub probe wrote. Nothing is measured and no group is needed."""


def add_parser(commands: Any) -> None:
    """Add the command's flags."""
    parser = commands.add_parser("plan", help="predict step times of a cluster", description=DESCRIPTION)
    add = parser.add_argument
    add("--params", type=_unit(units.parameters), required=True, metavar="N", help="parameters: 25M, 1.3B, 1.3e9")
    add("--nodes", type=int, required=True, metavar="N", help="number of nodes")
    add("--gpus-per-node", type=int, default=1, metavar="N", help="workers on each node (default: 1)")
    add("--inter", type=_unit(units.bandwidth), metavar="RATE", help="a node's link to the others: 10gbit")
    add("--intra", type=_unit(units.bandwidth), metavar="RATE", help="a worker's link inside its node: 400gbit")
    add("--latency-us", type=float, metavar="X", help="per message between nodes (default: 50)")
    add("--intra-latency-us", type=float, metavar="X", help="per message inside a node (default: 10)")
    add("--compute-ms", type=float, default=0.0, metavar="X", help="forward and backward pass of a step (default: 0)")
    add("--profile", metavar="FILE", help="take what --inter and --intra do not say from a profile")
    add("--plot", metavar="FILE", help="plot over 2 to 4096 workers, PNG")
    add("--json", metavar="FILE", help="all figures, JSON")
    add("--overwrite", action="store_true", help="replace files that exist")


def run(parser: argparse.ArgumentParser, given: dict[str, Any]) -> int:
    """Run the command; returns the exit code."""
    need_extra(parser, "plan")
    # here, since it needs the extra
    from rich.console import Console

    from lioncub.planning.forecast import forecast, over_worlds
    from lioncub.planning.plots import write_plot
    from lioncub.planning.report import build_table, notes, to_dict

    try:
        profile = None if given["profile"] is None else Profile.load(given["profile"])
        check_new_files({"--plot": given["plot"], "--json": given["json"]}, overwrite=given["overwrite"])
    except ValueError as error:
        return fail("plan", str(error), 1)
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
        return fail("plan", f"{error.filename}: cannot be written: {error.strerror}", 1)
    Console().print(build_table(cluster, rows))
    print(*notes(cluster), sep="\n")
    return 0


def cluster_of(given: dict[str, Any], profile: Profile | None) -> "Cluster":
    """The cluster that the flags describe; a profile's links stand in for flags that were not given.

    Raises:
        ValueError: a flag is missing, or its value out of range; UserError is one.
    """
    from lioncub.planning.forecast import Cluster

    measured: tuple[Link | None, Link | None] = (None, None) if profile is None else profile.links()
    inter = _link("inter", given["inter"], given["latency_us"], measured[0], 50.0, needed=True)
    intra = _link(
        "intra", given["intra"], given["intra_latency_us"], measured[1], 10.0, needed=given["gpus_per_node"] > 1
    )
    used = [link for link, name in zip(measured, ("inter", "intra"), strict=True) if link and given[name] is None]
    origin = f"implied by a profile of {profile.about}" if profile is not None and used else "as given"
    # measured points hold for the measured links alone
    stated = any(given[name] is not None for name in ("inter", "intra", "latency_us", "intra_latency_us"))
    points, compute_s = None if stated else profile, given["compute_ms"] / 1e3
    return Cluster(given["params"], given["nodes"], given["gpus_per_node"], inter, intra, compute_s, points, origin)


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
            raise UserError(f"--{name}: expected a bandwidth such as 10gbit, or a --profile that measured it, got none")
        # no message takes this link
        return Link()
    if latency_us is not None:
        if not 0 <= latency_us < float("inf"):
            flag = "--latency-us" if name == "inter" else "--intra-latency-us"
            raise UserError(f"{flag}: expected a number >= 0, got {latency_us:g}")
        latency_s = latency_us / 1e6
    else:
        latency_s = measured.latency_s if measured is not None else usual_us / 1e6
    if bytes_per_s is None:
        assert measured is not None
        bytes_per_s = measured.bytes_per_s
    return Link(latency_s, bytes_per_s)


def _unit(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type for argparse, which shows the text of no other error."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed
