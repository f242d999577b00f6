"""Claims about the compiled code, and the table and picture of docs/results.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from reporting.pages import OURS, OURS_TOO, PAGE, markdown_table, write_results
from reporting.records import Record, RecordsError

from gpu_report.compiling import TARGETS

WIDE = 128
# of names of kernels whose rounding docs/numerics.md states
EXACT = ("encode", "apply", "step")
_CLAIMS: dict[str, Callable[[Record], bool]] = {
    "compiles": lambda found: not found["error"],
    "no spills": lambda found: not found.get("spills"),
    "128-bit accesses where a thread has as much of a tensor": lambda found: not is_narrow(found),
    "no fused multiply-add, no flush to zero in encode, apply and step": lambda found: (
        not (is_exact(found["label"]) and found.get("fused"))
    ),
}


def is_exact(label: str) -> bool:
    """Return whether a kernel rounds as docs/numerics.md states."""
    return any(word in label for word in EXACT)


def is_narrow(found: Record) -> bool:
    """Return whether the widest load or store is narrower than a thread's share of some tensor."""
    return any(found.get(part, WIDE) < found[f"least_{part}"] for part in ("loads", "stores"))


def broken_claims(findings: Sequence[Record]) -> dict[str, list[str]]:
    """Return the kernels that break each claim."""

    def name_of(found: Record) -> str:
        return ", ".join(filter(None, (found["label"], found["dtype"], found["target"], found["error"])))

    return {claim: [name_of(f) for f in findings if not holds(f)] for claim, holds in _CLAIMS.items()}


def write_report(records: Sequence[Record], folder: Path, page: Path = PAGE) -> None:
    """Write gpu.jsonl and gpu.png into ``folder`` and claims and registers into ``page``.

    Raises RecordsError where a target is missing.
    """
    findings = [record for record in records if record["kind"] == "kernel"]
    if {found["target"] for found in findings} != set(TARGETS):
        raise RecordsError(f"expected kernels for {', '.join(TARGETS)}, got a part")
    claims = [(claim, len(findings), len(broken)) for claim, broken in broken_claims(findings).items()]
    held = markdown_table(("what tests hold", "kernels", "broken"), claims)
    registers = {(f["label"], f["dtype"], f["target"]): f.get("registers", 0) for f in findings}
    panels = []
    for target in ("sm_90", "gfx942"):
        bars = [
            (label, registers.get((label, dtype, target), 0), OURS if is_exact(label) or "vote" in label else OURS_TOO)
            for label, dtype in _rows(findings)
        ]
        panels.append((f"registers of a thread, {target}", bars))
    height, text = 0.2 * len(_rows(findings)) + 0.9, f"{held}\n\n{register_table(findings)}"
    write_results("gpu", records, text, panels, height=height, folder=folder, page=page)


def _rows(findings: Sequence[Record]) -> list[tuple[str, str]]:
    """Return kernels of fp32 or packed data; other dtypes differ little."""
    return list(dict.fromkeys((f["label"], f["dtype"]) for f in findings if f["dtype"] in ("fp32", "packed", "codes")))


def register_table(findings: Sequence[Record]) -> str:
    """Tabulate registers of a thread by kernel and GPU, and the widest accesses on sm_90."""
    rows = []
    for label, dtype in _rows(findings):
        of = {f["target"]: f for f in findings if (f["label"], f["dtype"]) == (label, dtype)}
        cells = [of.get(target, {}).get("registers", "") for target in TARGETS]
        rows.append((label, *cells, *(of.get("sm_90", {}).get(part, "") for part in ("loads", "stores"))))
    return markdown_table(("kernel", *TARGETS, "bits loaded", "bits stored"), rows)
