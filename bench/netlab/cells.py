"""Chosen cells of the matrix, measured for this checkout and, turn by turn, for another one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from checkouts import ROOT, link_library

from netlab.cell_worker import parse_method
from netlab.crew import Crew
from netlab.lab import MASTER_PORT, Lab
from netlab.rates import rate_name

WARM_UP_RATE = 10**10
METHODS = ("no_communication", "ddp_fp32_lion_pytorch", "lioncub", "lioncub_overlap")


def run_cells(
    rates: Sequence[int],
    methods: Sequence[str],
    *,
    workers: int,
    model: str,
    old: Path | None,
    repetitions: int,
    untimed: int,
    steps: int,
    turn_seconds: float,
    out: Path,
) -> list[dict[str, Any]]:
    """Measure every method at every rate; a record per turn, which is one repetition of one method of one checkout."""
    for method in methods:
        parse_method(method)
    out.parent.mkdir(parents=True, exist_ok=True)
    checkouts = {"new": ROOT} | ({"old": old} if old else {})
    records: list[dict[str, Any]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log, journal = out.with_suffix(".log"), stack.enter_context(out.open("w"))
        log.write_bytes(b"")
        lab = stack.enter_context(Lab(workers, WARM_UP_RATE))
        crews: dict[str, Crew] = {}
        for i, (code, checkout) in enumerate(checkouts.items()):
            environment = link_library(checkout, folder / code) | {"MASTER_PORT": str(MASTER_PORT + i)}
            crews[code] = stack.enter_context(Crew(lab, model, log, "cell-worker", environment))
            facts = crews[code].ask("facts")[0]
            print(f"{code}: {facts['library']}, {facts['parameters']:,} parameters, {workers} workers", flush=True)
            # compiles kernels and builds DDP's buckets
            for method in methods:
                crews[code].ask("measure", method=method, untimed=2, steps=1, seconds=1.0)
        for rate in rates:
            lab.set_rate(rate)
            for repetition in range(repetitions):
                first = repetition % len(methods)
                for method in [*methods[first:], *methods[:first]]:
                    # the one that comes second runs on warmer caches, so they change places
                    for code in sorted(crews, reverse=repetition % 2 == 1):
                        answers = crews[code].ask(
                            "measure", method=method, untimed=untimed, steps=steps, seconds=turn_seconds
                        )
                        # a step ends with its slowest worker
                        times = [max(step) for step in zip(*(answer["seconds"] for answer in answers), strict=True)]
                        sent = max(answer["sent"] for answer in answers)
                        record = {"rate": rate, "method": method, "code": code, "seconds": times, "sent": sent}
                        records.append(record)
                        journal.write(json.dumps(record) + "\n")
                        journal.flush()
            print(table_of(records, rate), flush=True)
    return records


def table_of(records: Sequence[dict[str, Any]], rate: int) -> str:
    """The medians of one rate in Markdown; old / new is the median ratio of neighbouring turns, with its range."""
    turns = [record for record in records if record["rate"] == rate]
    codes = sorted({turn["code"] for turn in turns})
    methods = list(dict.fromkeys(turn["method"] for turn in turns))
    heads = ["method", *(f"{code} ms" for code in codes), *(f"{code} MB sent" for code in codes)]
    lines = [[rate_name(rate), *heads[1:], *(["old / new", "range"] if len(codes) == 2 else [])]]
    for method in methods:
        of = {code: [turn for turn in turns if (turn["method"], turn["code"]) == (method, code)] for code in codes}
        row = [method]
        row += [f"{1e3 * median(time for turn in of[code] for time in turn['seconds']):.1f}" for code in codes]
        row += [f"{median(turn['sent'] for turn in of[code]) / 1e6:.3f}" for code in codes]
        if len(codes) == 2:
            pairs = zip(of["old"], of["new"], strict=True)
            ratios = [median(old["seconds"]) / median(new["seconds"]) for old, new in pairs]
            row += [f"{median(ratios):.3f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        lines.append(row)
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
