"""Table and picture of docs/results.md, from the records of a whole run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reporting.pages import OURS, OURS_TOO, PAGE, machine_line, markdown_table, write_results
from reporting.records import Record, RecordsError

from speed.data import DTYPES
from speed.peers import PEERS

# records can have peers that are no longer measured
_WAYS = {peer.way for peer in PEERS}


def write_report(records: Sequence[Record], folder: Path, page: Path = PAGE) -> None:
    """Write speed.jsonl and speed.png into ``folder`` and the table into ``page``. Raises RecordsError for a part."""
    by_name = {record["name"]: record for record in records[1:]}
    cases = list(dict.fromkeys(name.split("/")[0] for name in by_name if name.split("/")[1:2] == ["cpu"]))
    if not cases or "step:LionCub/gpt2_small/fp32" not in by_name:
        raise RecordsError("expected a whole run of `make bench`, got a part of one")
    text = f"{machine_line(records[0])}\n\n{speed_table(by_name, cases)}\n\n{step_table(by_name)}"
    ratios = {case: record["ratio"] for case in cases if (record := _find(by_name, case, "fp32"))}
    bars = [(_title(case), 100 * ratio, OURS if ratio >= 1 else OURS_TOO) for case, ratio in ratios.items()]
    panels = [("% of the bandwidth of a stream, fp32 or packed codes, 16 Mi elements", bars)]
    height = 0.22 * len(cases) + 0.8
    write_results("speed", records, text, panels, height=height, form="{:.0f}", folder=folder, page=page)


def speed_table(by_name: dict[str, Record], cases: Sequence[str]) -> str:
    """Tabulate ops on 16 Mi elements: time and percent of the stream by dtype, and how often faster than peers."""
    rows = []
    for case in cases:
        found = [_find(by_name, case, dtype) for dtype in DTYPES]
        cells = [cell for record in found for cell in (("", "") if record is None else _cells(record))]
        ours = next(record for record in found if record)
        peers = [
            f"{ours['ratio'] / record['ratio']:.1f} {name.split('/')[1].replace('_', ' ')}"
            for name, record in by_name.items()
            if record["kind"] == "peer" and name.split("/")[0] == case and name.split("/")[1] in _WAYS
        ]
        rows.append((_title(case, "`"), *cells, ", ".join(peers)))
    header = ["op", *(f"{dtype} {unit}" for dtype in DTYPES for unit in ("ms", "%")), "times faster than"]
    return markdown_table(header, rows)


def step_table(by_name: dict[str, Record]) -> str:
    """Tabulate optimizer steps over the parameters of GPT-2 small."""
    steps = [(name[5:].split("/"), record) for name, record in by_name.items() if name.startswith("step:")]
    rows = [(name, layout.replace("_", " "), dtype, *_cells(record)) for (name, layout, dtype), record in steps]
    return markdown_table(("optimizer", "parameters", "dtype", "ms", "%"), rows, text_columns=3)


def _cells(record: Record) -> tuple[str, str]:
    return f"{record['ms']:.1f}" if record.get("ms") else "", f"{record['ratio']:.0%}"


def _title(case: str, quote: str = "") -> str:
    op, _, way = case.partition(":")
    return f"{quote}{op}{quote} {way.replace('_', ' ')}".strip()


def _find(by_name: dict[str, Record], case: str, dtype: str) -> Record | None:
    kinds = (dtype, "packed") if dtype == "fp32" else (dtype,)
    return next((by_name[key] for kind in kinds if (key := f"{case}/cpu/{kind}/16Mi") in by_name), None)
