"""docs/gpu.md and docs/gpu.json from the findings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_report import prose
from gpu_report.claims import BUSY, HELD_ON, NARROW, claims_of
from gpu_report.code import KINDS
from gpu_report.findings import Finding, Widths
from gpu_report.rooflines import GPUS

Rows = list[str]
STEP = ("encode", "encode_", "encode a list", "vote", "vote with counts", "apply", "apply with momentum")
STEP += ("apply to a list", "step", "step of a list")
KINDS_OF = ("encode a list", "vote", "apply to a list", "step of a list", "quantize")


def write_report(findings: Sequence[Finding], trials: Sequence[Finding], folder: Path) -> None:
    """Write gpu.md and gpu.json into ``folder``."""
    (folder / "gpu.md").write_text(document(findings, trials))
    lines = ",\n  ".join(json.dumps(rounded(finding)) for finding in findings)
    tried = ",\n  ".join(json.dumps(rounded(finding)) for finding in trials)
    (folder / "gpu.json").write_text(f'{{"findings": [\n  {lines}\n ],\n "trials": [\n  {tried}\n ]}}\n')


def document(findings: Sequence[Finding], trials: Sequence[Finding]) -> str:
    """The whole text."""
    gpus = [
        f"| {name} | {gpu.name} | {gpu.bandwidth / 1e12:g} | {gpu.processors} | {gpu.clock / 1e9:g} | {gpu.source} |"
        for name, gpu in GPUS.items()
    ]
    return "\n".join(
        [
            prose.INTRODUCTION,
            prose.CLAIMS,
            *claim_table(findings),
            prose.MISSED,
            *missed_table(findings),
            prose.MAIN,
            *main_tables(findings),
            prose.BY_KIND,
            *kind_table(findings),
            prose.ALL,
            *all_table(findings),
            prose.ACCESSES,
            *access_table(findings),
            prose.TRIED,
            *trial_table(trials),
            prose.LAYOUTS,
            *markdown(("what", "here", "instead", ""), prose.LAYOUTS_TRIED, left=4),
            prose.OPEN,
            prose.GPUS.rstrip("\n"),
            *gpus,
            prose.METHOD,
        ]
    )


def rounded(finding: Finding) -> dict[str, object]:
    """A finding as JSON has it, with as many digits as mean something."""
    plain = asdict(finding)
    for name in ("bytes", "memory", "issue"):
        plain[name] = float(f"{plain[name]:.4g}")
    plain["kinds"] = {kind: round(count, 4) for kind, count in plain["kinds"].items()}
    return plain


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Rows:
    """A table; the first ``left`` columns are text."""
    rule = ["---" if i < left else "---:" for i in range(len(header))]
    body = [f"| {' | '.join(row)} |" for row in rows]
    return [f"| {' | '.join(header)} |", f"|{'|'.join(rule)}|", *body, ""]


def claim_table(findings: Sequence[Finding]) -> Rows:
    """Each claim with how many miss it."""
    rows = []
    for claim in claims_of(findings):
        verdict = "met" if not claim.missed else f"missed by {len(claim.missed)}"
        rows.append((claim.text, f"{claim.asked}", f"**{verdict}**" if claim.unexpected else verdict))
    return markdown(("claim", "asked of", ""), rows)


def missed_table(findings: Sequence[Finding]) -> Rows:
    """What is not as asked, and what exchanges values, with the reasons."""
    dtypes: dict[tuple[str, str, str], list[str]] = {}
    for label, dtype in dict.fromkeys((f.label, f.dtype) for f in findings):
        own = [f for f in findings if (f.label, f.dtype) == (label, dtype)]
        if any(f.is_narrow for f in own):
            dtypes.setdefault((label, "narrow accesses", NARROW.get(label, "")), []).append(dtype)
        if (label, dtype) in BUSY:
            shares = ", ".join(f"{f.ratio:.0%} on {f.target}" for f in own if f.target in HELD_ON)
            dtypes.setdefault((label, f"issue-bound {shares}", BUSY[label, dtype]), []).append(dtype)
        if own[0].exchanges:
            dtypes.setdefault((label, "shared memory", own[0].exchanges), []).append(dtype)
    rows = [(label, ", ".join(names), what, why) for (label, what, why), names in dtypes.items()]
    return markdown(("kernel", "dtype", "what", "why"), rows, left=4)


def main_tables(findings: Sequence[Finding]) -> Rows:
    """One table per target."""
    lines: Rows = []
    for target, gpu in GPUS.items():
        own = [f for label in STEP for f in findings if f.target == target and f.label == label]
        rows = []
        for f in own:
            times = f"{f.memory:.2f}", f"{f.issue:.2f}", f"{f.ratio:.0%}", f.port
            rows.append([f.label, f.dtype, f"{f.bytes:.3f}", f"{f.instructions:.1f}", *times])
        header = ("kernel", "dtype", "bytes", "instructions", "memory, ps", "issue, ps", "share", "limited by")
        lines += [f"### {gpu.name} ({target})", "", *markdown(header, rows, left=2)]
    return lines


def kind_table(findings: Sequence[Finding]) -> Rows:
    """Instructions per element by kind."""
    kinds = [kind for kind in KINDS if kind != "local"]
    rows = []
    for f in findings:
        if f.label in KINDS_OF and f.target in ("sm_90", "gfx942"):
            counts = [f"{f.kinds[kind]:.2f}" if f.kinds.get(kind) else "" for kind in kinds]
            rows.append([f.label, f.dtype, f.target, *counts, f"{f.instructions:.2f}"])
    return markdown(("kernel", "dtype", "target", *kinds, "all"), rows, left=3)


def all_table(findings: Sequence[Finding]) -> Rows:
    """Every kernel and target."""
    by_place = {(f.label, f.dtype, f.target): f for f in findings}
    targets = [target for target in GPUS if any(f.target == target for f in findings)]
    rows = []
    for label, dtype in dict.fromkeys((f.label, f.dtype) for f in findings):
        own = [by_place.get((label, dtype, target)) for target in targets]
        cells = [f"{f.registers}, {f.instructions:.1f}, {f.ratio:.0%}" if f else "" for f in own]
        n_bytes = next(f.bytes for f in own if f)
        rows.append([label, dtype, f"{n_bytes:.3f}", *cells])
    return markdown(("kernel", "dtype", "bytes", *targets), rows, left=2)


def access_table(findings: Sequence[Finding]) -> Rows:
    """Widths of loads and stores, and shared memory."""
    rows = []
    for f in findings:
        if f.target == "sm_90":
            allowed = "" if not f.is_narrow else f"{widths(f.least_loads)}; {widths(f.least_stores)}"
            rows.append([f.label, f.dtype, widths(f.loads), widths(f.stores), allowed, f"{f.shared or ''}"])
    return markdown(("kernel", "dtype", "loads", "stores", "if not these: allowed", "shared"), rows, left=5)


def trial_table(trials: Sequence[Finding]) -> Rows:
    """Tile shapes side by side."""
    targets = [target for target in GPUS if any(f.target == target for f in trials)]
    by_place = {(f.label, f.dtype, f.elements, f.threads, f.target): f for f in trials}
    rows = []
    for label, dtype, elements, threads in dict.fromkeys(place[:4] for place in by_place):
        own = [by_place[label, dtype, elements, threads, target] for target in targets]
        cells = [
            f"{f.registers}, {f.instructions:.1f}, {f.ratio:.0%}{', shared' * bool(f.kinds.get('shared'))}" for f in own
        ]
        rows.append([label, dtype, f"{elements}", f"{threads}", f"{elements / threads:g}", *cells])
    return markdown(("kernel", "dtype", "elements", "threads", "per thread", *targets), rows, left=2)


def widths(found: Widths) -> str:
    """Such as "2 x 128, 1 x 8"."""
    ordered = sorted(found.items(), key=lambda item: -int(item[0]))
    return ", ".join(f"{number} x {bits}" for bits, number in ordered)
