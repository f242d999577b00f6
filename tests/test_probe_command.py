"""``lioncub probe``: what it writes, how it joins torchrun, what it says when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lioncub.collectives.cost import candidates
from lioncub.collectives.profile import Profile
from lioncub.probing.job import ProbeJob
from lioncub.training.config import UserError

PATIENCE = 120.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lioncub", "probe", *map(str, arguments)]


def run(cwd: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_command_writes_a_profile_and_replaces_none(tmp_path: Path) -> None:
    flags = ("--workers", 2, "--budget", 0.5, "--plot", "plot.png")
    done = run(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    profile = Profile.load(tmp_path / "profile.json")
    assert profile.nodes == ((0, 1),)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "1 node of 2 workers over gloo" in done.stdout
    for name in candidates(profile.topology):
        assert f" {name} " in done.stdout
    assert done.stdout.endswith("written: profile.json, plot.png\n")
    assert done.stderr == "measuring 2 workers for about 0.5 s\n"

    before = (tmp_path / "profile.json").read_text()
    again = run(tmp_path, *flags)
    assert (again.returncode, again.stderr) == (
        1,
        "lioncub probe: --out profile.json: expected a new file, got one that exists; replace it with --overwrite\n",
    )
    assert (tmp_path / "profile.json").read_text() == before


def test_command_joins_a_group_that_torchrun_started(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "lioncub", "probe", "--budget", "0.5", "--out", "p.json"]
    done = subprocess.run(
        [*torchrun, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Profile.load(tmp_path / "p.json").world_size == 2
    assert done.stdout.count("written: p.json") == 1


def test_bad_arguments_and_files(tmp_path: Path) -> None:
    one = run(tmp_path, "--workers", 1)
    assert (one.returncode, one.stderr) == (2, "lioncub probe: --workers: expected an integer >= 2, got 1\n")
    lost = run(tmp_path, "--out", "none/p.json")
    assert (lost.returncode, lost.stderr) == (
        1,
        "lioncub probe: --out none/p.json: expected a file in a folder that exists, got no folder none\n",
    )
    for field in ("budget", "timeout"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match=rf"--{field}: expected a finite number of seconds > 0, got {value}"):
                ProbeJob(**{field: value})


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
        command("--workers", 2, "--budget", 1000),
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
        deadline = time.monotonic() + PATIENCE
        while len(workers := _workers(process.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.kill(workers[0], number)
        elif number == signal.SIGINT:
            # Ctrl-C reaches the workers too
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert err.endswith(message)
        assert err.count("lioncub probe:") == 1
        assert "Traceback" not in err
        assert not any(_is_alive(pid) for pid in workers)
        assert not (tmp_path / "profile.json").exists()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _heed_interrupts() -> None:
    # a shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, which is inherited
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _workers(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def _is_alive(pid: int) -> bool:
    try:
        # a zombie is dead already: its parent alone can remove it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
