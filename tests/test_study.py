"""The convergence study: its data, the pairing of methods, statistics, resuming, the report, and tiny real runs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from convergence.cli import main
from convergence.methods import METHODS, REFERENCE
from convergence.pool import RunFailedError
from convergence.report import write_report
from convergence.results import FACTORS, LR_SEEDS, Results, cell_of, families, grid, grid_configs
from convergence.runner import Begun, Pace, carry_out, plan
from convergence.stages import (
    CANDIDATES,
    PLAIN_VOTE,
    QUANTIZED,
    SELECTIVE,
    STAGES,
    candidates,
    decide_iid,
    ranking,
    screen,
)
from convergence.statistics import Interval, recovered_share, relative_difference, t_interval
from convergence.store import Store, key_of, meaning, missing
from convergence.tasks import TASKS
from convergence.training import Config, run
from convergence.verdicts import CLAIMS, CONTRADICTED, SUPPORTED, UNDECIDED, Claim, overall

CELL = cell_of("digits", "iid", 4)


def record_of(config: Config, loss: float, digest: str = "today", sent: float = 100.0) -> dict[str, Any]:
    """A made-up run."""
    seen = {"tied": 0.1, "unanimous": 0.5, "agreement": 0.8, "drift": {"mlp": 0.4, "head": 0.2}}
    voted = METHODS[config.method].compression is not None
    return {
        "config": vars(config),
        "final_loss": loss,
        "validation": [[100, 2 * loss], [200, loss]],
        "training": [[100, 2 * loss], [200, loss]],
        "parameters": 800,
        "bytes_per_step": sent if voted else 3200.0,
        "fp32_bytes_per_step": 3200,
        "seen": [{"step": step, **(seen if voted else {})} for step in (100, 200)],
        "seconds": 5.0,
        "digest": digest,
        "means": "",
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs", "today")


def fill(store: Store, losses: dict[str, Sequence[float]], cell: Any = CELL) -> None:
    """A run for each loss, seeds 0, 1, ..."""
    for method, values in losses.items():
        for seed, loss in enumerate(values):
            config = Results(store).config(cell, method, seed)
            store.add(config, record_of(config, loss))


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
def test_models_start_alike_and_leave_the_global_generator_alone(task: str) -> None:
    before = torch.get_rng_state()
    first, again, other = (TASKS[task].model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("task", list(TASKS))
def test_a_tiny_run_of_each_kind(task: str) -> None:
    found = {method: run(Config(task, method, 1e-3, 2, "skewed", 2, 0, 3)) for method in (REFERENCE, PLAIN_VOTE)}
    reference, voted = found[REFERENCE], found[PLAIN_VOTE]
    count = reference["parameters"]
    # two workers: 2 * (N - 1) / N = 1
    assert reference["bytes_per_step"] == reference["fp32_bytes_per_step"] == 4 * count
    assert count / 8 < voted["bytes_per_step"] < count / 8 + 2000
    assert 0 < reference["final_loss"] < 10
    assert reference["final_loss"] != voted["final_loss"]
    seen = voted["seen"][-1]
    assert seen["step"] == 3
    assert all(0 <= seen[name] <= 1 for name in ("tied", "unanimous", "agreement"))
    assert seen["tied"] + seen["unanimous"] == pytest.approx(1)
    # variance over two workers, relative to the mean square
    assert all(0 <= drift <= 1 for drift in seen["drift"].values())
    json.dumps(voted)


def test_t_interval_by_hand() -> None:
    # mean 2, deviation 1, t(0.975, 2) = 4.302653
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - found.low == pytest.approx(found.high - 2)
    assert t_interval([5.0]) == Interval(5.0, -math.inf, math.inf, 1)
    with pytest.raises(ValueError, match="at least one, got none"):
        t_interval([])


def test_relative_difference_is_paired() -> None:
    # each 10 % above its own reference, whatever the references are
    found = relative_difference([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(0.1)
    assert found.high - found.low < 1e-12
    with pytest.raises(ValueError, match="zip"):
        relative_difference([1.0], [1.0, 2.0])


def test_recovered_share_by_hand() -> None:
    reference, without = [1.0, 1.2, 0.9, 1.1], [2.0, 2.2, 1.9, 2.1]
    half = recovered_share([1.5, 1.7, 1.4, 1.6], without, reference)
    assert half is not None
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    scattered = recovered_share([1.2, 2.0, 1.4, 1.6], without, reference)
    assert scattered is not None
    # 0.8 + 0.2 + 0.5 + 0.5 of 4 that were lost
    assert scattered.mean == pytest.approx(0.5)
    assert 0.2 <= scattered.low < 0.5 < scattered.high <= 0.8
    # whether anything is lost is not known
    assert recovered_share([1.0, 1.0], [1.1, 0.9], [1.0, 1.0]) is None
    assert recovered_share([1.0], [2.0], [0.5]) is None


@pytest.mark.parametrize(
    ("low", "high", "plain", "margin"),
    [
        (0.02, 0.05, SUPPORTED, CONTRADICTED),
        (-0.05, -0.02, CONTRADICTED, SUPPORTED),
        (-0.01, 0.005, UNDECIDED, SUPPORTED),
        (-0.01, 0.05, UNDECIDED, UNDECIDED),
        (0.005, 0.05, SUPPORTED, UNDECIDED),
    ],
)
def test_verdicts_follow_the_interval(low: float, high: float, plain: str, margin: str) -> None:
    difference = Interval((low + high) / 2, low, high, 5)
    assert Claim("", "a", "b", ("iid",)).verdict(difference) == plain
    assert Claim("", "a", "b", ("iid",), 0.01).verdict(difference) == margin
    assert Claim("", "a", "b", ("iid",)).verdict(None) == UNDECIDED
    assert overall([]) == UNDECIDED


def test_names_exist() -> None:
    named = {*CANDIDATES, *QUANTIZED, *SELECTIVE, PLAIN_VOTE, REFERENCE}
    named |= {name for claim in CLAIMS for name in (claim.better, claim.worse)}
    assert named <= set(METHODS)
    assert {method.family for method in METHODS.values()} <= set(METHODS)


def test_learning_rates_prefer_the_reference_s_multiple(store: Store) -> None:
    results = Results(store)
    rates = grid("digits", REFERENCE)
    assert results.lr_of("digits", PLAIN_VOTE) == rates[1]
    tried = {
        REFERENCE: (1.0, 1.2, 1.3),
        PLAIN_VOTE: (1.5, 1.4, 1.0),
        "SignMean": (1.0, 1.0, 1.2),
    }
    for family, values in tried.items():
        for lr, loss in zip(grid("digits", family), values, strict=True):
            for config in grid_configs("digits", family, lr):
                store.add(config, record_of(config, loss))
    # away from the default, clearly better
    assert results.lr_of("digits", REFERENCE) == rates[0]
    assert results.lr_of("digits", PLAIN_VOTE) == rates[2]
    assert results.is_at_edge("digits", PLAIN_VOTE)
    # a tie, which the reference's multiple wins
    assert results.lr_of("digits", "SignMean") == rates[0]
    assert results.lr_of("digits", "SignVote + every 8 fp32") == rates[2]
    assert results.lr_of("text", PLAIN_VOTE) == grid("text", PLAIN_VOTE)[1]


def test_the_same_run_has_the_same_name_and_no_other() -> None:
    config = Config("digits", PLAIN_VOTE, 1e-3, 4, "iid", 8, 0, 200)
    assert key_of(config) == key_of(Config(**vars(config)))
    others = [
        Config(**{**vars(config), name: value}) for name, value in [("seed", 1), ("lr", 2e-3), ("shards", "skewed")]
    ]
    assert len({key_of(c) for c in [config, *others]}) == 4


def test_runs_of_other_code_count_only_where_asked(store: Store) -> None:
    config = Config("digits", PLAIN_VOTE, 1e-3, 4, "iid", 8, 0, 200)
    store.add(config, record_of(config, 1.0, digest="yesterday"))
    assert missing(store, [config, config]) == [config]
    assert missing(Store(store.folder, "today", keep_old=True), [config]) == []
    assert missing(Store(store.folder, "yesterday"), [config]) == []
    assert Store(store.folder, "today").digests() == {"yesterday": 1}
    with pytest.raises(ValueError, match="at least one finished run"):
        write_report(Store(store.folder, "today"), store.folder)


def test_broken_files_are_named(store: Store) -> None:
    (store.folder / "a.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"a\.json: expected a run's JSON"):
        Store(store.folder, "today")


def made_up(config: Config) -> dict[str, Any]:
    """In another process: no training."""
    if config.seed == 7:
        raise ValueError("seed 7 is not liked")
    return record_of(config, 1.0 + config.seed)


def some(results: Results, at_most: bool) -> Iterator[Config]:
    yield from (results.config(CELL, method, seed) for method in (REFERENCE, PLAIN_VOTE) for seed in range(2))


def with_a_failing_one(results: Results, at_most: bool) -> Iterator[Config]:
    yield from some(results, at_most)
    yield results.config(CELL, PLAIN_VOTE, 7)


def test_finished_runs_are_kept_and_not_repeated(tmp_path: Path) -> None:
    done: list[str] = []
    folder = tmp_path / "runs"
    first = Store(folder, "today")
    config = Results(first).config(CELL, REFERENCE, 0)
    first.add(config, record_of(config, 5.0))

    def go_on(stage: Any, hours: float | None = None) -> bool:
        def on_progress(seconds: float, what: str) -> None:
            done.append(what)

        store = Store(folder, "today")
        return carry_out([stage], store, jobs=1, hours=hours, on_progress=on_progress, function=made_up)

    # a process is started only where there is something to run
    with pytest.raises(RunFailedError, match=r"(?s)seed=7.*seed 7 is not liked"):
        go_on(with_a_failing_one)
    assert len(done) == 3
    assert go_on(some)
    assert len(done) == 3
    assert len(list(folder.iterdir())) == 4
    kept = Store(folder, "today").find(config)
    assert kept is not None
    assert kept["final_loss"] == 5.0


def test_nothing_is_begun_that_would_end_too_late(store: Store) -> None:
    wanted = [CELL.config(PLAIN_VOTE, 1e-3, seed) for seed in range(3)]
    pace = Pace(store)
    late = Begun(wanted, pace, time.monotonic() + pace.seconds(wanted[0]) / 2)
    assert list(late) == []
    assert late.was_cut
    early = Begun(wanted, pace, time.monotonic() + 10 * pace.seconds(wanted[0]))
    assert list(early) == wanted
    assert not early.was_cut


def test_deciding_takes_more_seeds_until_it_is_decided(store: Store) -> None:
    results = Results(store)

    def seeds(method: str) -> set[int]:
        return {
            c.seed for c in decide_iid(results, False) if c.method == method and c.task == "digits" and c.workers == 4
        }

    assert seeds(PLAIN_VOTE) == set(range(6))
    clear, unclear = [1.001, 1.002, 1.0, 1.001, 1.002, 1.0], [1.1, 0.9, 1.1, 0.9, 1.1, 0.9]
    fill(store, {REFERENCE: [1.0] * 6, CANDIDATES[0]: clear, CANDIDATES[1]: unclear})
    assert seeds(CANDIDATES[0]) == set(range(6))
    assert seeds(CANDIDATES[1]) == set(range(12))


def test_the_best_of_each_byte_budget_joins_the_candidates(store: Store) -> None:
    results = Results(store)
    for config in dict.fromkeys(screen(results, False)):
        loss = {REFERENCE: 1.0, "SignMean": 1.1, "8-bit l1": 1.05}.get(config.method, 1.5)
        sent = {"SignMean": 200.0, "8-bit l1": 800.0}.get(config.method, 101.0)
        store.add(config, record_of(config, loss, sent=sent))
    assert ranking(results, "iid", 31.0)[0] not in ("SignMean", "8-bit l1")
    assert ranking(results, "iid", 15.0)[0] == "SignMean"
    assert ranking(results, "iid", 3.0)[0] == "8-bit l1"
    assert "SignMean" in candidates(results, "iid")
    assert "SignMean" in candidates(results, "skewed")


def test_the_plan_counts_every_run_once(store: Store) -> None:
    rows = plan(STAGES, store, 2)
    tuned, screened = rows[0], rows[1]
    assert tuned[1] == len(TASKS) * len(families()) * len(FACTORS) * sum(LR_SEEDS.values())
    wanted = set(screen(Results(store), True))
    for task in TASKS:
        for family in families():
            for lr in grid(task, family):
                wanted -= set(grid_configs(task, family, lr))
    assert screened[1] == len(wanted)
    assert all(left == count for _, count, left, _ in rows)


def test_report_of_a_few_runs(store: Store, tmp_path: Path) -> None:
    fill(
        store,
        {
            REFERENCE: [1.0, 1.1, 1.2],
            PLAIN_VOTE: [1.5, 1.61, 1.7],
            "SignVote + every 1 fp32": [1.0, 1.1, 1.2],
            "2-bit l1": [1.2, 1.3, 1.4],
            "2-bit linf": [math.nan, 1.5, 1.6],
        },
    )
    path = write_report(store, tmp_path / "out")
    text = path.read_text()
    assert "### 1-bit votes without synchronization lose against full precision: supported" in text
    assert "| Lion | " in text
    row = next(line for line in text.splitlines() if line.startswith("| SignVote |"))
    assert "| 3 | 1.6033 |" in row
    assert "32.0x" in row
    # all of what unsynchronized votes lose
    assert "| SignVote + every 1 fp32 | 3 | 100% [100%, 100%] |" in text
    assert "| diverged |" in text
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    # one that diverged is null
    assert set(found["cells"][0]["methods"]["2-bit linf"]["losses"]) == {"1", "2"}
    assert found["cells"][0]["methods"]["2-bit linf"]["validation"]["0"] == [[100, None], [200, None]]
    assert found["cells"][0]["methods"][PLAIN_VOTE]["losses"] == {"0": 1.5, "1": 1.61, "2": 1.7}
    plots = sorted(plot.name for plot in (tmp_path / "out").glob("*.png"))
    assert plots == ["study_bytes.png", "study_drift.png", "study_loss.png", "study_ways.png"]
    assert all(f"]({name})" in text for name in plots)


def test_a_study_goes_on_from_its_report(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(store, {REFERENCE: [1.0, 1.1], PLAIN_VOTE: [1.5, math.nan]})
    for record in store.records():
        store.add(Config(**record["config"]), {**record, "means": meaning(METHODS[record["config"]["method"]])})
    out, again = tmp_path / "out", tmp_path / "again"
    write_report(store, out)
    archive = out / "study_runs.jsonl.gz"
    first = archive.read_bytes()
    restored = ["restore", "--out", str(out), "--runs", str(again)]
    assert main(restored) == 0
    assert "4 runs restored, 0 were there" in capsys.readouterr().out
    names = [{path.name for path in folder.glob("*.json")} for folder in (store.folder, again)]
    assert names[0] == names[1]
    (again / f"{key_of(Results(store).config(CELL, REFERENCE, 0))}.json").unlink()
    assert main(restored) == 0
    assert "1 runs restored, 3 were there" in capsys.readouterr().out
    write_report(Store(again, "today"), out)
    assert archive.read_bytes() == first
    archive.write_bytes(first[:-9])
    assert main(restored) == 1
    assert "study_runs.jsonl.gz: expected runs of a study, got EOFError" in capsys.readouterr().err
    archive.unlink()
    assert main(restored) == 1
    assert "study_runs.jsonl.gz" in capsys.readouterr().err


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert main(["run", "--stage", "tuning", *runs]) == 1
    assert "--stage: expected some of tune, screen" in capsys.readouterr().err
    assert main(["run", "--quick", "--stage", "tune", *runs]) == 1
    assert "--stage: expected none with --quick" in capsys.readouterr().err
    assert main(["run", "--jobs", "0", *runs]) == 1
    assert "--jobs: expected at least 1, got 0" in capsys.readouterr().err
    assert main(["report", *runs]) == 1
    assert "expected at least one finished run" in capsys.readouterr().err
    assert main(["run", "--plan", *runs]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("tune")
