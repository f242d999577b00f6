"""docs/netlab.md and docs/netlab.json from the findings of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from netlab import prose
from netlab.names import ALGORITHM_OF, BASELINE, FLOOR, OVERLAP, TITLES
from netlab.plots import write_plots
from netlab.rates import rate_name
from netlab.records import Record, of_kind
from netlab.summary import (
    Cell,
    Repetition,
    Spread,
    Table,
    alone_share,
    fastest,
    fixed_rivals,
    headline,
    paired_ratio,
    spread_of,
    step_of,
    table_of,
)
from netlab.targets import Target, deciding, overlap_factor, prediction_errors, targets_of

Rows = list[str]


def write_report(records: list[Record], folder: Path) -> list[Target]:
    """Write netlab.md, netlab.json and the plots into ``folder``; gives the targets. ValueError without a turn."""
    table = table_of(records)
    if not table:
        raise ValueError("records: expected at least one finished turn, got none")
    targets = targets_of(table, records)
    plots = write_plots(table, folder)
    (folder / "netlab.md").write_text(document(table, records, targets, [path.name for path in plots]))
    (folder / "netlab.json").write_text(compact_json(table, records, targets))
    return targets


def document(table: Table, records: list[Record], targets: Sequence[Target], plots: Sequence[str]) -> str:
    """The whole text."""
    sections = [
        *prose.introduction(records, table),
        *target_table(targets),
        *[f"![{name}]({name})\n" for name in plots],
        *prose.SPEED,
        *speed_table(table),
        *prose.STEPS,
        *step_tables(table),
        *prose.BYTES,
        *bytes_table(table),
        *prose.ALONE,
        *alone_table(table),
        *optional(prose.OVERLAP, overlap_table(table)),
        *optional(prose.AUTO, auto_table(table)),
        *optional(prose.PREDICTED, prediction_table(table)),
        *optional(prose.TWO_LEVEL, two_level_table(table, records)),
        *prose.LAB,
        *link_table(records),
        *prose.memory(records),
    ]
    return "\n".join(sections).rstrip() + "\n"


def optional(text: Rows, rows: Rows) -> Rows:
    """A section only where it has something to say."""
    return [*text, *rows] if rows else []


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Rows:
    """A table; the first ``left`` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *body, ""] if body else []


def milliseconds(spread: Spread) -> str:
    """Median and range."""
    return f"{1e3 * spread.median:,.0f} ({1e3 * spread.low:,.0f}-{1e3 * spread.high:,.0f})"


def target_table(targets: Sequence[Target]) -> Rows:
    """Asked for and got."""
    rows = [
        (t.name, f"{'<=' if t.at_most else '>='} {t.limit:g}", f"{t.got:.3g}", "met" if t.met else "**missed**")
        for t in targets
    ]
    return markdown(("figure", "asked for", "got", ""), rows)


def speed_table(table: Table) -> Rows:
    """Speedups over the first baseline: the headline method's, the best LionCub's, and the compute floor's."""
    rows = []
    for cell, methods in sorted(table.items()):
        name = headline(methods)
        if BASELINE not in methods or name is None or cell.per_host > 1:
            continue
        best = fastest(methods, list(ALGORITHM_OF)) or name
        row = [f"{cell.workers}", cell.model, rate_name(cell.rate)]
        for method in ("ddp_fp32", name, best, FLOOR):
            ratio = paired_ratio(methods[BASELINE], methods[method]).median if method in methods else None
            overlap = ", overlap" if method == name and name.endswith(OVERLAP) else ""
            row.append("" if ratio is None else f"{ratio:.2f}x{overlap}")
        share = f"{paired_ratio(methods[FLOOR], methods[name]).median:.0%}" if FLOOR in methods else ""
        rows.append([*row, TITLES[best], share])
    header = (
        "workers",
        "model",
        "rate",
        "DDP fp32, our Lion",
        "LionCub",
        "best LionCub",
        "floor",
        "best is",
        "of floor",
    )
    return markdown(header, rows, left=3)


def step_tables(table: Table) -> Rows:
    """Step times of every method, one table per number of workers and model."""
    lines: Rows = []
    for hosts, model in dict.fromkeys((cell.hosts, cell.model) for cell in sorted(table) if cell.per_host == 1):
        cells = [c for c in sorted(table) if (c.hosts, c.per_host, c.model) == (hosts, 1, model)]
        methods = [name for name in TITLES if any(name in table[cell] for cell in cells)]
        rows = [[TITLES[name], *[_step_text(table[cell].get(name)) for cell in cells]] for name in methods]
        lines += [f"### {hosts} workers, {model}", ""]
        lines += markdown(("ms", *[rate_name(cell.rate) for cell in cells]), rows)
    return lines


def _step_text(repetitions: list[Repetition] | None) -> str:
    return milliseconds(step_of(repetitions)) if repetitions else ""


def bytes_table(table: Table) -> Rows:
    """What the interface counted beside what the optimizer says, at the fastest rate of each flat cell of a model."""
    rows = []
    for cell, methods in sorted(deciding(table).items()):
        for name, repetitions in methods.items():
            sent, received = (
                median(values) for values in zip(*((r.sent, r.received) for r in repetitions), strict=True)
            )
            said = repetitions[0].bytes_sent
            ratio = "" if said is None else f"{sent / said:.3f}"
            stated = "" if said is None else f"{said:,}"
            rows.append(
                [cell.model, rate_name(cell.rate), TITLES[name], f"{sent:,.0f}", f"{received:,.0f}", stated, ratio]
            )
    header = ("model", "rate", "method", "sent", "received", "`bytes_sent`", "sent / `bytes_sent`")
    return markdown(header, rows, left=3)


def alone_table(table: Table) -> Rows:
    """Exchanges with nothing else going on."""
    rows = []
    for cell, methods in sorted(table.items()):
        for name, repetitions in methods.items():
            share = alone_share(cell, repetitions) if cell.per_host == 1 else None
            if share is not None:
                wire = 8 * (repetitions[0].alone_bytes or 0) / cell.rate
                seconds = spread_of([r.alone for r in repetitions if r.alone is not None])
                in_step = median(r.alone_in_step for r in repetitions if r.alone_in_step is not None)
                where = [f"{cell.workers}", cell.model, rate_name(cell.rate), TITLES[name]]
                times = [f"{1e3 * wire:.1f}", f"{1e3 * seconds.median:.1f}", f"{1e3 * in_step:.1f}"]
                rows.append([*where, *times, f"{share.median:.2f} ({share.low:.2f}-{share.high:.2f})"])
    header = ("workers", "model", "rate", "method", "wire limit, ms", "measured, ms", "in a step, ms", "share")
    return markdown(header, rows, left=4)


def overlap_table(table: Table) -> Rows:
    """Step times with overlap against those of perfect hiding, and against the same without overlap."""
    rows = []
    for cell, methods in sorted(deciding(table).items()):
        for name in (name for name in methods if name.endswith(OVERLAP)):
            factor = overlap_factor(cell, methods, name)
            plain = methods.get(name.removesuffix(OVERLAP))
            gain = "" if plain is None else f"{paired_ratio(plain, methods[name]).median:.2f}x"
            if factor is not None:
                where = [cell.model, rate_name(cell.rate), TITLES[name]]
                rows.append([*where, f"{1e3 * step_of(methods[name]).median:,.0f}", f"{factor:.2f}", gain])
    header = ("model", "rate", "method", "step, ms", "over perfect hiding", "faster than without")
    return markdown(header, rows, left=3)


def auto_table(table: Table) -> Rows:
    """The automatic choice against the best fixed algorithm."""
    rows = []
    for cell, methods in sorted(table.items()):
        for auto in (name for name in methods if ALGORITHM_OF.get(name) == "auto"):
            best = fastest(methods, fixed_rivals(auto))
            if best is None:
                continue
            ratio = paired_ratio(methods[auto], methods[best])
            took = "+".join(sorted(set(methods[auto][-1].routes)))
            where = [f"{cell.workers}", cell.model, rate_name(cell.rate), TITLES[auto], took, ALGORITHM_OF[best]]
            interval = f"{ratio.low:.2f}-{ratio.high:.2f}"
            rows.append([*where, f"{ratio.median:.3f}", interval, "yes" if ratio.resolved else "no"])
    header = ("workers", "model", "rate", "method", "chose", "best fixed", "auto / best", "95% interval", "resolved")
    return markdown(header, rows, left=6)


def prediction_table(table: Table) -> Rows:
    """Predicted against measured time of an exchange alone."""
    rows = [
        [f"{cell.workers}", cell.model, rate_name(cell.rate), TITLES[name], f"{error:+.0%}"]
        for cell, name, error in prediction_errors(table)
    ]
    return markdown(("workers", "model", "rate", "method", "predicted over measured"), rows, left=4)


def two_level_table(table: Table, records: list[Record]) -> Rows:
    """Bytes over the slow link and step times, with the hash of the parameters that each algorithm came to."""
    digests = {record["method"]: sorted(set(record["digests"])) for record in of_kind(records, "digest")}
    rows = []
    for cell, methods in sorted(table.items()):
        flat = methods.get("lioncub_reduce_scatter")
        for name, repetitions in methods.items() if cell.per_host > 1 else ():
            sent = median(r.sent for r in repetitions)
            ratio = f"{sent / median(r.sent for r in flat):.2f}" if flat else ""
            shown = ", ".join(digest[:12] for digest in digests.get(name, []))
            rows.append([rate_name(cell.rate), TITLES[name], f"{sent:,.0f}", ratio, _step_text(repetitions), shown])
    header = ("rate", "method", "bytes sent by a host", "of reduce_scatter's", "step, ms", "parameters' hash")
    return markdown(header, rows, left=2)


def link_table(records: list[Record]) -> Rows:
    """What iperf3 found."""
    shares: dict[tuple[int, int, int], list[float]] = {}
    for link in of_kind(records, "link"):
        key = link["hosts"], link["per_host"], link["rate"]
        shares.setdefault(key, []).append(link["bits_per_second"] / link["rate"])
    rows = [
        [f"{hosts}", f"{per_host}", rate_name(rate), f"{len(own)}", f"{min(own):.3f}", f"{max(own):.3f}"]
        for (hosts, per_host, rate), own in sorted(shares.items())
    ]
    return markdown(("hosts", "workers on each", "rate", "checks", "least share", "greatest share"), rows, left=3)


def compact_json(table: Table, records: list[Record], targets: Sequence[Target]) -> str:
    """Medians, least and greatest per cell and method, with the environment; one line per method."""
    head: dict[str, Any] = {key: value for key, value in of_kind(records, "environment")[0].items() if key != "kind"}
    goals = [{**dataclasses.asdict(target), "met": target.met} for target in targets]
    lines = [json.dumps(_summary(cell, name, own)) for cell in sorted(table) for name, own in table[cell].items()]
    complete = bool(of_kind(records, "end"))
    text = json.dumps({"environment": head, "complete": complete, "targets": goals}, indent=1).removesuffix("\n}")
    return f'{text},\n "results": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _summary(cell: Cell, name: str, repetitions: Sequence[Repetition]) -> dict[str, Any]:
    figures: dict[str, Any] = {**dataclasses.asdict(cell), "method": name, "repetitions": len(repetitions)}
    for field in dataclasses.fields(Repetition):
        values = [getattr(r, field.name) for r in repetitions if getattr(r, field.name) is not None]
        if field.name not in ("index", "routes") and values:
            spread = spread_of(values)
            figures[field.name] = [float(f"{v:.4g}") if v < 1e3 else round(v) for v in dataclasses.astuple(spread)]
    if repetitions[-1].routes:
        figures["routes"] = repetitions[-1].routes
    return figures
