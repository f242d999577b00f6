"""Hardware counters of the kernels by ncu: the target that it runs, its argv, and what it says."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gpu.rows import Rows

if TYPE_CHECKING:
    from speed.cases import Case
    from speed.data import Data

    from gpu.workbench import Workbench

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
COMMAND = (
    "ncu",
    "--clock-control",
    "none",
    "--csv",
    "--page",
    "raw",
    "-k",
    "regex:^_[a-z_]+_kernel$",
    "--metrics",
    ",".join(METRICS),
)
_CASES = (
    "lion_encode",
    "lion_encode_",
    "lion_apply_:momentum",
    "lion_step_",
    "foreach_lion_encode",
    "foreach_lion_step_",
    "foreach_lion_apply_",
    "majority_vote:8_voters",
)


def run(bench: Workbench) -> None:
    """Launch each main kernel once: what ncu looks at."""
    # the command line is needed where torch is not
    import torch
    from speed.cases import CASES
    from speed.data import Data

    n = 4096 if bench.is_dry else 2**26
    for dtype in (torch.float32, torch.bfloat16):
        data = Data(n, dtype, str(bench.device), parts=2 if bench.is_dry else 64)
        for case in CASES:
            if case.name in _CASES:
                label = f"{case.name}, {str(dtype).removeprefix('torch.')}"
                bench.attempt(label, partial(_launch, case, data))


def _launch(case: Case, data: Data) -> None:
    case.make(data, "triton").run()


def add_metrics(rows: Rows, stage: str, log: Path) -> None:
    """Add a row for each kernel that ncu speaks of, in the log of the stage's last run."""
    words = log.read_text().rpartition(f"=== {stage}\n")[2]
    table = list(csv.DictReader(line for line in words.splitlines() if line.startswith('"')))
    if len(table) < 2:
        rows.add(stage, "counters", error="ncu: expected a table of kernels in the log, got none")
    # the line below the header has the units
    for units, kernel in ((table[0], row) for row in table[1:]):
        figures = {
            name: f"{kernel[metric]} {units[metric]}".strip() for metric, name in METRICS.items() if metric in kernel
        }
        rows.add(stage, f"{kernel['ID']}: {kernel['Kernel Name']}", **figures)
