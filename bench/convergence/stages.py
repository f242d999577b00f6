"""What to run, in the order of its importance. Each stage says what it wants by what is known so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from convergence.methods import METHODS, REFERENCE
from convergence.results import FACTORS, Cell, Results, cell_of, families, grid, grid_configs
from convergence.statistics import recovered_share
from convergence.tasks import TASKS
from convergence.training import Config

PLAIN_VOTE = "SignVote"
# of LionCub
DEFAULT = "BySize"
# candidates for the default, and for skewed shards, whatever the screen says
CANDIDATES = (PLAIN_VOTE, DEFAULT, "SignVote + staggered 64 int8", "SignVote + staggered 32 int8")
SKEWED_CANDIDATES = (
    PLAIN_VOTE,
    DEFAULT,
    "SignVote + staggered 9 int8",
    "SignVote + staggered 4 int8",
    "SignVote + staggered 16 int8",
    "2-bit l2 shared + staggered 16 int8",
    "2-bit l2 shared + staggered 32 int8",
)
# least ratios of fp32's bytes to a method's; the best method of each joins the candidates
RATIOS = (24.0, 7.0)
SKEWED_RATIO = 15.0
SCREEN_SEEDS = 2
WORKERS, SCREEN_WORKERS = (4, 16), (8,)
LIMIT = 0.01
FEWEST_SEEDS, SEEDS_AT_ONCE = 6, 6
IID_SEEDS = {"text": 32, "digits": 32}
SKEWED_SEEDS = {"text": 10, "digits": 20}
CLAIM_SEEDS = {"text": 5, "digits": 8}
BREADTH_SEEDS = 2
# the width of the interval of a recovered share at which it is settled
SHARE_WIDTH = 0.2
QUANTIZED = ("2-bit l1", "2-bit linf", "4-bit l1", "4-bit linf", "2-bit l2 shared + staggered 16 int8")
SELECTIVE = ("SignVote + every 1 fp32", "SignVote + auto 0.25", "SignVote + auto 1.0")

Stage = Callable[[Results, bool], Iterator[Config]]


def tune(results: Results, at_most: bool) -> Iterator[Config]:
    """Every family's learning rates; the middle of the grid first."""
    order = sorted(range(len(FACTORS)), key=lambda i: abs(i - len(FACTORS) // 2))
    for i in order:
        for family in families():
            for task in TASKS:
                yield from grid_configs(task, family, grid(task, family)[i])


def screen(results: Results, at_most: bool) -> Iterator[Config]:
    """Every method, few seeds, one number of workers."""
    for seed in range(SCREEN_SEEDS):
        for cell in _cells(("iid", "skewed"), SCREEN_WORKERS):
            yield from (results.config(cell, method, seed) for method in METHODS)


def decide_iid(results: Results, at_most: bool) -> Iterator[Config]:
    """The candidates, until the interval of their difference to plain Lion is all within 1 %, or all beyond it."""
    for cell in _cells(("iid",)):
        for method in candidates(results, "iid"):
            settled = _is_settled(results, cell, method)
            yield from _paired(results, cell, (REFERENCE, method), settled, IID_SEEDS[cell.task], at_most)


def decide_skewed(results: Results, at_most: bool) -> Iterator[Config]:
    """Unsynchronized votes and the candidates, until the share of the loss that they recover is known."""
    for cell in _cells(("skewed",)):
        for method in candidates(results, "skewed"):
            if method == PLAIN_VOTE:
                continue
            settled = _is_share_settled(results, cell, method)
            compared = (REFERENCE, PLAIN_VOTE, method)
            yield from _paired(results, cell, compared, settled, SKEWED_SEEDS[cell.task], at_most)


def claims(results: Results, at_most: bool) -> Iterator[Config]:
    """What the paper says of norms and of selective synchronization, more seeds."""
    for methods, how in ((QUANTIZED, "iid"), (SELECTIVE, "skewed")):
        for cell in _cells((how,)):
            for method in (REFERENCE, PLAIN_VOTE, *methods):
                yield from (results.config(cell, method, seed) for seed in range(CLAIM_SEEDS[cell.task]))


def breadth(results: Results, at_most: bool) -> Iterator[Config]:
    """The candidates with other numbers of workers, and with larger batches."""
    methods = (REFERENCE, *CANDIDATES, "SignMean", "2-bit l1")
    cells = [cell_of(task, how, workers) for task in TASKS for how in ("iid", "skewed") for workers in (8, 32)]
    cells += [cell_of(task, "iid", workers, batches=4) for task in TASKS for workers in WORKERS]
    for cell in cells:
        for method in methods:
            yield from (results.config(cell, method, seed) for seed in range(BREADTH_SEEDS))


STAGES: dict[str, Stage] = {
    "tune": tune,
    "screen": screen,
    "decide-iid": decide_iid,
    "decide-skewed": decide_skewed,
    "claims": claims,
    "breadth": breadth,
}


def quick(results: Results, at_most: bool) -> Iterator[Config]:
    """One table: digits, equal shards, 4 workers, few methods at the default learning rate, 3 seeds."""
    cell = cell_of("digits", "iid", 4)
    for seed in range(3):
        for method in (REFERENCE, *CANDIDATES, "SignMean", "TernaryVote", "2-bit l1", "2-bit linf"):
            yield results.config(cell, method, seed)


def candidates(results: Results, how: str) -> list[str]:
    """The candidates, and of each byte budget the method that did best in the screen of such shards."""
    found = list(CANDIDATES if how == "iid" else SKEWED_CANDIDATES)
    for ratio in RATIOS if how == "iid" else (SKEWED_RATIO,):
        ranked = ranking(results, how, ratio)
        found += ranked[:1] if how == "iid" else ranked[:2]
    return list(dict.fromkeys(found))


def ranking(results: Results, how: str, ratio: float) -> list[str]:
    """LionCub's methods within a byte budget, best mean relative difference in the screen first."""
    scores = {}
    for name, method in METHODS.items():
        if method.compression is None:
            continue
        found = [_screened(results, cell, name, ratio) for cell in _cells((how,), SCREEN_WORKERS)]
        if None not in found:
            scores[name] = sum(score for score in found if score is not None) / len(found)
    return sorted(scores, key=lambda name: (scores[name], name))


def _screened(results: Results, cell: Cell, method: str, ratio: float) -> float | None:
    """Mean relative difference over the screen's seeds alone, so that later ones do not change who is a candidate."""
    reached = results.bytes_ratio(cell, method)
    pairs = [results.runs(cell, name) for name in (method, REFERENCE)]
    if reached is None or reached < ratio or not all(seed in runs for runs in pairs for seed in range(SCREEN_SEEDS)):
        return None
    return (
        sum(pairs[0][seed]["final_loss"] / pairs[1][seed]["final_loss"] - 1 for seed in range(SCREEN_SEEDS))
        / SCREEN_SEEDS
    )


def _cells(shards: Sequence[str], workers: Sequence[int] = WORKERS) -> list[Cell]:
    return [cell_of(task, how, n) for task in TASKS for how in shards for n in workers]


def _paired(
    results: Results, cell: Cell, methods: Sequence[str], settled: bool, most: int, at_most: bool
) -> Iterator[Config]:
    """Runs of seeds that are there or begun; some more where these do not settle the matter."""
    common = len(results.losses(cell, *methods)[0])
    wanted = most if at_most else FEWEST_SEEDS if common < FEWEST_SEEDS else common + SEEDS_AT_ONCE * (not settled)
    for seed in range(min(wanted, most)):
        yield from (results.config(cell, method, seed) for method in methods)


def _is_settled(results: Results, cell: Cell, method: str) -> bool:
    found = results.difference(cell, method)
    return found is not None and found.count >= FEWEST_SEEDS and (found.within(LIMIT) or found.beyond(LIMIT))


def _is_share_settled(results: Results, cell: Cell, method: str) -> bool:
    found = recovered_share(*results.losses(cell, method, PLAIN_VOTE, REFERENCE))
    return found is not None and found.count >= FEWEST_SEEDS and found.high - found.low <= SHARE_WIDTH
