"""Stored results and their comparison: ratios, tolerance, exit codes, errors and warnings. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from speed import report
from speed.cli import SAME, SLOWER, WRONG_INPUT, main
from speed.compare import TOLERANCE, compare, describe
from speed.results import Result, Results, ResultsError, read_results, read_run, write_results

MACHINE = {"cpu": "Fast 1", "cores": "2", "threads": "1", "python": "3.11.7", "torch": "2.13.0", "numba": "0.68.1"}
ENCODE, VOTE = "lion_encode/cpu/fp32/16Mi", "majority_vote:8_voters/cpu/packed/16Mi"


def result(ratio: float, spread: float = 0.02, kind: str = "kernel") -> Result:
    return Result(kind, ratio, ratio * (1 - spread), ratio * (1 + spread), 10.0, 31, 1.5)


def results(by_name: dict[str, Result], machine: dict[str, str] | None = None) -> Results:
    return Results("0123456789abcdef", False, "2026-01-02T03:04:05", machine or MACHINE, by_name)


def entry(
    name: str, op: Sequence[float], streams: Sequence[float], kind: str = "kernel", calls: int = 1
) -> dict[str, Any]:
    """A benchmark as pytest-benchmark writes it: a call moves 24 bytes, a round of the stream 12."""
    info = {
        "kind": kind,
        "name": name,
        "bytes": 24 * calls,
        "calls": calls,
        "stream_bytes": 12,
        "stream_seconds": list(streams),
        "machine": MACHINE,
    }
    return {"name": f"test_kernel[{name}]", "extra_info": info, "stats": {"data": list(op)}}


def run_file(path: Path, *entries: dict[str, Any]) -> Path:
    run = {
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": list(entries),
    }
    path.write_text(json.dumps(run))
    return path


def test_a_ratio_is_the_median_of_those_of_the_rounds(tmp_path: Path) -> None:
    # the second round was disturbed, and its stream with it; bandwidths are 24/op and 12/stream
    run = read_run(run_file(tmp_path / "run.json", entry(ENCODE, [4.0, 40.0, 5.0], [1.0, 10.0, 1.0])))
    found = run.by_name[ENCODE]
    assert found.ratio == pytest.approx(24 / 4 / 12)
    assert (found.low, found.high) == (pytest.approx(0.45), pytest.approx(0.5))
    assert found.gigabytes_per_second == pytest.approx(24 / 5 / 1e9)
    assert (found.rounds, found.milliseconds, found.kind) == (3, 5000.0, "kernel")
    assert (run.commit, run.is_dirty, run.machine) == ("0123456789abcdef", True, MACHINE)


def test_calls_of_a_round_count_once_each(tmp_path: Path) -> None:
    run = read_run(run_file(tmp_path / "run.json", entry(ENCODE, [40.0], [1.0], calls=10)))
    assert run.by_name[ENCODE].milliseconds == 4000.0
    assert run.by_name[ENCODE].ratio == pytest.approx(0.5)
    assert run.by_name[ENCODE].low == run.by_name[ENCODE].high == run.by_name[ENCODE].ratio


def test_what_is_stored_is_read_back_and_has_no_seconds(tmp_path: Path) -> None:
    stored = results({ENCODE: result(0.75), VOTE: result(0.5)})
    write_results(stored, tmp_path / "new folder" / "a.json")
    text = (tmp_path / "new folder" / "a.json").read_text()
    assert "seconds" not in text
    back = read_results(tmp_path / "new folder" / "a.json")
    assert back.by_name[ENCODE].ratio == 0.75
    assert back.by_name[ENCODE].milliseconds == 0.0
    assert (back.commit, back.is_dirty, back.date, back.machine) == (
        stored.commit,
        stored.is_dirty,
        stored.date,
        stored.machine,
    )


@pytest.mark.parametrize(
    ("new", "slower", "faster"),
    [(0.75, 0, 0), (0.75 / 1.24, 0, 0), (0.75 / 1.26, 1, 0), (0.75 * 1.24, 0, 0), (0.75 * 1.26, 0, 1)],
)
def test_what_takes_longer_past_the_tolerance_is_slower(new: float, slower: int, faster: int) -> None:
    comparison = compare(results({ENCODE: result(0.75)}), results({ENCODE: result(new)}), 0.25)
    assert (len(comparison.slower), len(comparison.faster)) == (slower, faster)


def test_a_change_within_the_spread_of_the_rounds_is_none() -> None:
    old, new = results({ENCODE: result(0.75, spread=0.4)}), results({ENCODE: result(0.5, spread=0.4)})
    assert not compare(old, new, 0.1).slower
    assert not compare(new, old, 0.1).faster


def test_the_worst_comes_first() -> None:
    old = results({ENCODE: result(0.8), VOTE: result(0.8), "other": result(0.8)})
    new = results({ENCODE: result(0.4), VOTE: result(0.2), "other": result(0.8)})
    comparison = compare(old, new)
    assert [change.name for change in comparison.slower] == [VOTE, ENCODE]
    assert [change.slowdown for change in comparison.slower] == [pytest.approx(3.0), pytest.approx(1.0)]
    text = describe(comparison)
    assert "3 benchmarks compared, tolerance 50%: 2 slower, 0 faster" in text
    assert "80.0%" in text
    assert "+300.0%  slower" in text
    assert "other" not in text, "only what changed is in the table"


def test_peers_and_the_reference_are_compared_when_asked_for() -> None:
    names = [ENCODE, "lion_encode/reference/fp32/16Mi", "lion_step_/lion-pytorch/fp32/16Mi"]
    kinds = ["kernel", "kernel", "peer"]
    old, new = (results({n: result(r, kind=k) for n, k in zip(names, kinds, strict=True)}) for r in (0.8, 0.2))
    assert [change.name for change in compare(old, new).changes] == names[:1]
    assert [change.name for change in compare(old, new, everything=True).changes] == names


def test_other_machines_threads_versions_and_parts_are_warned_of() -> None:
    other = {**MACHINE, "cpu": "Slow 2", "threads": "4", "gpu": "H100"}
    old = results({ENCODE: result(0.8), VOTE: result(0.8)})
    new = results({ENCODE: result(0.8), "added": result(0.8)}, other)
    text = describe(compare(old, new))
    assert "warning: cpu: Fast 1 (old), Slow 2 (new)" in text
    assert "warning: threads: 1 (old), 4 (new)" in text
    assert "warning: gpu: none (old), H100 (new)" in text
    assert f"warning: 1 benchmarks are not in the new run, first {VOTE}" in text
    assert "warning: 1 benchmarks are not in the old run, first added" in text
    assert "torch" not in text
    assert "warning" not in describe(compare(old, old))


def test_runs_without_anything_in_common_are_refused() -> None:
    with pytest.raises(ResultsError, match="no benchmark in common"):
        compare(results({ENCODE: result(0.8)}), results({VOTE: result(0.8)}))


@pytest.mark.parametrize("tolerance", [0.0, -0.1, float("nan"), float("inf")])
def test_an_impossible_tolerance_is_refused(tolerance: float) -> None:
    with pytest.raises(ValueError, match=r"tolerance: expected a number > 0, got"):
        compare(results({ENCODE: result(0.8)}), results({ENCODE: result(0.8)}), tolerance)


class Folder:
    """The command line in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, *arguments: str) -> int:
        return main(["--run", str(self.path / "run.json"), "--store", str(self.path / "store"), *arguments])

    def measure(self, seconds: float) -> None:
        run_file(self.path / "run.json", entry(ENCODE, [seconds] * 3, [1.0] * 3), entry(VOTE, [4.0] * 3, [1.0] * 3))


@pytest.fixture
def bench(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_save_and_compare(bench: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    bench.measure(4.0)
    assert bench("save", "before") == SAME
    assert bench("compare", "--old", "before") == SAME
    assert "2 benchmarks compared, tolerance 50%: 0 slower, 0 faster" in capsys.readouterr().out
    bench.measure(6.5)
    assert bench("compare", "--old", "before") == SLOWER
    printed = capsys.readouterr().out
    assert ENCODE in printed
    assert VOTE not in printed
    assert bench("compare", "--old", "before", "--tolerance", "0.7") == SAME
    assert bench("save", "after") == SAME
    bench.measure(4.0)
    assert bench("compare", "--old", "before", "--new", "after") == SLOWER
    assert bench("compare", "--old", "after", "--new", "before") == SAME, "what got faster is no failure"
    assert "1 faster" in capsys.readouterr().out


def test_a_run_is_stored_under_the_commit_that_was_measured(bench: Folder) -> None:
    bench.measure(4.0)
    assert bench("save") == SAME
    assert [path.name for path in (bench.path / "store").iterdir()] == ["0123456789ab-dirty.json"]


def test_a_path_serves_as_a_name(bench: Folder) -> None:
    bench.measure(4.0)
    path = str(bench.path / "elsewhere.json")
    assert bench("save", path) == SAME
    assert bench("compare", "--old", path) == SAME


def test_what_was_committed_is_compared_with_by_default(
    bench: Folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def git(*arguments: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *names, *arguments], cwd=bench.path, check=True, capture_output=True)

    monkeypatch.chdir(bench.path)
    bench.measure(4.0)
    git("init")
    assert bench("compare") == WRONG_INPUT
    assert "HEAD:docs/benchmarks.json: expected a file in git's history: fatal" in capsys.readouterr().err
    assert bench("save", "docs/benchmarks.json") == SAME
    git("add", "docs")
    git("commit", "--message", "one")
    bench.measure(8.0)
    assert bench("save", "docs/benchmarks.json", "--overwrite") == SAME
    assert bench("compare") == SLOWER, "not with the file that the last run has written"
    assert bench("compare", "--old", "docs/benchmarks.json") == SAME


def test_nothing_is_overwritten_unasked(bench: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    bench.measure(4.0)
    assert bench("save", "a") == SAME
    bench.measure(8.0)
    assert bench("save", "a") == WRONG_INPUT
    assert "a.json: there is one already" in capsys.readouterr().err
    assert bench("compare", "--old", "a") == SLOWER
    assert bench("save", "a", "--overwrite") == SAME
    assert bench("compare", "--old", "a") == SAME


def test_wrong_input_has_an_exit_code_and_a_reason_of_its_own(
    bench: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert bench(*arguments) == WRONG_INPUT
        return capsys.readouterr().err

    assert "run.json: no such file; run `make bench` first" in refused("save", "a")
    bench.measure(4.0)
    assert "absent.json: no such file; store one with `make bench-save NAME=...`" in refused(
        "compare", "--old", "absent"
    )
    assert "NAME: expected a file's name" in refused("save", "../a")
    assert bench("save", "a") == SAME
    assert "tolerance: expected a number > 0, got 0.0" in refused("compare", "--old", "a", "--tolerance", "0")
    stored = bench.path / "store" / "a.json"
    good = json.loads(stored.read_text())
    for text, reason in [
        ("{", "expected JSON, got"),
        ("[]", "expected results of format 1, got 'list'"),
        (json.dumps({**good, "format": 2}), "expected results of format 1, got 2"),
        (json.dumps({k: v for k, v in good.items() if k != "machine"}), "expected stored results, got one without"),
        (json.dumps({**good, "results": {ENCODE: {"ratio": 1.0}}}), "expected stored results, got"),
        (
            json.dumps({**good, "results": {ENCODE: {**good["results"][ENCODE], "ratio": 0.0}}}),
            f"got a ratio of 0.0 for {ENCODE}",
        ),
    ]:
        stored.write_text(text)
        assert reason in refused("compare", "--old", "a")
    (bench.path / "run.json").write_text('{"benchmarks": []}')
    assert "run.json: expected a run of `make bench`" in refused("save", "b")


def test_an_unknown_option_exits_with_2(bench: Folder) -> None:
    with pytest.raises(SystemExit) as caught:
        bench("compare", "--olf", "a")
    assert caught.value.code == WRONG_INPUT


def whole_run(path: Path) -> Path:
    names = [*report.TARGETS, report.STOCHASTIC, "lion_encode/reference/fp32/16Mi", "lion_encode/cpu/bf16/64Ki"]
    entries = [entry(name, [4.0], [1.0]) for name in names]
    entries += [entry(report.WORDS, [1.0], [1.0], "peer"), entry(report.READS, [2.0], [1.0], "peer")]
    entries += [entry(f"step:Lion/{layout}/fp32", [4.0], [1.0], "step") for layout in (report.GPT2, report.FLAT)]
    entries += [entry("lion_step_/lion-pytorch/fp32/16Mi", [40.0], [1.0], "peer")]
    entries += [entry("step:lion-pytorch/gpt2_small/fp32", [20.0], [1.0], "peer")]
    return run_file(path, *entries)


def test_the_report_has_tables_and_the_ratios_beside_them(bench: Folder) -> None:
    whole_run(bench.path / "run.json")
    document = bench.path / "benchmarks.md"
    assert bench("report", str(document)) == SAME
    text = document.read_text()
    assert "Fast 1, 2 cores, 1 thread(s) in use; python 3.11.7" in text
    assert "| `lion_encode` | 50% of the stream | >= 90 % | no |" in text
    assert "| `Lion.step`, fp32: GPT-2 small's 148 tensors | 1.00 of one tensor's time | <= 1.1 | yes |" in text
    assert "25% of its time is its random words'" in text
    assert "The fastest such loop found reaches 100%." in text
    assert "| `lion_step_` | 4000.00 | lion-pytorch | 40000.0 | 10.0 |" in text
    assert "| `Lion.step`, GPT-2 small | 4000.00 | lion-pytorch | 20000.0 | 5.0 |" in text
    assert "triton" not in text.lower(), "nothing was measured with it"
    assert len(read_results(document.with_suffix(".json")).by_name) == 15


def test_a_part_of_a_run_makes_no_report(bench: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    bench.measure(4.0)
    assert bench("report", str(bench.path / "benchmarks.md")) == WRONG_INPUT
    assert "expected a whole run of `make bench`, got one without" in capsys.readouterr().err
    assert not (bench.path / "benchmarks.md").exists()


def test_the_default_tolerance_is_that_of_the_docs() -> None:
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    assert f"default tolerance is {TOLERANCE:.0%}" in text
