"""The table of a profile."""

from rich import box
from rich.console import Console
from rich.table import Table

from lioncub.collectives.profile import Profile

EXPLANATION = """\
time = alpha + beta * bytes sent by each worker; bandwidth = 1 / beta. error: root mean square of the relative
errors of that line at the measured points. Predictions for this group are read off the points themselves."""
LEVELS = """\
whole: all workers; intra: those of each node, all nodes at once; inter: those with the same place on every
node, all places at once."""


def build_table(profile: Profile) -> Table:
    """alpha, beta, bandwidth and fit error by level and algorithm."""
    table = Table(title=profile.about, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("level", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    for title in ("alpha\nms", "beta\nns/byte", "bandwidth\nMb/s", "\nerror", "\nmessages"):
        table.add_column(title, justify="right", no_wrap=True)
    for fit in profile.fits:
        beta = fit.beta_s_per_byte
        table.add_row(
            fit.level,
            fit.algorithm,
            f"{1e3 * fit.alpha_s:,.2f}",
            f"{1e9 * beta:,.2f}",
            f"{8e-6 / beta:,.0f}" if beta > 0 else "unknown",
            f"{100 * fit.error:.0f}%",
            f"{size(fit.points[0].n_bytes)} to {size(fit.points[-1].n_bytes)}",
        )
    return table


def size(n_bytes: int) -> str:
    """Bytes in binary units."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:g} {unit}"
    return f"{n_bytes} B"


def print_report(profile: Profile) -> None:
    """Print the table to stdout, and what it means."""
    Console().print(build_table(profile))
    print(EXPLANATION)
    if profile.topology.is_two_level:
        print(LEVELS)
