"""The convergence study: its data, tiny real runs, resuming, and what the report makes of the runs."""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from reporting.records import Record, RecordsError, read_records, run_record
from study import cli
from study.report import difference, precision_table, write_report
from study.tasks import TASKS
from study.training import METHODS, PLAIN_VOTE, PRECISIONS, REFERENCE, Config, config_of, run, schedule

CELL = ("digits", "iid", 4)


@pytest.mark.parametrize("task", list(TASKS))
@pytest.mark.parametrize("shards", ["iid", "skewed"])
def test_batches_depend_on_their_names_alone(task: str, shards: str) -> None:
    def batch(seed: int, rank: int, step: int) -> list[torch.Tensor]:
        return list(TASKS[task].batch_of(seed, shards, 4, 3, rank, step))

    first = batch(0, 1, 5)
    torch.manual_seed(99)
    torch.rand(7)
    assert all(map(torch.equal, first, batch(0, 1, 5)))
    assert not torch.equal(first[0], batch(1, 1, 5)[0])
    assert not torch.equal(first[0], batch(0, 2, 5)[0])
    assert not torch.equal(first[0], batch(0, 1, 6)[0])


def test_skewed_digits_have_classes_of_their_own() -> None:
    def classes(shards: str) -> list[set[int]]:
        return [set(TASKS["digits"].batch_of(0, shards, 4, 400, rank, 0)[1].tolist()) for rank in range(4)]

    assert classes("iid") == [set(range(10))] * 4
    skewed = classes("skewed")
    assert all(len(found) <= 4 for found in skewed)
    assert set.union(*skewed) == set(range(10))
    # neighbours share the class that was cut, others nothing
    assert all(not skewed[i] & skewed[j] for i in range(4) for j in range(i + 2, 4))


def test_skewed_text_differs_between_workers() -> None:
    def frequencies(shards: str) -> torch.Tensor:
        counts = [
            TASKS["text"].batch_of(0, shards, 4, 200, rank, 0)[0].flatten().bincount(minlength=256) for rank in range(4)
        ]
        return torch.stack(counts).float() / counts[0].sum()

    def apart(shards: str) -> float:
        rows = frequencies(shards)
        return sum(float((rows[i] - rows[j]).abs().sum()) / 2 for i in range(4) for j in range(i)) / 6

    assert apart("skewed") > 2 * apart("iid")


@pytest.mark.parametrize("task", list(TASKS))
def test_models_of_a_seed_are_identical_and_leave_the_global_generator_alone(task: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (TASKS[task].model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_tiny_run_of_each_kind(task: str) -> None:
    names = (REFERENCE, "AdamW", PLAIN_VOTE, "2-bit l2 shared + staggered 16 int8")
    found = {name: run(Config(task, "skewed", 2, 2, name, 0, 1e-3), steps=3) for name in names}
    reference, voted = found[REFERENCE], found[PLAIN_VOTE]
    count = sum(p.numel() for p in TASKS[task].model(0).parameters())
    # two workers: 2 * (N - 1) / N = 1
    assert reference["bytes_per_step"] == reference["fp32_bytes_per_step"] == 4 * count
    assert count / 8 < voted["bytes_per_step"] < count / 8 + 2000
    assert len({one["loss"] for one in found.values()}) == len(names)
    assert all(0 < one["loss"] < 10 for one in found.values())


def test_parameters_in_bf16_are_trained_and_reported() -> None:
    runs = [run(Config("text", "iid", 2, 2, name, 0, 1e-3), steps=2) for name in ("fp32", "bf16, fp32 masters")]
    assert all(0 < one["loss"] < 10 for one in runs)
    assert runs[0]["moved"] == 1 > runs[1]["moved"] > 0
    loss = f"{runs[0]['loss']:.3f}"
    assert f"| fp32 | 8 | {loss} | {loss} | 100% |\n| bf16, fp32 masters | 10 | " in precision_table(runs)
    assert len(list(cli.wanted(quick=False, precision=True))) == 2 * len(PRECISIONS)


def test_runs_repeat_bit_for_bit() -> None:
    config = Config("digits", "iid", 2, 2, "SignVote + staggered 4 int8", 3, 1e-3)
    first, again = run(config, steps=2), run(config, steps=2)
    assert first["loss"] == again["loss"]


def test_learning_rates_warm_up_and_fall() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[0] == 0.05
    assert max(rates) == rates[19] == 1.0
    assert 0 < rates[-1] < 1e-3
    assert config_of("text", "iid", 4, "2-bit linf", 0).lr == 0.0056
    assert [config_of(task, "iid", 4, "AdamW", 0).lr for task in TASKS] == [0.0112, 0.0112]


def training(method: str, seed: int, loss: float, cell: tuple[str, str, int] = CELL) -> Record:
    """A made-up run."""
    task, shards, workers = cell
    config = config_of(task, shards, workers, method, seed)
    sent = 100.0 if METHODS[method].compression is not None else 3200.0
    found: dict[str, Any] = {"bytes_per_step": sent, "fp32_bytes_per_step": 3200.0, "seconds": 5.0}
    return {"kind": "training", **vars(config), "loss": loss, **found}


def test_intervals_by_hand() -> None:
    # 10, 20 and 30 % above the reference: mean 20, deviation 10, t(0.975, 2) = 4.302653
    runs = [training(REFERENCE, seed, float(seed + 1)) for seed in range(4)]
    runs += [training(PLAIN_VOTE, seed, (1.1 + 0.1 * seed) * (seed + 1)) for seed in range(3)]
    found = difference(runs, CELL, PLAIN_VOTE)
    assert found is not None
    assert found[0] == pytest.approx(0.2)
    assert found[1:] == (pytest.approx(0.1 * 4.302653 / 3**0.5, rel=1e-6), 3)
    # of one seed there is no interval, and of none no difference
    assert difference(runs[:5], CELL, PLAIN_VOTE) == (pytest.approx(0.1), float("inf"), 1)
    assert difference(runs[:4], CELL, PLAIN_VOTE) is None


def test_a_report_of_made_up_runs(tmp_path: Path) -> None:
    skewed, page = ("text", "skewed", 4), tmp_path / "results.md"
    page.write_text("<!-- study -->\n<!-- /study -->\n")
    runs = [training(name, seed, 2.0, cell) for name in METHODS for seed in range(3) for cell in (CELL, skewed)]
    losses = {REFERENCE: 1.0, PLAIN_VOTE: 2.0, "SignVote + staggered 4 int8": 1.25}
    runs = [{**one, "loss": losses.get(one["method"], 2.0)} for one in runs]
    write_report([run_record(), *runs], tmp_path, page)
    text = page.read_text()
    assert "| SignVote | 32.0 | +100.0 ±0.0 (3) | +100.0 ±0.0 (3) |" in text
    assert "| SignVote + staggered 4 int8 | 75% |" in text
    assert all(f"\n| {name} | " in text for name in METHODS if name != REFERENCE)
    assert (tmp_path / "study.png").stat().st_size > 1000
    with pytest.raises(RecordsError, match="got none"):
        write_report([run_record(), *runs[:1]], tmp_path, page)


def test_finished_runs_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, begun = tmp_path / "study.jsonl", []

    def made_up(configs: list[Config], *_: object) -> list[Record]:
        begun.append(len(configs))
        return [training(config.method, config.seed, 1.0) for config in configs[:5]]

    monkeypatch.setattr(cli, "_records", made_up)
    command = ["--quick", "--out", str(out)]
    assert [cli.main(command) for _ in range(3)] == [0, 0, 0]
    assert begun == [21, 16, 11]
    assert len(read_records(out)) == 1 + 15
    assert "| SignVote | 32.0 | +0.0 ±0.0 (2) |" in capsys.readouterr().out
    monkeypatch.setattr(cli, "run_record", lambda: {**run_record(), "commit": "another"})
    assert cli.main(command) == 1
    assert "--keep-old adds to them" in capsys.readouterr().err
    assert cli.main([*command, "--keep-old"]) == 0


def test_past_the_deadline_only_those_that_were_begun_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "ProcessPoolExecutor", lambda jobs, *_: ThreadPoolExecutor(jobs))
    configs = [config_of("digits", "iid", 4, REFERENCE, seed) for seed in range(9)]

    def done(hours: float) -> set[int]:
        options = argparse.Namespace(jobs=2, hours=hours)
        return {record["seed"] for record in cli._records(configs, options, lambda config: {"seed": config.seed})}

    assert done(1.0) == set(range(9))
    assert done(0.0) == {0, 1}


def test_wrong_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--jobs", "0", "--out", str(tmp_path / "y.jsonl")]) == 1
    assert "expected --jobs of at least 1" in capsys.readouterr().err
    assert cli.main(["--report", "--out", str(tmp_path / "nothing.jsonl")]) == 1
    assert "No such file" in capsys.readouterr().err
