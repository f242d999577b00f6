"""The command line: real runs with two worker processes, and what happens when something goes wrong."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lioncub.commands.train import settings
from lioncub.training.config import UserError

TINY_FLAGS = "--workers 2 --layers 1 --heads 2 --width 16 --context 16 --batch 2 --eval-windows 3 --warmup 2 --lr 0.003"
TINY = TINY_FLAGS.split()
BOTH = ["--method", "lion", "--method", "lioncub"]
PATIENCE = 120.0


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lioncub", "train", *map(str, arguments)]


def run(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def wait_for(condition: Callable[[], bool], what: str, process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended before {what}: {process.communicate()[1]}")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        # a zombie is dead already: its parent alone can remove it
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _heed_interrupts() -> None:
    # a shell starts background jobs, and so perhaps these tests, with Ctrl-C ignored, which is inherited
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Background:
    """A running command in a process group of its own, as a shell gives it one."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        self.process = subprocess.Popen(
            command(*arguments),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def workers(self) -> list[int]:
        return [pid for pid in self.children() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err


@contextlib.contextmanager
def running(*arguments: object, out: Path) -> Iterator[Background]:
    """A run that trains on and on; however the test ends, nothing of it is left, and that is asserted."""
    background = Background(*TINY, "--steps", 100_000, "--out", out, *arguments, cwd=out.parent)
    try:
        log = out / "log.jsonl"
        wait_for(lambda: log.exists() and log.stat().st_size > 0, "the first step", background.process)
        started = background.children()
        yield background
        wait_for(lambda: not any(is_alive(pid) for pid in started), "the end of every process")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(background.process.pid, signal.SIGKILL)
        background.process.wait()
        for pipe in (background.process.stdout, background.process.stderr):
            assert pipe is not None
            pipe.close()


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if not key.endswith("_seconds")} for record in records]


def tensors_of(path: Path) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def collect(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list | tuple):
            for item in value:
                collect(item)

    collect(torch.load(path, weights_only=True))
    return found


def test_resumed_run_is_bit_identical_and_the_report_is_complete(tmp_path: Path) -> None:
    flags = [*BOTH, *TINY, "--steps", 60, "--block", 8, "--checkpoint-every", 10, "--eval-every", 15]
    whole = run(*flags, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    cut = Background(*flags, "--out", "cut", cwd=tmp_path)
    checkpoints = tmp_path / "cut" / "checkpoints"
    wait_for(lambda: any(path.suffix != ".partial" for path in checkpoints.glob("step-*")), "a checkpoint", cut.process)
    started = cut.children()
    cut.process.kill()
    cut.finish()
    # the workers end with the process that started them
    wait_for(lambda: not any(is_alive(pid) for pid in started), "the end of the workers")
    assert not (checkpoints / "step-00000060").exists()

    resumed = run("--resume", "cut", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(log_of(tmp_path / "cut")) == without_times(log_of(tmp_path / "whole"))
    for name in ("models.pt", "optimizers-rank-0.pt", "optimizers-rank-1.pt"):
        expected, got = (tensors_of(tmp_path / run / "checkpoints/step-00000060" / name) for run in ("whole", "cut"))
        assert len(expected) > 10
        assert all(a.equal(b) for a, b in zip(expected, got, strict=True)), name

    records = log_of(tmp_path / "whole")
    assert [record["step"] for record in records if record["method"] == "lion"] == list(range(1, 61))
    assert [record["step"] for record in records if record["val_loss"] is not None][::2] == [15, 30, 45, 60]
    losses = {method: [r["loss"] for r in records if r["method"] == method] for method in ("lion", "lioncub")}
    assert losses["lion"][0] == losses["lioncub"][0]
    assert losses["lion"][-1] < losses["lion"][0] - 0.5
    assert losses["lioncub"][-1] < losses["lioncub"][0] - 0.5
    assert "computed step at 100 Mb/s" in whole.stdout
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    plots = {"loss_by_step.png", "loss_by_time.png", "bytes_by_step.png"}
    assert written == plots | {"config.json", "log.jsonl", "summary.json", "checkpoints"}

    again = run(*flags, "--out", "whole", cwd=tmp_path)
    assert again.returncode == 1
    assert "expected a folder without a run" in again.stderr
    other = run("--resume", "whole", "--workers", 3, cwd=tmp_path)
    assert other.returncode == 2
    assert other.stderr == "lioncub train: --workers: expected 2, as in the run whole to be resumed, got 3\n"


def test_killed_worker_ends_the_run_with_one_message(tmp_path: Path) -> None:
    with running(*BOTH, out=tmp_path / "run") as background:
        victim = background.workers()[1]
        os.kill(victim, signal.SIGKILL)
        code, _, err = background.finish()
    assert code == 1
    assert f"worker 1 (process {victim}) was killed by SIGKILL" in err
    assert err.count("lioncub train:") == 1
    assert "Traceback" not in err


def test_silent_worker_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    with running("--method", "lion", "--timeout", 3, out=tmp_path / "run") as background:
        os.kill(background.workers()[1], signal.SIGSTOP)
        code, _, err = background.finish()
    assert code == 1
    assert "worker 0 failed" in err
    assert err.count("lioncub train:") == 1
    assert "Traceback" not in err
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_ends_quietly(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with running("--checkpoint-every", 5, out=tmp_path / "run") as background:
        checkpoints = tmp_path / "run" / "checkpoints"
        wait_for(lambda: any(checkpoints.glob("step-????????")), "a checkpoint", background.process)
        if number == signal.SIGINT:
            # Ctrl-C reaches the workers too
            os.killpg(background.process.pid, number)
        else:
            background.process.send_signal(number)
        returned, _, err = background.finish()
    assert returned == code, err
    assert err.count("lioncub train:") == 1
    assert "Traceback" not in err
    if number == signal.SIGINT:
        assert err.endswith(
            "lioncub train: interrupted; continue with: lioncub train --resume " + str(tmp_path / "run\n")
        )


def test_bad_file_and_bad_arguments_are_told_in_one_line(tmp_path: Path) -> None:
    missing = run("--data", "missing.txt", cwd=tmp_path)
    assert (missing.returncode, missing.stderr) == (
        1,
        "lioncub train: --data missing.txt: cannot be read: No such file or directory\n",
    )
    assert not (tmp_path / "runs").exists()
    (tmp_path / "short.txt").write_bytes(b"short")
    short = run("--data", "short.txt", cwd=tmp_path)
    assert (short.returncode, short.stderr) == (
        1,
        "lioncub train: --data short.txt: expected at least 1290 bytes for --context 128, got 5\n",
    )
    bad = run("--heads", 3, cwd=tmp_path)
    assert (bad.returncode, bad.stderr) == (2, "lioncub train: --width: expected a multiple of --heads (3), got 128\n")


def test_joins_a_group_that_torchrun_started(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["-m", "lioncub", "train", *TINY, "--steps", "6", "--out", "run"]
    done = subprocess.run(
        [*torchrun, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert done.stdout.count("computed step at 1 Gb/s") == 1


def test_torchrun_environment_is_checked() -> None:
    environment: dict[str, str] = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    config, joined = settings({"out": "run"}, None, environment)
    assert (config.workers, joined) == (3, True)
    with pytest.raises(UserError, match=r"--workers: expected 3, which WORLD_SIZE says, or no --workers, got 2"):
        settings({"out": "run", "workers": 2}, None, environment)
    with pytest.raises(UserError, match="--out: expected a folder"):
        settings({}, None, environment)
    with pytest.raises(UserError, match=r"WORLD_SIZE is set, as torchrun does, but not RANK, MASTER_ADDR, MASTER_PORT"):
        settings({"out": "run"}, None, {"WORLD_SIZE": "3"})
    with pytest.raises(UserError, match=r"WORLD_SIZE: expected an integer, got 'x'"):
        settings({"out": "run"}, None, environment | {"WORLD_SIZE": "x"})


def test_help_and_a_missing_extra_need_no_extra(tmp_path: Path) -> None:
    # stands before site-packages, so that rich cannot be found
    blocker = "import sys, importlib.util as u; f = u.find_spec; sys.modules['rich'] = None; "
    blocker += "u.find_spec = lambda n, *a: None if n == 'rich' else f(n, *a); from lioncub.cli import main; "
    shown = subprocess.run(
        [sys.executable, "-c", blocker + "main(['--help'])"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "train" in shown.stdout
    missing = subprocess.run(
        [sys.executable, "-c", blocker + "main(['train'])"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (missing.returncode, missing.stderr) == (2, "lioncub train: rich not found: pip install 'lioncub[train]'\n")


def test_killing_the_launcher_leaves_no_worker(tmp_path: Path) -> None:
    # that every process ends is asserted by `running`
    with running(out=tmp_path / "run") as background:
        assert len(background.workers()) == 2
        background.process.kill()
        returned, _, _ = background.finish()
    assert returned == -signal.SIGKILL
