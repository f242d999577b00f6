"""Records, tables and their places in pages, and the comparison of two runs of the speed benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkouts import link_library
from reporting.pages import insert, machine_line, markdown_table, median_ratio
from reporting.records import ROOT, Journal, Record, RecordsError, read_records, run_record, write_records
from speed.cli import SAME, SLOWER, WRONG_INPUT, main
from speed.compare import merged

ENCODE, VOTE = "lion_encode/cpu/fp32/16Mi", "majority_vote:8_voters/cpu/packed/16Mi"
PEER, REFERENCE = "lion_encode/numpy/fp32/16Mi", "lion_encode/reference/fp32/16Mi"


def finding(name: str, ratio: float, spread: float = 0.02) -> Record:
    kind = "peer" if name == PEER else "kernel"
    return {"kind": kind, "name": name, "ratio": ratio, "low": ratio * (1 - spread), "high": ratio * (1 + spread)}


def run_of(*findings: Record, **facts: Any) -> list[Record]:
    return [{**run_record(), **facts}, *findings]


def test_records_are_read_back_and_a_last_line_may_be_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.jsonl"
    write_records(path, run_of({"kind": "x", "values": [1 / 3, 2], "of": {"y": 0.1234567}}))
    run, found = read_records(path)
    assert found == {"kind": "x", "values": [0.33333, 2], "of": {"y": 0.12346}}
    assert set(run) == {"kind", "date", "commit", "dirty", "machine"}
    with path.open("a") as file:
        file.write('{"kind": "cut')
    assert len(read_records(path)) == 2
    with Journal(path, append=True) as journal:
        journal.write({"kind": "next"})
    assert [record["kind"] for record in read_records(path)] == ["run", "x", "next"]
    path.write_text(path.read_text().replace('{"kind": "next"}', '{"kind": "cut\n{"kind": "next"}'))
    with pytest.raises(RecordsError, match="expected JSON in line 3"):
        read_records(path)


@pytest.mark.parametrize("text", ["", '{"kind": "kernel"}\n', "[1]\n"])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(RecordsError, match="No such file"):
        read_records(path)
    path.write_text(text)
    with pytest.raises(RecordsError, match=r"a\.jsonl: "):
        read_records(path)


def test_records_of_git_s_history() -> None:
    with pytest.raises(RecordsError, match="in git's history"):
        read_records("HEAD:no/such/file.jsonl")


def test_a_table_takes_its_place_in_a_page(tmp_path: Path) -> None:
    table = markdown_table(("op", "ms"), [("`a`", 1.5), ("b", r"\1")])
    assert table == "| op | ms |\n|---|---:|\n| `a` | 1.5 |\n| b | \\1 |"
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- x -->old<!-- /x -->\nafter\n")
    for _ in range(2):
        insert(page, "x", table)
        assert page.read_text() == f"before\n<!-- x -->\n\n{table}\n\n<!-- /x -->\nafter\n"
    with pytest.raises(ValueError, match="expected the marks <!-- y -->"):
        insert(page, "y", table)


def test_ratios_and_the_machine() -> None:
    assert median_ratio([2, 9, 4], [1, 3, 1]) == (3, 2, 4)
    line = machine_line({**run_record(), "commit": "0123456789abcdef", "dirty": True, "date": "2026-01-02T03:04:05"})
    assert line.endswith("commit 0123456789ab with changes, 2026-01-02.")
    assert "thread(s); python 3" in line


def compared(folder: Path, old: list[Record], new: list[Record], *options: str) -> int:
    write_records(folder / "old.jsonl", old)
    write_records(folder / "run.jsonl", new)
    return main(["--run", f"{folder}/run.jsonl", "--store", str(folder), "compare", "--old", "old", *options])


def test_slower_and_faster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = run_of(finding(ENCODE, 1.0), finding(VOTE, 0.5))
    assert compared(tmp_path, old, run_of(finding(ENCODE, 0.5), finding(VOTE, 1.0))) == SLOWER
    words = capsys.readouterr().out
    assert f"slower   100.0% ->    50.0% of the stream, time +100.0%  {ENCODE}" in words
    assert "1 slower, 1 faster" in words
    # half as long again is within the tolerance, and so is twice as long where the rounds overlap
    assert compared(tmp_path, old, run_of(finding(ENCODE, 0.67), finding(VOTE, 0.5))) == SAME
    assert compared(tmp_path, old, run_of(finding(ENCODE, 0.5, spread=1.5), finding(VOTE, 0.5))) == SAME
    assert compared(tmp_path, old, run_of(finding(ENCODE, 0.8), finding(VOTE, 0.5)), "--tolerance", "0.1") == SLOWER


def test_peers_and_the_reference_count_only_when_asked(tmp_path: Path) -> None:
    old = run_of(*(finding(name, 1.0) for name in (ENCODE, PEER, REFERENCE)))
    new = run_of(finding(ENCODE, 1.0), finding(PEER, 0.1), finding(REFERENCE, 0.1))
    assert compared(tmp_path, old, new) == SAME
    assert compared(tmp_path, old, new, "--everything") == SLOWER


def test_differences_that_are_not_the_code_s_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = run_of(finding(ENCODE, 1.0), finding(VOTE, 1.0), machine={"cpu": "slow"})
    assert compared(tmp_path, old, run_of(finding(ENCODE, 1.0), machine={"cpu": "fast"})) == SAME
    words = capsys.readouterr().out
    assert "warning: cpu: slow (old), fast (new)" in words
    assert f"warning: 1 benchmarks are not in the new run, first {VOTE}" in words


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(finding(ENCODE, 1.0))
    assert compared(tmp_path, run_of(finding(VOTE, 1.0)), run) == WRONG_INPUT
    assert compared(tmp_path, run, run, "--tolerance", "0") == WRONG_INPUT
    assert compared(tmp_path, run, run, "--old", "../x") == WRONG_INPUT
    words = capsys.readouterr().err
    assert all(part in words for part in ("no benchmark in common", "tolerance: expected", "NAME: expected"))
    assert main(["--run", f"{tmp_path}/x.jsonl", "run", "--only", "nonsense"]) == WRONG_INPUT


def test_a_saved_run_is_not_overwritten(tmp_path: Path) -> None:
    write_records(tmp_path / "run.jsonl", run_of(finding(ENCODE, 1.0)))
    save = ["--run", f"{tmp_path}/run.jsonl", "--store", str(tmp_path), "save"]
    assert [main([*save, "before"]), main([*save, "before"]), main([*save, "before", "--overwrite"])] == [0, 2, 0]
    assert [record["name"] for record in read_records(tmp_path / "before.jsonl")[1:]] == [ENCODE]


def test_rounds_of_a_checkout_are_merged() -> None:
    _, found = merged([run_of(finding(ENCODE, ratio)) for ratio in (1.0, 4.0, 2.0)])
    assert (found["ratio"], found["low"], found["high"]) == (2.0, 0.98, 4.08)


def test_the_library_of_a_checkout_is_imported(tmp_path: Path) -> None:
    environment = link_library(ROOT, tmp_path / "old")
    code = "import json, lioncub, lioncub.kernels, lioncub.collectives; print(json.dumps(lioncub.kernels.__file__))"
    # not in a folder that has the sources: they would come first
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert Path(json.loads(done.stdout)).is_relative_to(tmp_path / "old" / "lioncub" / "kernels")
    with pytest.raises(ValueError, match="expected lioncub, kernels and collectives"):
        link_library(tmp_path, tmp_path / "x")
