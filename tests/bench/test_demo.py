"""bench/demo: its text, windows, schedule, figures and plots, and a short run of two workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from demo.gpt import GPT, parameter_count
from demo.report import Record, smoothed, summarize, table, write_plots
from demo.text import load_text, split_text, training_windows, validation_windows
from demo.train import Options, learning_rate, main, turns

BENCH = Path(__file__).parents[2] / "bench"
BOTH = ("lion", "lioncub")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "--steps: expected an integer >= 1, got 0"),
        ("eval_every", -1, "--eval-every: expected an integer >= 1, got -1"),
        ("context", 1, "--context: expected an integer >= 2, got 1"),
        ("width", 30, r"--width: expected a multiple of --heads \(4\), got 30"),
        ("lr", float("nan"), "--lr: expected a finite number > 0, got nan"),
    ],
)
def test_options_name_the_bad_flag(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**{field: value})


def test_bad_arguments_end_with_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert main(["--heads", "3"]) == 1
    assert capsys.readouterr().err == "demo: --width: expected a multiple of --heads (3), got 128\n"
    assert main([]) == 1
    assert "expected to be started by torchrun" in capsys.readouterr().err
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    assert main(["--bogus"]) == 1
    assert capsys.readouterr().err == "demo: unrecognized arguments: --bogus\n"
    assert not waited
    # another worker waits until torchrun ends it
    monkeypatch.setenv("RANK", "1")
    assert main(["--steps", "0"]) == 1
    assert waited == [60]


def test_text_split_and_its_smallest_size(tmp_path: Path) -> None:
    text = split_text(bytes(range(100)), 9, "t")
    assert text.train.tolist() == list(range(90))
    assert text.validation.tolist() == list(range(90, 100))
    with pytest.raises(ValueError, match=r"^t: expected at least 100 bytes for --context 9, got 99$"):
        split_text(bytes(99), 9, "t")
    with pytest.raises(ValueError, match=r"--data .*: cannot be read: No such file"):
        load_text(str(tmp_path / "missing"), 8)
    with pytest.raises(ValueError, match=r"--data .*: cannot be read: Is a directory"):
        load_text(str(tmp_path), 8)


def test_default_text_is_large_and_sorted_by_name() -> None:
    text = load_text(None, 128)
    assert len(text.train) > 1_000_000
    # the first module is the one of __future__
    assert bytes(text.train[:6].tolist()) == b'"""Rec'


def test_windows_depend_on_seed_rank_and_step_alone() -> None:
    text = split_text(bytes(range(250)) * 40, 16, "t")

    def draw(**changes: int) -> torch.Tensor:
        place = {"seed": 1, "rank": 2, "step": 3, **changes}
        return training_windows(text, batch=4, context=16, **place)

    assert draw().shape == (4, 17)
    assert draw().equal(draw())
    others = [draw(seed=2), draw(rank=3), draw(step=4), draw(seed=12, rank=3)]
    assert not any(draw().equal(other) for other in others)
    # consecutive bytes of the text
    assert ((draw()[:, 1:] - draw()[:, :-1]) % 250 == 1).all()


def test_validation_windows_span_the_validation_text() -> None:
    text = split_text(bytes(range(200)) * 10, 15, "t")
    windows = validation_windows(text, count=5, context=15)
    assert windows.shape == (5, 16)
    assert windows[0].tolist() == text.validation[:16].tolist()
    assert windows[-1].tolist() == text.validation[-16:].tolist()
    assert validation_windows(text, count=1, context=15).tolist() == windows[:1].tolist()


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [learning_rate(step, steps=100, peak=1.0, warmup=10) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(1, steps=1, peak=2.0, warmup=0) == pytest.approx(0.2)


@pytest.mark.parametrize("block", [1, 7, 10, 99])
def test_turns_cover_every_step_once_for_each_method(block: int) -> None:
    plan = turns(BOTH, 25, block)
    for method in BOTH:
        assert [step for name, steps in plan if name == method for step in steps] == list(range(1, 26))
    assert [name for name, _ in plan[:4]] == [*BOTH, *BOTH[::-1]][: len(plan)]


def records(method: str, count: int, bytes_sent: int = 6000) -> list[Record]:
    return [
        Record(
            method=method,
            step=step,
            val_loss=2.0 if step % 10 == 0 else None,
            bytes_sent=bytes_sent,
            loss=5.0 - step / 100,
            # one outlier, which medians must not see
            step_seconds=50.0 if step == 1 else 0.5,
            forward_seconds=0.1,
            backward_seconds=0.2,
            exposed_seconds=0.15,
            optimizer_seconds=0.05,
        )
        for step in range(1, count + 1)
    ]


def test_summary_takes_medians_and_credits_only_lion_with_overlap() -> None:
    both = records("lion", 40, bytes_sent=10**6) + records("lioncub", 40, bytes_sent=10**6)
    lion, lioncub = summarize(both, "lion"), summarize(both, "lioncub")
    assert (lion["step, ms"], lion["validation loss"]) == (500, 2.0)
    assert lion["train loss, last 20 steps"] == pytest.approx(5.0 - 30.5 / 100)
    # 1 MB: 80 ms at 100 Mb/s, hidden behind 200 ms of backward pass, or not
    assert lion["computed step at 100 Mb/s, ms"] == pytest.approx(350)
    assert lioncub["computed step at 100 Mb/s, ms"] == pytest.approx(430)
    assert lioncub["computed step at 10 Gb/s, ms"] == pytest.approx(350.8)
    lines = table(both[::-1], 4).splitlines()
    assert " ".join(lines[0].split()) == "nats per byte, bytes, ms Lion, DDP, fp32 LionCub ratio"
    assert " ".join(lines[4].split()) == "bytes sent per worker and step 1,000,000 1,000,000 1.00x"
    assert "ratio" not in table(both[:40], 4)


def test_smoothed() -> None:
    assert smoothed([1.0, 3.0, 8.0, 7.0, 0.0], 1) == [2.0, 4.0, 6.0, 5.0, 3.5]
    assert smoothed([1.0, 3.0, 8.0], 9) == [4.0, 4.0, 4.0]
    assert smoothed([1.0, 3.0], 0) == [1.0, 3.0]
    assert smoothed([], 3) == []


def test_gpt_sees_the_past_only_and_starts_near_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, heads=2, width=16, context=12)
    assert parameter_count(model) == 256 * 16 + 12 * 16 + 2 * (12 * 16 * 16 + 2 * 16) + 16
    windows = torch.randint(0, 256, (3, 13))
    assert model(windows).item() == pytest.approx(5.545, abs=0.1)
    # the loss on a prefix, and so every prediction in it, does not change with what follows
    changed = windows.clone()
    changed[:, 8:] = 0
    assert model(windows[:, :8]).item() == model(changed[:, :8]).item()
    embedded = model.embedding(windows[:, :12]).detach().requires_grad_()
    for block in model.blocks:
        output = block(embedded)
        (gradient,) = torch.autograd.grad(output[:, 5].sum(), embedded)
        assert gradient[:, :6].abs().sum() > 0
        assert gradient[:, 6:].abs().sum() == 0


def test_one_worker_that_sends_nothing_can_be_plotted(tmp_path: Path) -> None:
    write_plots(records("lion", 30, bytes_sent=0), tmp_path / "plots.png")
    assert (tmp_path / "plots.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_learns_and_its_report_is_complete(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = "--steps 60 --block 8 --eval-every 15 --layers 1 --heads 2 --width 16 --context 16 --batch 2 --lr 0.003"
    done = subprocess.run(
        [*torchrun, str(BENCH / "demo"), *flags.split(), "--warmup", "2", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("computed step at 100 Mb/s") == 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {}
    for method in BOTH:
        own = [record for record in log if record["method"] == method]
        assert [record["step"] for record in own] == list(range(1, 61))
        assert [record["step"] for record in own if record["val_loss"] is not None] == [15, 30, 45, 60]
        losses[method] = [record["loss"] for record in own]
        assert losses[method][-1] < losses[method][0] - 0.5
    # both start from the same weights and see the same data
    assert losses["lion"][0] == losses["lioncub"][0]
    assert len(done.stderr.splitlines()) == 8, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"log.jsonl", "plots.png"}
