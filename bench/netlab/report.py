"""Tables and picture of docs/results.md, from the turns of a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from reporting.pages import (
    OURS,
    OURS_TOO,
    PAGE,
    PEERS,
    insert,
    machine_line,
    markdown_table,
    median_ratio,
    write_results,
)
from reporting.records import Record, RecordsError, write_records

from netlab.cells import medians_of
from netlab.lab import rate_name
from netlab.worker import MEMORY, parse_method

BASELINE = "ddp_fp32_lion_pytorch"
SHARDS_BASELINE = "hsdp_fp32"
TITLES = {
    "no_communication": "no communication",
    BASELINE: "DDP fp32, lion-pytorch",
    "ddp_fp32": "DDP fp32, `lioncub.Lion`",
    "ddp_bf16": "DDP bf16 hook",
    "ddp_powersgd": "DDP PowerSGD, rank 4",
    "fsdp_no_communication": "FSDP2, Lion, nothing between hosts",
    "hsdp_fp32": "HSDP fp32, Lion",
    "hsdp_bf16": "HSDP bf16, Lion",
    "hsdp_fp32_adamw": "HSDP fp32, AdamW",
}


def write_report(records: Sequence[Record], folder: Path, page: Path = PAGE) -> None:
    """Write network.jsonl and network.png into ``folder`` and the tables into ``page``.

    Raises RecordsError where the cells of 4 workers with 10 M parameters are missing.
    """
    turns = [record for record in records if record["kind"] == "turn"]
    first = [turn for turn in turns if (turn["workers"], turn["per_host"], turn["model"]) == (4, 1, "10M")]
    rates = sorted({turn["rate"] for turn in first})
    if not first or any(not of(first, rate, BASELINE) for rate in rates):
        raise RecordsError(f"expected turns of 4 workers, 10M, with {BASELINE}, got {len(first)}")
    tables = [machine_line(records[0]), step_table(first, rates), speedup_table(turns)]
    methods = [method for method in dict.fromkeys(turn["method"] for turn in first) if method != BASELINE]
    panels = []
    for rate in rates:
        ratios = {method: speedup(first, rate, method) for method in methods}
        bars = [(title_of(name).replace("`", ""), ratio, color_of(name)) for name, ratio in ratios.items() if ratio]
        panels.append((f"times as fast as DDP fp32, {rate_name(rate)}", bars))
    text = "\n\n".join(table for table in tables if table)
    write_results("network", records, text, panels, height=3.4, folder=folder, page=page)


def write_shards_report(records: Sequence[Record], folder: Path, page: Path = PAGE) -> None:
    """Write network_shards.jsonl into ``folder`` and its table into ``page``.

    Raises RecordsError where turns of HSDP in fp32 are missing.
    """
    turns = [record for record in records if record["kind"] == "turn"]
    rates = sorted({turn["rate"] for turn in turns})
    if not turns or any(not of(turns, rate, SHARDS_BASELINE) for rate in rates):
        raise RecordsError(f"expected turns with {SHARDS_BASELINE}, got {len(turns)}")
    write_records(folder / "network_shards.jsonl", records)
    insert(page, "network shards", f"{machine_line(records[0])}\n\n{shards_table(turns, rates)}")


def shards_table(turns: Sequence[Record], rates: Sequence[int]) -> str:
    """Tabulate time, speedup, bytes between hosts and memory by model and method.

    Bytes are those that a host sends: counted at its link, and stated by LionCub. Those of memory are by parameter.
    """
    rows = []
    for model, method in dict.fromkeys((turn["model"], turn["method"]) for turn in turns):
        cell = [turn for turn in turns if turn["model"] == model]
        times = [milliseconds(of(cell, rate, method)) for rate in rates]
        ratios = [speedup(cell, rate, method, SHARDS_BASELINE) for rate in rates]
        mine, base = ([turn for turn in cell if turn["method"] == name] for name in (method, SHARDS_BASELINE))
        sent, full = (median(turn["sent"] for turn in found) for found in (mine, base))
        stated = [turn["stated"] * turn["per_host"] for turn in mine if "stated" in turn]
        fewer = "" if method == "fsdp_no_communication" else f"{full / sent:.1f}"
        bytes_sent = (f"{sent / 1e6:.3f}", f"{median(stated) / 1e6:.3f}" if stated else "", fewer)
        sizes = mine[-1]["memory"]
        kinds = [f"{sizes[kind] / sizes['numel']:.2f}" for kind in MEMORY]
        speedups = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        rows.append((model, title_of(method), *times, *speedups, *bytes_sent, " + ".join(kinds)))
    names = [rate_name(rate) for rate in rates]
    header = ["model", "method", *(f"ms, {name}" for name in names), *(f"times as fast, {name}" for name in names)]
    header += ["MB sent", "stated", "fewer bytes", f"memory: {' + '.join(MEMORY)}"]
    return markdown_table(header, rows, text_columns=2)


def step_table(turns: Sequence[Record], rates: Sequence[int]) -> str:
    """Tabulate milliseconds of a step by method and rate, and the bytes that a worker sends in it."""
    rows = []
    for method in dict.fromkeys(turn["method"] for turn in turns):
        cells = [milliseconds(of(turns, rate, method)) for rate in rates]
        sent = median(turn["sent"] for turn in turns if turn["method"] == method)
        rows.append((title_of(method), *cells, f"{sent / 1e6:.2f}"))
    return markdown_table(("ms of a step", *map(rate_name, rates), "MB sent"), rows)


def milliseconds(turns: Sequence[Record]) -> str:
    """Return the median of turns; nothing where there are none."""
    return f"{1e3 * median(medians_of(turns)):,.0f}" if turns else ""


def speedup_table(turns: Sequence[Record]) -> str:
    """Tabulate speedup over DDP fp32 with lion-pytorch by workers and model, where a cell has both."""
    methods = ("ddp_fp32", "lioncub", "lioncub_overlap", "no_communication")
    rows = []
    for workers, model in sorted({(t["workers"], t["model"]) for t in turns if t["per_host"] == 1}):
        for rate in sorted({turn["rate"] for turn in turns}):
            cell = [t for t in turns if (t["workers"], t["per_host"], t["model"]) == (workers, 1, model)]
            ratios = [speedup(cell, rate, method) for method in methods]
            if any(ratios):
                texts = ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
                rows.append((workers, model, rate_name(rate), *texts))
    return markdown_table(("workers", "model", "rate", *map(title_of, methods)), rows, text_columns=3)


def speedup(turns: Sequence[Record], rate: int, method: str, baseline: str = BASELINE) -> float | None:
    """Return the median ratio of paired turns; None where the cell has none."""
    base, other = medians_of(of(turns, rate, baseline)), medians_of(of(turns, rate, method))
    return median_ratio(base, other)[0] if base and len(base) == len(other) else None


def of(turns: Sequence[Record], rate: int, method: str) -> list[Record]:
    """Return the turns of one method at one rate."""
    return [turn for turn in turns if (turn["rate"], turn["method"]) == (rate, method)]


def title_of(method: str) -> str:
    """Name a method in words."""
    votes = parse_method(method)
    if votes is None:
        return TITLES.get(method, method)
    parts = ["FSDP2"] * method.startswith("fsdp_")
    parts += ["LionCub" if votes.algorithm == "auto" else f"LionCub {votes.algorithm}"]
    parts += ["overlap"] * votes.overlap + ["signs alone"] * votes.signs + ["momentum synchronized"] * votes.synced
    return ", ".join(parts if votes.bucket_mb is None else [*parts, f"buckets of {votes.bucket_mb:g} MiB"])


def color_of(method: str) -> str:
    """Return blue for ours, a darker one for those that overlap."""
    if not method.startswith("lioncub"):
        return PEERS
    return OURS if "_overlap" in method else OURS_TOO
