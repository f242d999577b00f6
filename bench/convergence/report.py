"""study.md, study.json and the plots from the finished runs, however many there are."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from convergence import prose
from convergence.archive import SUFFIX, write_archive
from convergence.methods import METHODS, REFERENCE
from convergence.plots import write_plots
from convergence.results import Cell, Results, families
from convergence.stages import LIMIT, PLAIN_VOTE
from convergence.statistics import Interval, recovered_share
from convergence.store import Store
from convergence.tasks import TASKS
from convergence.verdicts import CLAIMS, Finding, findings_of, overall

Rows = list[str]


def write_report(store: Store, folder: Path, name: str = "study") -> Path:
    """Write NAME.md, NAME.json, NAME_runs.jsonl.gz and NAME_*.png into ``folder``; gives the first.

    Raises ValueError where no run is finished.
    """
    results = Results(store)
    if not store.records():
        raise ValueError(f"{store.folder}: expected at least one finished run of the code at hand, got none")
    folder.mkdir(parents=True, exist_ok=True)
    plots = write_plots(results, folder, name)
    (folder / f"{name}.json").write_text(json.dumps(summary(results), indent=1, allow_nan=False) + "\n")
    write_archive(store, folder / f"{name}{SUFFIX}")
    path = folder / f"{name}.md"
    path.write_text(document(results, [plot.name for plot in plots]))
    return path


def document(results: Results, plots: Sequence[str]) -> str:
    """The whole text."""
    sections = [
        *prose.INTRODUCTION,
        *provenance(results),
        *prose.CLAIMS,
        *claim_rows(results),
        *[f"![{name}]({name})\n" for name in plots],
        *prose.LOSSES,
        *loss_tables(results),
        *share_section(results),
        *prose.RATES,
        *rate_table(results),
        *prose.DIAGNOSTICS,
        *diagnostic_table(results),
        *prose.LIMITS,
        *untold(results),
    ]
    return "\n".join(sections).rstrip() + "\n"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Rows:
    """A table; the first ``left`` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *body, ""] if body else []


def percent(interval: Interval | None) -> str:
    """Mean and interval of a relative difference."""
    if interval is None:
        return ""
    if math.isinf(interval.low):
        return f"{interval.mean:+.1%}"
    return f"{interval.mean:+.1%} [{interval.low:+.1%}, {interval.high:+.1%}]"


def title_of(cell: Cell) -> str:
    """A cell in words."""
    return f"{cell.task}, {cell.shards}, {cell.workers} workers, batch {cell.batch}"


def provenance(results: Results) -> Rows:
    """Machine, versions, runs and the code that made them."""
    store = results.store
    hours = sum(record["seconds"] for record in store.records()) / 3600
    rows = [
        f"Python {platform.python_version()}, PyTorch {torch.__version__}, one thread per run; {len(store.records())} "
        f"runs, {hours:.1f} core hours.",
        "",
    ]
    digests = {digest: count for digest, count in store.digests().items() if digest != store.digest}
    if digests:
        treated = "counted as well (`--keep-old`)" if store.keep_old else "not counted"
        others = ", ".join(f"{count} of `{digest}`" for digest, count in sorted(digests.items()))
        rows += [f"**Runs of other code than today's (`{store.digest}`): {others}; they are {treated}.**", ""]
    return rows


def claim_rows(results: Results) -> Rows:
    """A paragraph and a table for each claim."""
    rows: Rows = []
    for claim in CLAIMS:
        findings = [f for f in findings_of(claim, results) if f.difference is not None]
        if not findings:
            continue
        asked = f"at most {claim.margin:.0%}" if claim.margin is not None else "above 0"
        rows += [
            f"### {claim.text}: {overall(findings)}",
            "",
            f"Loss of {claim.worse} relative to {claim.better}; the claim holds where the interval is {asked}.",
            "",
            *markdown(("cell", "difference", "seeds", "verdict"), map(_finding_row, findings)),
        ]
    return rows


def _finding_row(finding: Finding) -> tuple[str, str, str, str]:
    assert finding.difference is not None
    return title_of(finding.cell), percent(finding.difference), str(finding.difference.count), finding.verdict


def loss_tables(results: Results) -> Rows:
    """One table for each cell."""
    rows: Rows = []
    for cell in results.cells():
        lines = [_loss_row(results, cell, method) for method in _by_difference(results, cell)]
        header = ("method", "lr", "seeds", "loss", "against Lion [95 %]", "bytes less than fp32")
        table = markdown(header, [line for line in lines if line is not None])
        rows += [f"### {title_of(cell)}", "", *table] if table else []
    return rows


def _by_difference(results: Results, cell: Cell) -> list[str]:
    """Methods, the reference first, then by their difference to it."""

    def rank(method: str) -> tuple[bool, float]:
        difference = results.difference(cell, method)
        return method != REFERENCE, math.inf if difference is None else difference.mean

    return sorted(METHODS, key=rank)


def _loss_row(results: Results, cell: Cell, method: str) -> tuple[str, ...] | None:
    runs = results.runs(cell, method)
    if not runs:
        return None
    loss, difference = results.loss(cell, method), results.difference(cell, method)
    mark = " (edge)" if results.is_at_edge(cell.task, method) else ""
    return (
        method,
        f"{results.lr_of(cell.task, method):g}{mark}",
        str(len(runs)),
        "diverged" if loss is None else f"{loss.mean:.4f}",
        "" if method == REFERENCE else percent(difference),
        f"{results.bytes_ratio(cell, method):.1f}x",
    )


def share_section(results: Results) -> Rows:
    """What synchronization wins back of what unsynchronized votes lose."""
    rows = []
    for cell in results.cells():
        for method in METHODS:
            if METHODS[method].sync is None:
                continue
            losses = results.losses(cell, method, PLAIN_VOTE, REFERENCE)
            share = recovered_share(*losses)
            if share is not None and share.count > 2:
                ratio = f"{results.bytes_ratio(cell, method):.1f}x"
                text = f"{share.mean:.0%} [{share.low:.0%}, {share.high:.0%}]"
                rows.append((title_of(cell), method, str(share.count), text, ratio))
    table = markdown(("cell", "method", "seeds", "recovered [95 %]", "bytes less than fp32"), rows, left=2)
    return [*prose.SHARES, *table] if table else []


def rate_table(results: Results) -> Rows:
    """The learning rate of each family on each task."""
    rows = []
    for family in families():
        marks = [" (edge)" if results.is_at_edge(task, family) else "" for task in TASKS]
        rows.append((family, *(f"{results.lr_of(task, family):g}{m}" for task, m in zip(TASKS, marks, strict=True))))
    return markdown(("family", *TASKS), rows)


def diagnostic_table(results: Results) -> Rows:
    """Means over seeds of what was seen at the last step but one that was looked at."""
    rows = []
    for cell in results.cells():
        for method in METHODS:
            seen = [_last(run) for run in results.runs(cell, method).values() if _last(run)]
            if not seen:
                continue
            drift = fmean(fmean(found["drift"].values()) for found in seen)
            figures = [fmean(found[name] for found in seen) for name in ("tied", "unanimous", "agreement")]
            rows.append((title_of(cell), method, *(f"{figure:.1%}" for figure in figures), f"{drift:.2f}"))
    header = ("cell", "method", "ties", "unanimous", "agrees with Lion", "drift")
    return markdown(header, rows, left=2)


def _last(run: dict[str, Any]) -> dict[str, Any]:
    """Before the learning rate has fallen to zero: in the middle of the run."""
    seen = [found for found in run["seen"] if "agreement" in found]
    return seen[len(seen) // 2] if seen else {}


def untold(results: Results) -> Rows:
    """Cells and methods whose interval holds both no difference and one of the limit."""
    count, open_ones = 0, []
    for cell in results.cells():
        for method in METHODS:
            difference = results.difference(cell, method)
            if method == REFERENCE or difference is None:
                continue
            count += 1
            if not difference.within(LIMIT) and not difference.beyond(LIMIT):
                open_ones.append((title_of(cell), method, percent(difference), str(difference.count)))
    decided = [row for row in open_ones if int(row[3]) >= 6]
    return [
        f"Of {count} comparisons with Lion, {len(open_ones)} do not tell whether the difference is within "
        f"{LIMIT:.0%}. Those of at least 6 seeds:",
        "",
        *markdown(("cell", "method", "against Lion [95 %]", "seeds"), decided, left=2),
    ]


def summary(results: Results) -> dict[str, Any]:
    """All figures of the report, for programs."""
    store = results.store
    return {
        "code": store.digest,
        "digests": store.digests(),
        "lr": {task: {name: results.lr_of(task, name) for name in families()} for task in TASKS},
        "claims": [_claim_summary(findings_of(claim, results), asdict(claim)) for claim in CLAIMS],
        "cells": [
            {
                **asdict(cell),
                "methods": {m: _method_summary(results, cell, m) for m in METHODS if results.runs(cell, m)},
            }
            for cell in results.cells()
        ],
    }


def _claim_summary(findings: list[Finding], claim: dict[str, Any]) -> dict[str, Any]:
    known = [f for f in findings if f.difference is not None]
    cells = [{**asdict(f.cell), "difference": finite(f.difference), "verdict": f.verdict} for f in known]
    return {**claim, "overall": overall(known), "cells": cells}


def _method_summary(results: Results, cell: Cell, method: str) -> dict[str, Any]:
    runs = results.runs(cell, method)
    return {
        "losses": {str(seed): run["final_loss"] for seed, run in runs.items() if math.isfinite(run["final_loss"])},
        # [step, loss] on a quarter of the validation set; null where it diverged
        "validation": {
            seed: [[step, round(loss, 4) if math.isfinite(loss) else None] for step, loss in run["validation"]]
            for seed, run in runs.items()
        },
        "difference": finite(results.difference(cell, method)),
        "bytes_ratio": results.bytes_ratio(cell, method),
    }


def finite(interval: Interval | None) -> dict[str, float | None] | None:
    """An interval in JSON, which has no infinity."""
    if interval is None:
        return None
    return {key: value if math.isfinite(value) else None for key, value in asdict(interval).items()}
