"""Markdown tables from the JSON of pytest-benchmark: ``python bench/report.py RUN.json docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

STREAM_BYTES = 12

# title, percent of the stream's bandwidth asked for
KERNELS = {
    "test_lion_encode": ("lion_encode", 85),
    "test_lion_encode_": ("lion_encode_", 85),
    "test_majority_vote": ("majority_vote, 8 voters", 50),
    "test_majority_vote_counts": ("majority_vote, 8 voters, with counts", None),
    "test_apply_votes_": ("apply_votes_", 85),
    "test_apply_votes_with_momentum_": ("apply_votes_ with momentum", 85),
    "test_lion_step_": ("lion_step_", 85),
}
BASELINES = {"test_stream": "stream: a += s*b in place", "test_read": "read two arrays, write nothing"}
PEERS = {
    "test_torch_encode": ("test_lion_encode", "plain torch ops"),
    "test_reference_encode": ("test_lion_encode", 'impl="reference"'),
    "test_numpy_vote": ("test_majority_vote", "numpy unpackbits, sum, packbits"),
    "test_torch_apply": ("test_apply_votes_", "plain torch ops"),
    "test_lion_pytorch_step": ("test_lion_step_", "lion-pytorch Lion"),
    "test_foreach_lion_step": ("test_lion_step_", "torch._foreach Lion"),
}


class Timing(NamedTuple):
    """One benchmark: median time of its rounds, and median of its times divided by the stream's of the same round."""

    seconds: float
    streams: float
    bytes_per_element: float
    elements: int

    @property
    def gigabytes_per_second(self) -> float:
        return self.bytes_per_element * self.elements / self.seconds / 1e9

    @property
    def percent_of_stream(self) -> float:
        return 100 * self.bytes_per_element / STREAM_BYTES / self.streams


def read_timings(run: dict[str, Any]) -> dict[str, Timing]:
    """Timings by test name."""
    timings = {}
    for entry in run["benchmarks"]:
        seconds, info = entry["stats"]["data"], entry["extra_info"]
        ratios = [op / stream for op, stream in zip(seconds, info["stream_seconds"], strict=True)]
        timings[entry["name"]] = Timing(median(seconds), median(ratios), info["bytes_per_element"], info["elements"])
    return timings


def bandwidth_table(timings: dict[str, Timing]) -> list[str]:
    rows = [
        "| kernel | bytes per element | ms | GB/s | % of stream | asked for |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    titles = {name: (title, None) for name, title in BASELINES.items()} | KERNELS
    for name, (title, target) in titles.items():
        timing = timings[name]
        asked = f">= {target} %" if target else ""
        rows.append(
            f"| {title} | {timing.bytes_per_element:g} | {1e3 * timing.seconds:.2f} "
            f"| {timing.gigabytes_per_second:.1f} | {timing.percent_of_stream:.0f} % | {asked} |"
        )
    return rows


def peer_table(timings: dict[str, Timing]) -> list[str]:
    rows = ["| kernel | ms | instead of | ms | times faster |", "|---|---:|---|---:|---:|"]
    for peer, (name, title) in PEERS.items():
        ours, theirs = timings[name], timings[peer]
        rows.append(
            f"| {KERNELS[name][0]} | {1e3 * ours.seconds:.2f} | {title} | {1e3 * theirs.seconds:.1f} "
            f"| {theirs.streams / ours.streams:.1f} |"
        )
    return rows


def report(run: dict[str, Any]) -> str:
    """The whole document."""
    timings = read_timings(run)
    info = run["benchmarks"][0]["extra_info"]
    machine = dict(info["machine"])
    cpu, cores, python = machine.pop("cpu"), machine.pop("cores"), machine.pop("python")
    packages = ", ".join(f"{name} {number}" for name, number in machine.items())
    lines = [
        "# Benchmarks of the CPU kernels",
        "",
        "Written by `make bench`. One thread, "
        f"{info['elements']:,} float32 elements, {cpu}, {cores} cores; Python {python}, {packages}; "
        f"{run['datetime'][:10]}.",
        "",
        "Every round of a kernel is preceded by one of the stream, so that both see the same machine. ms is the median",
        "of the rounds, in CPU time of the thread; the percentage is the median, over rounds, of the bandwidth (bytes",
        "that must be moved, divided by time) relative to the stream's of the same round. Both start with caches",
        "full of unrelated, unmodified data.",
        "",
        *bandwidth_table(timings),
        "",
        "`lion_encode` only reads, but for one bit per element. The second line, the fastest such loop found without",
        "software prefetching, shows what that costs: a core that only reads moves fewer bytes per second.",
        "",
        "## Against other ways to do the same",
        "",
        "Ratios of medians, each relative to the stream of its own rounds.",
        "",
        *peer_table(timings),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="file written by pytest --benchmark-json")
    parser.add_argument("document", type=Path, help="Markdown file to write")
    arguments = parser.parse_args()
    text = report(json.loads(arguments.run.read_text()))
    arguments.document.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
