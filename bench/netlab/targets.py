"""What the comparison has to show, and whether it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from netlab.matrix import DECIDING_WORKERS
from netlab.names import ALGORITHM_OF, BASELINE, FLOOR, OVERLAP, TITLES
from netlab.rates import rate_name
from netlab.records import Record, of_kind
from netlab.summary import (
    Cell,
    Repetition,
    Table,
    alone_share,
    fastest,
    fixed_rivals,
    headline,
    paired_ratio,
    step_of,
)

SPEEDUPS = {10**8: 16.0, 10**9: 3.6, 10**10: 1.75}
FLOOR_SHARE, FLOOR_RATES = 0.85, (10**9, 10**10)
ALONE_SHARES = {10**8: 0.9, 10**9: 0.8}
OVERLAP_FACTOR, OVERLAP_RATE = 1.15, 10**8
AUTO_FACTOR = 1.05
PREDICTION_ERROR, PREDICTION_SHARE = 0.2, 0.9
TWO_LEVEL_BYTES = 0.8


@dataclass(frozen=True)
class Target:
    """A figure that was asked for: at least (or at most) ``limit``; ``got`` is what the run shows."""

    name: str
    limit: float
    got: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.got <= self.limit if self.at_most else self.got >= self.limit


def targets_of(table: Table, records: list[Record]) -> list[Target]:
    """All that the findings can answer."""
    targets: list[Target] = []
    for cell, methods in deciding(table).items():
        where = f"{cell.model}, {rate_name(cell.rate)}"
        targets += speed_targets(cell, methods, where)
        targets += wire_targets(cell, methods, where)
    targets += auto_targets(table)
    errors = [error for _, _, error in prediction_errors(table)]
    if errors:
        share = sum(abs(error) <= PREDICTION_ERROR for error in errors) / len(errors)
        targets.append(Target("cells predicted within 20%", PREDICTION_SHARE, share))
    return [*targets, *two_level_targets(table, records)]


def deciding(table: Table) -> Table:
    """The cells of four workers on hosts of their own."""
    return {cell: methods for cell, methods in table.items() if cell.hosts == DECIDING_WORKERS and cell.per_host == 1}


def speed_targets(cell: Cell, methods: dict[str, list[Repetition]], where: str) -> Iterator[Target]:
    """Speedup over the baseline, and its share of the compute floor's."""
    name = headline(methods)
    if name is None:
        return
    if cell.rate in SPEEDUPS and BASELINE in methods:
        speedup = paired_ratio(methods[BASELINE], methods[name]).median
        yield Target(f"speedup over {TITLES[BASELINE]} ({where})", SPEEDUPS[cell.rate], speedup)
    if cell.rate in FLOOR_RATES and FLOOR in methods:
        share = paired_ratio(methods[FLOOR], methods[name]).median
        yield Target(f"share of the compute floor's speedup ({where})", FLOOR_SHARE, share)


def wire_targets(cell: Cell, methods: dict[str, list[Repetition]], where: str) -> Iterator[Target]:
    """Exchanges alone against the wire limit, and the step with overlap against its parts."""
    alone = "lioncub_auto"
    share = alone_share(cell, methods.get(alone, []))
    if cell.rate in ALONE_SHARES and share is not None:
        yield Target(f"exchange alone against the wire limit ({where})", ALONE_SHARES[cell.rate], share.median)
    overlapped = alone + OVERLAP
    if cell.rate == OVERLAP_RATE and overlapped in methods:
        factor = overlap_factor(cell, methods, overlapped)
        if factor is not None:
            yield Target(
                f"step with overlap over forward + max(backward, wire) + apply ({where})",
                OVERLAP_FACTOR,
                factor,
                at_most=True,
            )


def overlap_factor(cell: Cell, methods: dict[str, list[Repetition]], name: str) -> float | None:
    """Step time with overlap over what it would be if it were hidden perfectly; the parts are the compute floor's."""
    floor, own = methods.get(FLOOR), methods[name]
    if floor is None or own[0].bytes_sent is None:
        return None
    wire = 8 * own[0].bytes_sent / cell.rate
    parts = [r.forward + max(r.backward, wire) + r.optimizer for r in floor]
    return step_of(own).median / median(parts)


def auto_targets(table: Table) -> Iterator[Target]:
    """The automatic choice against the best fixed one, where they differ by more than repetitions scatter."""
    for cell, methods in table.items():
        for auto in (name for name in methods if ALGORITHM_OF.get(name) == "auto"):
            best = fastest(methods, fixed_rivals(auto))
            if best is not None:
                ratio = paired_ratio(methods[auto], methods[best])
                if ratio.resolved:
                    where = f"{cell.workers} workers, {cell.model}, {rate_name(cell.rate)}"
                    yield Target(f"{TITLES[auto]} over {TITLES[best]} ({where})", AUTO_FACTOR, ratio.median, True)


def prediction_errors(table: Table) -> list[tuple[Cell, str, float]]:
    """For every fixed algorithm of every cell: predicted over measured time of an exchange alone, minus 1."""
    errors = []
    for cell, methods in table.items():
        for name, repetitions in methods.items():
            pairs = [(r.predicted, r.alone) for r in repetitions if r.predicted is not None and r.alone]
            if pairs and cell.per_host == 1:
                predicted, measured = (median(values) for values in zip(*pairs, strict=True))
                errors.append((cell, name, predicted / measured - 1))
    return errors


def two_level_targets(table: Table, records: list[Record]) -> Iterator[Target]:
    """Bytes over the slow link, and whether all algorithms come to the same parameters."""
    for cell, methods in table.items():
        flat, deep = methods.get("lioncub_reduce_scatter"), methods.get("lioncub_hierarchical")
        if cell.per_host > 1 and flat and deep:
            share = median(r.sent for r in deep) / median(r.sent for r in flat)
            name = f"bytes over the slow link, hierarchical over reduce_scatter ({rate_name(cell.rate)})"
            yield Target(name, TWO_LEVEL_BYTES, share, at_most=True)
    digests = [digest for record in of_kind(records, "digest") for digest in record["digests"]]
    if digests:
        name = "different parameters after the same steps by different algorithms, two levels"
        yield Target(name, 0, len(set(digests)) - 1, at_most=True)
