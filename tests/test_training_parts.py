"""Pure parts of the training command: settings, text, schedule, wire times, figures, log, plots."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lioncub.training import launch
from lioncub.training.config import TrainConfig, UserError, config_from_json, resumed_config
from lioncub.training.gpt import GPT, parameter_count
from lioncub.training.log import LogWriter, StepRecord, read_log
from lioncub.training.methods import covered_seconds
from lioncub.training.plots import smoothed, write_plots
from lioncub.training.schedule import is_due, learning_rate, turns
from lioncub.training.summary import summarize
from lioncub.training.text import load_text, split_text, training_windows, validation_windows
from lioncub.training.wire_time import (
    overlapped_step_seconds,
    ring_all_reduce_bytes,
    sequential_step_seconds,
    wire_seconds,
)

BOTH = ("lion", "lioncub")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("workers", 0, "--workers: expected an integer >= 1, got 0"),
        ("steps", -1, "--steps: expected an integer >= 1, got -1"),
        ("eval_every", -1, "--eval-every: expected an integer >= 0, got -1"),
        ("context", 1, "--context: expected an integer >= 2, got 1"),
        ("width", 30, r"--width: expected a multiple of --heads \(4\), got 30"),
        ("lr", float("nan"), "--lr: expected a finite number > 0, got nan"),
        ("weight_decay", float("inf"), "--weight-decay: expected a finite number >= 0, got inf"),
        ("betas", (0.9, 1.0), r"--betas: expected two numbers in \[0, 1\), got 0.9 1.0"),
        ("timeout", 0.0, "--timeout: expected a finite number of seconds > 0, got 0.0"),
        ("methods", ("lion", "lion"), "--method: expected each method once, got lion lion"),
        ("methods", (), "--method: expected one of lion, lioncub, got "),
        (
            "algorithm",
            "ring",
            "--algorithm: expected one of auto, all_gather, reduce_scatter, hierarchical, all_reduce, got ring",
        ),
    ],
)
def test_config_names_the_bad_flag(field: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TrainConfig(), **{field: value})


def test_config_survives_json() -> None:
    config = TrainConfig(methods=BOTH, betas=(0.8, 0.95), data="text", lr=1e-3)
    assert config_from_json(config.to_json(), "config.json") == config


@pytest.mark.parametrize("text", ["{", "[]", '{"methods": ["lion"]}', '{"methods": ["lion"], "betas": [0, 0], "x": 1}'])
def test_config_from_spoilt_json(text: str) -> None:
    with pytest.raises(UserError, match=r"^config.json: not the settings of a lioncub run"):
        config_from_json(text, "config.json")


def test_resumed_config_refuses_contradictions(tmp_path: Path) -> None:
    saved = TrainConfig(methods=BOTH, out="elsewhere", steps=70)
    (tmp_path / "config.json").write_text(saved.to_json())
    resumed = resumed_config(tmp_path, {"steps": 70, "timeout": 5.0, "checkpoint_every": 7})
    assert resumed == dataclasses.replace(saved, out=str(tmp_path), timeout=5.0, checkpoint_every=7)
    with pytest.raises(UserError, match=r"--workers: expected 4, as in the run .* to be resumed, got 2"):
        resumed_config(tmp_path, {"workers": 2})
    with pytest.raises(UserError, match=r"--method: expected lion lioncub, as in .*, got lion"):
        resumed_config(tmp_path, {"methods": ("lion",)})
    with pytest.raises(UserError, match=r"--resume .*nowhere: cannot read config.json"):
        resumed_config(tmp_path / "nowhere", {})


def test_text_split_and_its_smallest_size() -> None:
    text = split_text(bytes(range(100)), 9, "t")
    assert text.train.tolist() == list(range(90))
    assert text.validation.tolist() == list(range(90, 100))
    with pytest.raises(UserError, match=r"^t: expected at least 100 bytes for --context 9, got 99$"):
        split_text(bytes(99), 9, "t")


def test_text_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*: cannot be read: No such file"):
        load_text(str(tmp_path / "missing"), 8)
    with pytest.raises(UserError, match=r"--data .*: cannot be read: Is a directory"):
        load_text(str(tmp_path), 8)


def test_default_text_is_large_and_always_the_same() -> None:
    text = load_text(None, 128)
    assert len(text.train) > 1_000_000
    assert text.sha256 == load_text(None, 128).sha256
    # sorted by name, so that the first module is the one of __future__
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
@pytest.mark.parametrize("checkpoint_every", [0, 4, 10, 25])
def test_turns_cover_every_step_once_and_pause_for_checkpoints(block: int, checkpoint_every: int) -> None:
    plan = turns(BOTH, steps=25, block=block, checkpoint_every=checkpoint_every)
    assert [step for turn in plan for step in range(turn.first, turn.last + 1)] == list(range(1, 26))
    ends = {turn.last for turn in plan}
    assert ends >= set(range(checkpoint_every, 26, checkpoint_every)) if checkpoint_every else True
    assert [turn.methods for turn in plan[:2]] == [BOTH, BOTH[::-1]][: len(plan)]


def test_is_due() -> None:
    assert [step for step in range(1, 11) if is_due(step, every=4, steps=10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if is_due(step, every=0, steps=10)] == [10]


def test_ring_all_reduce_bytes() -> None:
    assert ring_all_reduce_bytes(1000, 1) == 0
    assert ring_all_reduce_bytes(1000, 2) == 4000
    assert ring_all_reduce_bytes(1000, 4) == 6000
    assert ring_all_reduce_bytes(1, 3) == 6
    assert ring_all_reduce_bytes(1000, 4, bytes_per_element=2) == 3000


def test_computed_step_times() -> None:
    assert wire_seconds(12_500_000, 1e8) == pytest.approx(1.0)
    parts = {"forward": 1.0, "backward": 2.0, "optimizer": 0.5}
    assert overlapped_step_seconds(**parts, wire=1.5) == 3.5
    assert overlapped_step_seconds(**parts, wire=4.0) == 5.5
    assert sequential_step_seconds(**parts, wire=0.25) == 3.75


@pytest.mark.parametrize(
    ("started", "finished", "expected"),
    [
        ([], [], 0.0),
        ([1.0], [3.0], 2.0),
        ([1.0, 2.0], [4.0, 3.0], 3.0),
        ([1.0, 5.0], [2.0, 7.0], 3.0),
        ([1.0, 2.0], [2.0, 3.0], 2.0),
    ],
)
def test_covered_seconds(started: list[float], finished: list[float], expected: float) -> None:
    assert covered_seconds(started, finished) == expected


def records(method: str, count: int, val_every: int = 10, bytes_sent: int = 6000) -> list[StepRecord]:
    return [
        StepRecord(
            method=method,
            step=step,
            val_loss=2.0 if step % val_every == 0 else None,
            lr=1e-3,
            bytes_sent=bytes_sent,
            loss=5.0 - step / 100,
            # one outlier, which medians must not see
            step_seconds=50.0 if step == 1 else 0.5,
            forward_seconds=0.1,
            backward_seconds=0.2,
            communication_seconds=0.3,
            exposed_seconds=0.15,
            optimizer_seconds=0.05,
        )
        for step in range(1, count + 1)
    ]


def test_summary_takes_medians_and_credits_only_lion_with_overlap() -> None:
    megabyte = 1_000_000
    both = records("lion", 40, bytes_sent=megabyte) + records("lioncub", 40, bytes_sent=megabyte)
    lion, lioncub = summarize(both, "lion"), summarize(both, "lioncub")
    assert (lion.steps, lion.step_seconds, lion.val_loss) == (40, 0.5, 2.0)
    assert lion.train_loss == pytest.approx(5.0 - 30.5 / 100)
    # 1 MB: 80 ms at 100 Mb/s, hidden behind 200 ms of backward pass, or not
    assert lion.computed_step_seconds["100 Mb/s"] == pytest.approx(0.35)
    assert lioncub.computed_step_seconds["100 Mb/s"] == pytest.approx(0.43)
    assert lioncub.computed_step_seconds["10 Gb/s"] == pytest.approx(0.3508)


def test_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    first, second, third = records("lion", 3)
    log = LogWriter(tmp_path)
    log.write(first)
    kept = log.bytes_written()
    log.write(second)
    log.close()
    assert read_log(tmp_path) == [first, second]

    resumed = LogWriter(tmp_path, kept)
    resumed.write(third)
    resumed.close()
    assert read_log(tmp_path) == [first, third]
    with pytest.raises(UserError, match=r"log.jsonl: expected the 10000 bytes that the checkpoint counts, got"):
        LogWriter(tmp_path, 10_000)


def test_log_with_a_spoilt_line(tmp_path: Path) -> None:
    (record,) = records("lion", 1)
    (tmp_path / "log.jsonl").write_text(json.dumps(dataclasses.asdict(record)) + '\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"log.jsonl, line 2: not a step record"):
        read_log(tmp_path)


def test_smoothed() -> None:
    assert smoothed([1.0, 3.0, 8.0, 7.0, 0.0], 1) == [2.0, 4.0, 6.0, 5.0, 3.5]
    assert smoothed([1.0, 3.0, 8.0], 9) == [4.0, 4.0, 4.0]
    assert smoothed([1.0, 3.0], 0) == [1.0, 3.0]
    assert smoothed([], 3) == []


@pytest.mark.parametrize("bytes_sent", [0, 6000])
def test_plots_are_png_files(tmp_path: Path, bytes_sent: int) -> None:
    both = records("lion", 30, bytes_sent=bytes_sent) + records("lioncub", 30, bytes_sent=bytes_sent // 32)
    paths = write_plots(both, tmp_path)
    assert [path.name for path in paths] == ["loss_by_step.png", "loss_by_time.png", "bytes_by_step.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


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


def test_a_launcher_whose_workers_have_all_ended_waits_for_nothing() -> None:
    workers = launch._Workers.__new__(launch._Workers)
    workers.processes, workers.channels, workers.failures = [], [], []
    reported: list[object] = []
    workers._receive(reported.append, timeout=None)
    assert reported == []
