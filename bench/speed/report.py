"""docs/benchmarks.md: the tables, from the names of results alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from speed.results import Result, Results, ResultsError

DTYPES, SIZES = ("fp32", "bf16", "fp16"), ("64Ki", "1Mi", "16Mi")
GPT2, FLAT = "gpt2_small", "one_tensor"
# percent of the stream's bandwidth asked for, of fp32 at 16 Mi
TARGETS = {
    "lion_encode/cpu/fp32/16Mi": 90,
    "apply_votes_/cpu/fp32/16Mi": 90,
    "apply_votes_:momentum/cpu/fp32/16Mi": 90,
    "lion_step_/cpu/fp32/16Mi": 90,
    "majority_vote:8_voters/cpu/packed/16Mi": 70,
    "quantize:2_bits/cpu/fp32/16Mi": 60,
}
LAYOUT_TARGET = 1.1
STOCHASTIC = "quantize:2_bits_stochastic/cpu/fp32/16Mi"
WORDS = "quantize:2_bits_stochastic/its_random_words_alone/fp32/16Mi"
READS = "lion_encode/two_reads/fp32/16Mi"
_LARGEST = "16Mi"

_INTRODUCTION = """\
Written by `make bench`, with the same figures in [benchmarks.json](benchmarks.json).

{machine}

Every round of a call is preceded by one of the stream, `a += s*b` in place on fp32 arrays of together as many bytes
as the call must move, so that both see the same machine. **%** is the bandwidth of the call (bytes that must be
moved, divided by time) relative to the stream's of the same round, the median of the rounds: 5 to 201 of them, fewer
where a call takes half a second. Times are CPU times of the one thread that runs. Calls that move 2 MiB and more
start with caches full of unrelated, unmodified data, and so does the stream; smaller ones are repeated with warm
caches, which is where the cost of a call itself shows. Momentum is fp32. Memory that is freed is kept for later
calls, so that results which a call allocates are in pages that are there already.

More than 100% says that one loop over two arrays, which the stream is, does not get all that a core can move: the
kernels read from four places by turns, which on some processors is twice as fast and on others no faster.

How to follow these figures over commits: [CONTRIBUTING.md](../CONTRIBUTING.md#benchmarks)."""


class Name(NamedTuple):
    """The parts of a kernel's result: ``case/impl/dtype/size``."""

    case: str
    impl: str
    dtype: str
    size: str


def markdown(results: Results) -> str:
    """The whole document. Raises ResultsError where the run was not a whole one."""
    missing = [name for name in (*TARGETS, STOCHASTIC, WORDS, READS) if name not in results.by_name]
    if missing:
        raise ResultsError(f"expected a whole run of `make bench`, got one without {missing[0]}")
    kernels = {Name(*name.split("/")): r for name, r in results.by_name.items() if r.kind == "kernel"}
    sections = [
        ["# Benchmarks", "", _INTRODUCTION.format(machine=_machine(results))],
        ["## Targets", "", *_targets(results.by_name)],
        ["## CPU kernels, 16 Mi elements", "", *_by_dtype(kernels, "cpu")],
        ["## CPU kernels by size", "", *_by_size(kernels, "cpu")],
        ["## Optimizer steps", "", *_steps(results.by_name)],
        ["## Against other ways to do the same", "", *_peers(results.by_name)],
        ["## The reference", "", *_references(kernels)],
    ]
    if any(name.impl == "triton" for name in kernels):
        sections.append(["## Triton kernels, 16 Mi elements", "", *_by_dtype(kernels, "triton")])
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def table(header: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    """A Markdown table: the first column to the left, the others to the right."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _machine(results: Results) -> str:
    machine = dict(results.machine)
    cpu, cores, threads = (machine.pop(part) for part in ("cpu", "cores", "threads"))
    gpu = f" {machine.pop('gpu')};" if "gpu" in machine else ""
    versions = ", ".join(f"{package} {version}" for package, version in machine.items())
    return f"{cpu}, {cores} cores, {threads} thread(s) in use;{gpu} {versions}; commit {results.title}."


def _title(case: str) -> str:
    op, _, way = case.partition(":")
    return f"`{op}`" + (f", {way.replace('_', ' ')}" if way else "")


def _targets(by_name: dict[str, Result]) -> Iterator[str]:
    yield "fp32, 16 Mi elements, one thread."
    yield ""

    def rows() -> Iterator[Sequence[str]]:
        for name, percent in TARGETS.items():
            measured = by_name[name].ratio
            yield _row(
                _title(name.split("/")[0]),
                f"{measured:.0%} of the stream",
                f">= {percent} %",
                measured >= percent / 100,
            )
        for dtype in DTYPES:
            for optimizer in ("Lion", "LionCub"):
                spread = _layout_cost(by_name, optimizer, dtype)
                if spread is not None:
                    what = f"`{optimizer}.step`, {dtype}: GPT-2 small's 148 tensors"
                    yield _row(
                        what, f"{spread:.2f} of one tensor's time", f"<= {LAYOUT_TARGET}", spread <= LAYOUT_TARGET
                    )
        share = by_name[STOCHASTIC].ratio / by_name[WORDS].ratio
        yield _title(STOCHASTIC.split("/")[0]), f"{share:.0%} of its time is its random words'", "", ""

    yield from table(("what", "measured", "asked for", "met"), rows())
    yield ""
    yield (
        "`lion_encode` only reads, but for one bit per element: a core that only reads moves fewer bytes per second "
        f"than the stream. The fastest such loop found reaches {by_name[READS].ratio:.0%}."
    )


def _row(what: str, measured: str, asked: str, is_met: bool) -> Sequence[str]:
    return what, measured, asked, "yes" if is_met else "no"


def _by_dtype(kernels: dict[Name, Result], impl: str) -> Iterator[str]:
    impls = (impl, "torch") if impl == "cpu" else (impl,)
    cases = dict.fromkeys(name.case for name in kernels if name.impl in impls)
    header = ["op", *(f"{dtype} {unit}" for dtype in DTYPES for unit in ("GB/s", "%"))]

    def rows() -> Iterator[Sequence[str]]:
        for case in cases:
            cells: list[str] = []
            for dtype in DTYPES:
                found = _find(kernels, case, impls, dtype, _LARGEST)
                cells += ["", ""] if found is None else [f"{found.gigabytes_per_second:.1f}", f"{found.ratio:.0%}"]
            yield _title(case), *cells

    yield "Ops on packed codes, which have no other dtype, stand under fp32."
    yield ""
    yield from table(header, rows())


def _by_size(kernels: dict[Name, Result], impl: str) -> Iterator[str]:
    impls = (impl, "torch")
    cases = dict.fromkeys(name.case for name in kernels if name.impl in impls)

    def rows() -> Iterator[Sequence[str]]:
        for case in cases:
            found = [_find(kernels, case, impls, "fp32", size) for size in SIZES]
            if any(found):
                yield (
                    _title(case),
                    *("" if r is None else f"{1e3 * r.milliseconds:,.0f}" for r in found),
                    *("" if r is None else f"{r.ratio:.0%}" for r in found),
                )

    yield "fp32 or packed codes; µs of a call, and % of the stream."
    yield ""
    yield from table(["op", *(f"{size} {unit}" for unit in ("µs", "%") for size in SIZES)], rows())


def _steps(by_name: dict[str, Result]) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for name, result in by_name.items():
            if name.startswith("step:"):
                optimizer, layout, dtype = name.removeprefix("step:").split("/")
                yield optimizer, layout.replace("_", " "), dtype, f"{result.milliseconds:.1f}", f"{result.ratio:.0%}"

    yield "124.4 M parameters: GPT-2 small's 148 tensors, or one tensor. `LionCub` is one worker and exchanges nothing."
    yield ""
    yield from table(("optimizer", "layout", "dtype", "ms", "%"), rows())


def _peers(by_name: dict[str, Result]) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for name, theirs in by_name.items():
            if theirs.kind != "peer" or name in (READS, WORDS):
                continue
            if name.startswith("step:"):
                ours, title, way = by_name[f"step:Lion/{GPT2}/fp32"], "`Lion.step`, GPT-2 small", name[5:].split("/")[0]
            else:
                case, way, *_ = name.split("/")
                ours = next(by_name[key] for d in ("fp32", "packed") if (key := f"{case}/cpu/{d}/16Mi") in by_name)
                title = _title(case)
            times = f"{ours.ratio / theirs.ratio:.1f}"
            yield title, f"{ours.milliseconds:.2f}", way.replace("_", " "), f"{theirs.milliseconds:.1f}", times

    yield (
        "fp32, 16 Mi elements or GPT-2 small. torch.compile has compiled the reference. Ratios of medians, each "
        "relative to the stream of its own rounds."
    )
    yield ""
    yield from table(("op", "ms", "instead of", "ms", "times faster"), rows())


def _references(kernels: dict[Name, Result]) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for case in dict.fromkeys(name.case for name in kernels if name.impl == "reference"):
            cells = []
            for dtype in DTYPES:
                fast, plain = (_find(kernels, case, (impl,), dtype, _LARGEST) for impl in ("cpu", "reference"))
                cells.append("" if fast is None or plain is None else f"{fast.ratio / plain.ratio:.0f}")
            yield _title(case), *cells

    yield 'How many times as long `impl="reference"` takes as `impl="cpu"`, 16 Mi elements: it is the specification.'
    yield ""
    yield from table(("op", *DTYPES), rows())


def _find(kernels: dict[Name, Result], case: str, impls: Sequence[str], dtype: str, size: str) -> Result | None:
    dtypes = (dtype, "packed") if dtype == "fp32" else (dtype,)
    keys = [Name(case, impl, d, size) for impl in impls for d in dtypes]
    return next((kernels[key] for key in keys if key in kernels), None)


def _layout_cost(by_name: dict[str, Result], optimizer: str, dtype: str) -> float | None:
    many, one = (by_name.get(f"step:{optimizer}/{layout}/{dtype}") for layout in (GPT2, FLAT))
    return None if many is None or one is None else one.ratio / many.ratio
