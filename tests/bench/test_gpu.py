"""bench/gpu: every stage as a dry run on the CPU, and stages that fail, hang or lack a program.

``python bench/gpu run --device cpu`` runs every row of every stage.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from gpu import counters, driver, prepare
from gpu.driver import DRIVER, STAGES, Stage
from gpu.report import Rows, markdown, outcome
from gpu.workbench import Workbench

BENCH = Path(__file__).parents[2] / "bench"
# by the driver, each in its own process; all others in one, since most of a stage is imports
DRIVEN = ("facts", "sanitize")
ROWS = (
    r"lion_step_|lion_encode|LionCub( signs|, one|, capt|, 4|:|$)|compiled|votes of|vote by|average|all workers|gpu.py"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders with what the dry runs have written."""
    found = [tmp_path_factory.mktemp("gpu") for _ in range(2)]
    entry = [sys.executable, str(BENCH / "gpu")]
    others = [name for name in STAGES if name not in DRIVEN]
    commands = [[*entry, "run", "--stages", ",".join(DRIVEN)], [*entry, "stage", *others, "--only", ROWS]]
    environment = driver.environment_of_stages(is_dry=True)
    for command, out in zip(commands, found, strict=True):
        done = subprocess.run(
            [*command, "--device", "cpu", "--out", str(out)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return found


@pytest.fixture(scope="module")
def rows(folders: list[Path]) -> list[dict[str, Any]]:
    """All rows of both."""
    return [row for out in folders for row in Rows(out / "gpu.jsonl").read()]


def of(rows: list[dict[str, Any]], stage: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows if row["stage"] == stage}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_run_and_no_row_fails(rows: list[dict[str, Any]], stage: str) -> None:
    outcomes = {name: outcome(row) for name, row in of(rows, stage).items()}
    # instrumented, a stage runs the checks of another
    assert "measured" in outcomes.values() or stage == "race"
    # what is absent needs a GPU, or a package that is installed on none of our machines
    assert {name for name, kind in outcomes.items() if kind in ("error", "skipped")} == set()
    assert callable(pkgutil.resolve_name(f"gpu.{STAGES[stage].function}"))


def test_reports_have_every_row_and_say_that_it_is_a_dry_run(folders: list[Path]) -> None:
    text = (folders[0] / "gpu.md").read_text()
    assert text.startswith("# A dry run without GPU: these figures mean nothing\n")
    for row in Rows(folders[0] / "gpu.jsonl").read():
        if set(row) != {"kind", "stage", "name"}:
            assert f"\n| {row['name']} | " in text, row
        assert f"\n## {row['stage']}\n" in text
    assert "=== sanitize\n" in (folders[0] / "log.txt").read_text()


def test_speed_has_kernels_with_their_bytes_and_their_share_of_a_copy(rows: list[dict[str, Any]]) -> None:
    speed = of(rows, "speed")
    for row in speed.values():
        if outcome(row) == "measured":
            assert row["of_copy"] > 0, row
            assert row["host_microseconds"] > 0, row
            assert row["data_sets"] == 1, row
    n, codes = 4096, 512
    expected = {
        # momentum and gradient in, codes out
        "lion_encode/fp32": 8 * n + codes,
        "lion_encode/mixed": 6 * n + codes,
        "lion_encode/bf16": 4 * n + codes,
        # three in, two out
        "lion_step_/fp32": 20 * n,
        "lion_step_/mixed": 14 * n,
        "lion_step_/torch.compile/fp32": 20 * n,
        "lion_step_/lion-pytorch/fp32": 20 * n,
        "lion_step_/torch AdamW fused, 28 bytes/fp32": 28 * n,
    }
    assert {name: speed[name]["bytes"] for name in expected} == expected
    assert {"absent": "a GPU"}.items() <= speed["lion_step_/bitsandbytes/fp32"].items()


def test_stages_compare_what_they_should(rows: list[dict[str, Any]]) -> None:
    assert len([name for name in of(rows, "nccl") if "vote" in name]) == 6
    measured = [row for row in of(rows, "steps").values() if "elements" in row]
    assert len(measured) == 4
    assert all(row["device_ms"] > 0 for row in measured)
    distributed = [row for row in of(rows, "dist").values() if "step_ms" in row]
    assert len(distributed) == 1
    assert distributed[0]["bytes_per_step"] > 0
    command = of(rows, DRIVER)["sanitize"]["command"]
    assert command.startswith("compute-sanitizer --error-exitcode 9 --tool memcheck python ")


def test_the_command_of_ncu_is_whole() -> None:
    command = " ".join(counters.COMMAND)
    assert command.startswith("ncu --clock-control none --csv --page raw -k regex:^_[a-z_]+_kernel$ --metrics gpu__")
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed" in command


def test_ncu_s_words_become_rows(tmp_path: Path) -> None:
    log, rows = tmp_path / "log.txt", Rows(tmp_path / "gpu.jsonl")
    header = '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n"","","us",""\n'
    words = f'{header}"9","_old_kernel","1","2"\n=== ncu\n==PROF== x\n{header}"0","_step_kernel","430.1","40"\n'
    log.write_text(f"=== ncu\n{words}")
    counters.add_metrics(rows, "ncu", log)
    (found,) = rows.read()
    assert found.items() >= {"name": "0: _step_kernel", "duration": "430.1 us", "registers": "40"}.items()
    log.write_text("=== ncu\n==ERROR== no permission\n")
    counters.add_metrics(rows, "ncu", log)
    assert rows.read()[-1]["error"] == "ncu: expected a table of kernels in the log, got none"


def test_a_row_that_fails_is_recorded_and_the_next_are_measured(tmp_path: Path) -> None:
    bench = Workbench("any", tmp_path, "cpu", seconds=60)
    bench.attempt("peer", lambda: {"figure": 1.0}, needs="no_such_package")
    bench.attempt("broken", lambda: {"figure": {}["nothing"]})
    bench.attempt("behind", lambda: {"figure": 2.5})
    bench.attempt("behind", lambda: {"figure": 3.5})
    late = Workbench("any", tmp_path, "cpu", seconds=-1)
    late.attempt("late", lambda: {"figure": 1.0})
    found = {row["name"]: row for row in bench.rows.read("any")}
    assert [outcome(row) for row in found.values()] == ["absent", "error", "measured", "skipped"]
    assert found["broken"]["error"] == "KeyError: 'nothing'"
    assert found["behind"]["figure"] == 3.5
    assert (bench.failed, late.failed) == (1, 0)
    text = markdown(bench.rows.read(), is_dry=False)
    assert "1 absent, 1 error, 1 measured, 1 skipped." in text
    assert "| broken |  | error: KeyError: 'nothing' |" in text


def test_a_stage_that_is_cut_off_keeps_its_rows_and_the_next_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = f"Rows(Path({str(tmp_path / 'gpu.jsonl')!r})).add('hangs', 'found', figure=1.5)"
    imports = f"import sys, time; sys.path.insert(0, {str(BENCH)!r}); from pathlib import Path"
    hang = f"{imports}; from gpu.report import Rows; {add}; time.sleep(600)"
    code = {"hangs": hang, "fails": "print('words'); raise SystemExit(3)", "lacks": "", "passes": ""}
    stages = {"hangs": Stage(6, "x"), "fails": Stage(60, "x"), "lacks": Stage(60, "x", ("no-such-program",))}
    monkeypatch.setattr(driver, "STAGES", {**stages, "passes": Stage(60, "x")})
    monkeypatch.setattr(driver, "command_of", lambda name, *_: [sys.executable, "-c", code[name]])
    assert driver.run_stages(list(code), tmp_path, "cuda:0") == 1
    found = Rows(tmp_path / "gpu.jsonl")
    assert [row["figure"] for row in found.read("hangs")] == [1.5]
    errors = {row["name"]: row.get("error") for row in found.read(DRIVER)}
    cut_off, missing = "cut off after 6 s", "not found: no-such-program"
    assert errors == {"hangs": cut_off, "fails": "exit code 3", "lacks": missing, "passes": None}
    assert "=== fails\nwords\n" in (tmp_path / "log.txt").read_text()
    assert "| hangs | 6." in (tmp_path / "gpu.md").read_text()
    assert driver.run_stages(["passes"], tmp_path, "cuda:0") == 0


def test_where_nothing_is_installed_stages_take_the_copy_that_was_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CARRIED", tmp_path)
    installed = driver.environment_of_stages(is_dry=True)
    assert (installed["PYTHONSAFEPATH"], installed["TRITON_INTERPRET"]) == ("1", "1")
    assert str(tmp_path / "copy") not in installed["PYTHONPATH"]
    monkeypatch.setattr(driver, "_is_installed", lambda: False)
    with pytest.raises(FileNotFoundError, match=r"expected it installed or in .*copy: python bench/gpu prepare"):
        driver.environment_of_stages(is_dry=False)
    (tmp_path / "copy").mkdir()
    carried = driver.environment_of_stages(is_dry=False)
    assert carried["PYTHONPATH"].split(":")[:2] == [str(tmp_path / "copy"), str(tmp_path / "extra")]
    assert carried["TRITON_INTERPRET"] == "0"


def test_of_a_wheel_the_libraries_of_one_version_of_cuda_travel(tmp_path: Path) -> None:
    names = [
        "bitsandbytes/optim/lion.py",
        *(f"bitsandbytes/libbitsandbytes_{x}.so" for x in ("cpu", "cuda118", "cuda130")),
    ]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        for name in [*names, "bitsandbytes/libbitsandbytes_rocm70.so"]:
            wheel.writestr(name, "")
    (unwanted,) = (pattern for name, pattern in prepare.PEERS.items() if name.startswith("bitsandbytes"))
    prepare.unpack(tmp_path / "x.whl", tmp_path / "extra", unwanted)
    unpacked = {str(path.relative_to(tmp_path / "extra")) for path in (tmp_path / "extra").rglob("*") if path.is_file()}
    assert unpacked == {name for name in names if "cuda118" not in name}


def test_without_a_gpu_or_with_unknown_stages_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from gpu.cli import main

    assert main(["run", "--stages", "facts,nonsense", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "--stages: expected some of facts, test, " in capsys.readouterr().err
