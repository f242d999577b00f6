"""The plot of a profile: measured times as points, modelled ones as lines."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lioncub.collectives.profile import Fit, Profile
from lioncub.probing.report import size

COLOURS = {"all_gather": "#1a66b0", "reduce_scatter": "#c2571a", "hierarchical": "#2c8a4b", "all_reduce": "#7a4fa3"}
TITLES = {"whole": "all workers", "intra": "inside each node", "inter": "between nodes"}


def write_plot(profile: Profile, path: Path) -> None:
    """Write a PNG with a panel for each level that was measured."""
    levels = [level for level in TITLES if any(fit.level == level for fit in profile.fits)]
    # a Figure of its own draws with Agg, without a display and without pyplot's global state
    figure = Figure(figsize=(1.2 + 5.4 * len(levels), 4.4), layout="constrained")
    figure.suptitle(f"Time of one vote: {profile.about}", fontsize=11)
    panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
    for axes, level in zip(panels, levels, strict=True):
        _draw(axes, [fit for fit in profile.fits if fit.level == level], TITLES[level])
    panels[0].set_ylabel("time of one vote (ms, log scale)")
    figure.savefig(path, dpi=150, format="png")


def _draw(axes: Axes, fits: list[Fit], title: str) -> None:
    for fit in fits:
        sizes, colour = [point.n_bytes for point in fit.points], COLOURS[fit.algorithm]
        measured = [1e3 * point.seconds for point in fit.points]
        # a line is straight in bytes, and so bent on log axes: steps between the points show how
        first, last = fit.points[0], fit.points[-1]
        per_byte = (last.bytes_sent - first.bytes_sent) / max(last.n_bytes - first.n_bytes, 1)
        ratio = last.n_bytes / first.n_bytes
        dense = [first.n_bytes * ratio ** (i / 100) for i in range(101)]
        sent = [first.bytes_sent + per_byte * (n - first.n_bytes) for n in dense]
        modelled = [1e3 * (fit.alpha_s + fit.beta_s_per_byte * count) for count in sent]
        axes.plot(dense, modelled, color=colour, linewidth=1.4, label=f"{fit.algorithm}: alpha + beta x bytes")
        axes.plot(sizes, measured, color=colour, linestyle="none", marker="o", markersize=5)
    axes.plot([], [], color="#555555", linestyle="none", marker="o", markersize=5, label="measured (medians)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([point.n_bytes for point in max(fits, key=lambda fit: len(fit.points)).points])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(round(value))))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelrotation=35, labelsize=8)
    axes.set_xlabel("packed message (one bit per parameter)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
