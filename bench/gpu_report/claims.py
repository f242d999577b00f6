"""What is asked of the compiled code, and where it is known not to be so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gpu_report.findings import Finding
from gpu_report.variants import IN_CUT_TILES

# issue-bound time of these is asked to be at most so much of memory-bound time
MOST_ISSUE = 0.6
HELD_ON = ("sm_80", "sm_90")
HELD = (
    "encode",
    "encode_",
    "encode a list",
    "apply",
    "apply with momentum",
    "apply to a list",
    "step",
    "step of a list",
)
HELD += ("vote",)
# what rounds as rule 1 of docs/numerics.md says
EXACT = ("encode", "apply", "step")

# accesses that are narrower than a thread's share of a tensor
NARROW = {
    "scale from chunks": "the number of chunks is any, so each is loaded by itself",
}
# more instructions than asked
BUSY: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Claim:
    """What is asked, of how many findings, those that miss it, and those among them that are not known to."""

    text: str
    asked: int
    missed: tuple[Finding, ...]
    unexpected: tuple[Finding, ...]


def claims_of(findings: Iterable[Finding]) -> list[Claim]:
    """All claims; a finding that a claim does not speak of does not count for it."""
    every = list(findings)
    held = [f for f in every if f.label in HELD and f.target in HELD_ON]
    in_threads = [f for f in every if not f.exchanges]
    lists = [f for f in every if f.exchanges == IN_CUT_TILES]
    exact = [f for f in every if f.label.startswith(EXACT)]
    return [
        _claim("no spills", every, lambda f: f.spills > 0),
        _claim(
            "accesses of a thread as wide as its share of each tensor, up to 128 bits; no byte twice",
            every,
            lambda f: f.is_narrow,
            lambda f: f.label in NARROW,
        ),
        _claim("no shared memory where all values stay in threads", in_threads, lambda f: f.shared > 0),
        _claim(
            "no shared memory for a whole, aligned tile of a list",
            lists,
            lambda f: f.kinds.get("shared", 0) > 0,
            lambda f: f.label in NARROW,
        ),
        _claim("no fused multiply-add and no flush to zero in encode, apply and step", exact, lambda f: bool(f.fused)),
        _claim(
            f"A100, H100: issue-bound at most {MOST_ISSUE:.0%} of memory-bound time in encode, vote, apply and step",
            held,
            lambda f: f.ratio > MOST_ISSUE,
            lambda f: (f.label, f.dtype) in BUSY,
        ),
    ]


def _claim(
    text: str,
    asked: list[Finding],
    misses: Callable[[Finding], bool],
    is_known: Callable[[Finding], bool] = lambda finding: False,
) -> Claim:
    missed = tuple(finding for finding in asked if misses(finding))
    return Claim(text, len(asked), missed, tuple(finding for finding in missed if not is_known(finding)))
