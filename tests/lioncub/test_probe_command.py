"""``lioncub probe``: the files it writes, torchrun, and its messages when something goes wrong; ``lioncub --help``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from lioncub.cli import main, torchrun_workers
from lioncub.collectives import Profile
from lioncub.collectives.cost import candidates
from lioncub.probe import ProbeConfig, _cause

PATIENCE = 120.0
COMMAND = [sys.executable, "-m", "lioncub", "probe"]


def test_command_writes_a_profile_and_replaces_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # the workers join the launcher's group as they join torchrun's
    command = [*COMMAND, "--workers", "2", "--budget", "0.5", "--plot", "plot.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    profile = Profile.load(tmp_path / "profile.json")
    assert profile.nodes == ((0, 1),)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "1 node of 2 workers over gloo" in done.stdout
    for name in candidates(profile.topology):
        assert f" {name} " in done.stdout
    assert done.stdout.endswith("written: profile.json, plot.png\n")
    assert done.stderr == "measuring 2 workers for about 0.5 s\n"

    before, path = (tmp_path / "profile.json").read_text(), tmp_path / "profile.json"
    assert main(["probe", "--out", str(path)]) == 1
    assert capsys.readouterr().err == (
        f"lioncub probe: --out {path}: expected a new file, got one that exists; replace it with --overwrite\n"
    )
    assert path.read_text() == before


def test_torchrun_environment_is_checked() -> None:
    environment = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert torchrun_workers(None, environment) == torchrun_workers(3, environment) == 3
    with pytest.raises(ValueError, match=r"--workers: expected 3, the value of WORLD_SIZE, or no --workers, got 2"):
        torchrun_workers(2, environment)
    with pytest.raises(ValueError, match="WORLD_SIZE is set, as torchrun does, but not RANK, MASTER_ADDR, MASTER_PORT"):
        torchrun_workers(None, {"WORLD_SIZE": "3"})
    with pytest.raises(ValueError, match=r"WORLD_SIZE: expected an integer, got 'x'"):
        torchrun_workers(None, environment | {"WORLD_SIZE": "x"})


def test_bad_arguments_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["probe", "--workers", "1"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "lioncub probe: --workers: expected an integer >= 2, got 1\n"
    assert main(["probe", "--out", str(tmp_path / "none" / "p.json")]) == 1
    assert capsys.readouterr().err == (
        f"lioncub probe: --out {tmp_path}/none/p.json: expected a file in a folder that exists, "
        f"got no folder {tmp_path}/none\n"
    )
    for field in ("budget", "timeout"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=rf"--{field}: expected a finite number of seconds > 0, got {value}"):
                ProbeConfig(**{field: value})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else object())
    for arguments, code in ((["--help"], 0), (["plan", "--params", "1M", "--nodes", "2"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    shown = capsys.readouterr()
    assert "probe" in shown.out
    assert shown.err == "lioncub plan: rich not found: pip install 'lioncub[cli]'\n"


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "lioncub probe: interrupted\n"),
        (signal.SIGTERM, 143, "lioncub probe: terminated\n"),
        (signal.SIGKILL, 1, "was killed by SIGKILL (out of memory?)\n"),
    ],
)
def test_an_early_end_leaves_no_worker_and_no_file(
    tmp_path: Path, number: signal.Signals, code: int, message: str
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--workers", "2", "--budget", "1000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_interrupts,
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline() == "measuring 2 workers for about 1000 s\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"lioncub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 2
        if number == signal.SIGKILL:
            os.kill(workers[1], number)
        elif number == signal.SIGINT:
            # Ctrl-C reaches the whole process group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert err.endswith(message)
        assert err.count("lioncub probe:") == 1
        assert "Traceback" not in err
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert not (tmp_path / "profile.json").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _heed_interrupts() -> None:
    # a shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, which is inherited
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def failure(exitcode: int, timestamp: int, message: str = "") -> ProcessFailure:
    found = ProcessFailure(local_rank=0, pid=7, exitcode=exitcode, error_file="")
    found.timestamp = timestamp
    if message:
        found.message = {"message": message, "extraInfo": {"py_callstack": "the trace"}}  # type: ignore[assignment]
    return found


@pytest.mark.parametrize(
    ("failures", "message", "trace"),
    [
        (
            {0: failure(1, 4, "RuntimeError: connection lost"), 1: failure(-signal.SIGSEGV, 4)},
            "worker 1 (process 7) was killed by SIGSEGV",
            "",
        ),
        (
            {0: failure(1, 5, "RuntimeError: connection lost"), 2: failure(1, 3, "OSError: no memory")},
            "worker 2 failed: OSError: no memory",
            "the trace",
        ),
        # what the launcher ended is no cause, also where it had to kill it
        (
            {0: failure(-signal.SIGTERM, 2), 1: failure(-signal.SIGKILL, 6), 2: failure(1, 3, "RuntimeError: timeout")},
            "worker 2 failed: RuntimeError: timeout",
            "the trace",
        ),
        ({0: failure(1, 1, "ValueError: p.json: cannot be written: full")}, "p.json: cannot be written: full", ""),
        ({1: failure(3, 1)}, "worker 1 ended with exit code 3 and no message", ""),
    ],
)
def test_the_first_cause_is_reported(failures: dict[int, ProcessFailure], message: str, trace: str) -> None:
    error = _cause(failures)
    assert (str(error), error.traceback) == (message, trace)
