"""Hardware counters of the kernels: the command line of ncu, and its table as rows. Needs no torch."""

from __future__ import annotations

import csv
from pathlib import Path

from gpu.report import Rows

# names of figures, by ncu's
METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes.sum": "dram_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent_of_peak",
    "lts__t_sectors.sum": "l2_sectors",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "loaded_sectors",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum": "stored_sectors",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active_percent",
    "launch__registers_per_thread": "registers",
    "smsp__issue_active.avg.pct": "issue_active_percent",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "stalled_on_memory",
}
_NCU = "ncu --clock-control none --csv --page raw -k regex:^_[a-z_]+_kernel$ --metrics"
COMMAND = (*_NCU.split(), ",".join(METRICS))


def add_metrics(rows: Rows, stage: str, log: Path) -> None:
    """Add a row for each kernel that ncu lists, in the log of the stage's last run."""
    words = log.read_text().rpartition(f"=== {stage}\n")[2]
    table = list(csv.DictReader(line for line in words.splitlines() if line.startswith('"')))
    if len(table) < 2:
        rows.add(stage, "counters", error="ncu: expected a table of kernels in the log, got none")
    # the line below the header has the units
    for units, kernel in ((table[0], row) for row in table[1:]):
        found = {name: f"{kernel[key]} {units[key]}".strip() for key, name in METRICS.items() if key in kernel}
        rows.add(stage, f"{kernel['ID']}: {kernel['Kernel Name']}", **found)
