"""``lioncub probe`` under torchrun: the files it writes, and its messages when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lioncub.cli import main
from lioncub.collectives import Profile
from lioncub.collectives.cost import candidates

PATIENCE = 120.0
COMMAND = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "lioncub", "probe"),
]
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def test_the_command_writes_a_profile_and_replaces_none(tmp_path: Path) -> None:
    command = [*COMMAND, "--budget", "0.5", "--plot", "plot.png"]
    done = subprocess.run(
        command, cwd=tmp_path, env=QUIET, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    path = tmp_path / "profile.json"
    profile = Profile.load(path)
    assert profile.nodes == ((0, 1),)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "1 node of 2 workers over gloo" in done.stdout
    for name in candidates(profile.topology):
        assert f" {name} " in done.stdout
    assert done.stdout.endswith("written: profile.json, plot.png\n")
    assert "measuring 2 workers for about 0.5 s\n" in done.stderr

    before = path.read_text()
    again = subprocess.run(
        COMMAND, cwd=tmp_path, env=QUIET, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert again.returncode == 1
    expected = (
        "lioncub probe: --out profile.json: expected a new file, got one that exists; replace it with --overwrite\n"
    )
    assert expected in again.stderr
    assert path.read_text() == before


def test_bad_arguments_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert exit_code("probe") == 2
    assert capsys.readouterr().err == (
        "lioncub probe: expected to be started by torchrun, as in torchrun --nproc-per-node 4 -m lioncub probe, got no "
        "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment\n"
    )
    for flag in ("--budget", "--timeout"):
        for value in ("0", "-1", "nan", "inf"):
            assert exit_code("probe", f"{flag}={value}") == 2
            expected = f"argument {flag}: expected a finite number of seconds > 0, got {value}\n"
            assert capsys.readouterr().err.endswith(expected)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert main(["probe", "--out", str(tmp_path / "none" / "p.json")]) == 1
    assert capsys.readouterr().err == (
        f"lioncub probe: --out {tmp_path}/none/p.json: expected a file in a folder that exists, "
        f"got no folder {tmp_path}/none\n"
    )


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else object())
    assert exit_code("--help") == 0
    assert "probe" in capsys.readouterr().out
    assert exit_code("plan", "--params", "1M", "--nodes", "2") == 2
    assert capsys.readouterr().err == "lioncub plan: rich not found: pip install 'lioncub[cli]'\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_early_end_leaves_no_rank_and_no_file(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--budget", "1000"],
        cwd=tmp_path,
        env=QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    try:
        assert process.stderr is not None
        assert any("measuring 2 workers" in line for line in process.stderr)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"lioncub" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        if number == signal.SIGKILL:
            os.kill(ranks[1], number)
        elif number == signal.SIGINT:
            # Ctrl-C reaches the whole process group
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        process.communicate(timeout=PATIENCE)
        assert process.returncode != 0
        deadline = time.monotonic() + PATIENCE
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
        assert not (tmp_path / "profile.json").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def exit_code(*arguments: str) -> object:
    """Run the command, which ends by SystemExit."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def heed_interrupts() -> None:
    """Undo that a shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, which is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
