"""The endurance run, made short: it counts what it did, and fails where a part of it goes wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from endurance import ends, schedule

ENDURANCE = Path(__file__).parents[2] / "bench" / "endurance"


def test_a_short_run_counts_what_it_did() -> None:
    command = [sys.executable, str(ENDURANCE), "--minutes", "0.01", "--trials", "1", "--constructions", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"schedules: .*1 schedules.*", lines[0]), lines
    assert int(re.search(r"(\d+) steps", lines[0])[1]) > 80  # type: ignore[index]
    assert lines[1].startswith("ends: ")
    assert "1 trials" in lines[1]
    assert lines[2] == "leaks: 3 constructions"
    assert lines[3].startswith("0 failures in ")


@pytest.mark.parametrize("found", [None, "Traceback"])
def test_a_rank_that_fails_or_says_nothing_is_a_failure(found: str | None) -> None:
    with mock.patch.object(schedule, "answers_of", return_value=[Counter(steps=5), found]):
        counts, wrong = schedule.run_schedules(0, 0.01)
    assert not counts["steps"]
    assert len(wrong) == counts["schedules"]
    assert wrong[0] == f"seed 0, rank 1 of 2: {found}"


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ({"step": 3, "hashes": {3: 1}}, {"step": 3, "hashes": {3: 2}}, "replicas differ"),
        ({"step": 3, "hashes": {3: 1}}, {"step": 5, "hashes": {3: 1, 5: 2}}, "steps differ by more than one"),
        ({"step": 3, "hashes": {3: 1}}, None, "expected that all others end in time"),
        ({"step": 3, "hashes": {3: 1, 4: 2}}, {"step": 4, "hashes": {3: 1, 4: 2}}, ""),
    ],
)
def test_replicas_are_compared_at_the_steps_they_share(
    first: dict[str, object], second: dict[str, object] | None, text: str
) -> None:
    said = [
        found if found is None else {**found, "said": "rank 1 of the process group was lost"}
        for found in (first, second)
    ]
    started = [mock.Mock(), mock.Mock(), mock.Mock()]
    for one, later in zip(started, (said[0], None, said[1]), strict=True):
        one.answer.side_effect = ["ready", later]
    counts = Counter[str]()
    with mock.patch.object(ends, "ranks") as ranks:
        ranks.return_value.__enter__.return_value = started
        found = ends._trial("raise", 1, 0.0, {}, counts)
    assert found.startswith(text)
    assert bool(found) == bool(text)
    assert counts["a step ahead"] == int(not text or text.startswith("steps"))
