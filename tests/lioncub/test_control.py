"""The control message and the decision: every reason, their order, who is named, and the texts of errors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lioncub.arguments import Hyperparameters
from lioncub.collectives import WorkersDisagreeError
from lioncub.control import (
    COMMIT,
    DISAGREE,
    FAILED,
    NONFINITE,
    OVERFLOW,
    R_FAILED,
    R_STALE,
    R_UNVERIFIED,
    STALE,
    UNVERIFIED,
    Control,
    Decision,
    LateReport,
)

CPU = torch.device("cpu")
RATES = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.0, "maximize": False}
# param group 1 has no parameters that anybody votes on
GROUPS = (0, 2)


@pytest.fixture(autouse=True, params=["host", "device"])
def _decided_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where nothing is waited for, the host decides an ordinary step by itself."""
    if request.param == "device":
        monkeypatch.setattr(Control, "_is_read", property(lambda self: False))


def control_of(n: int, ranks: int, *, capturable: bool = False) -> Control:
    names = [f"p{i}" for i in range(n)]
    transport: Any = SimpleNamespace(size=ranks)
    return Control(names, GROUPS, transport, CPU, capturable=capturable)


def message_of(control: Control, n: int, **changes: Any) -> Tensor:
    """The words of a rank whose step is ordinary but for ``changes``; parameters in ``bad`` are not finite."""
    rates = [Hyperparameters.of({**RATES, **more}) for more in changes.pop("rates", ({}, {}, {}))]
    nonfinite = torch.zeros(n, dtype=torch.int32)
    nonfinite[list(changes.pop("bad", ()))] = 1
    facts = {"flags": 0, "overflow": None, "present": [True] * n, "layout": 77, "microseconds": 5}
    step = changes.pop("step", 4)
    return control.message(step, rates, nonfinite=nonfinite, **facts | changes)


def decided(ranks: Sequence[Mapping[str, Any]], n: int = 5, *, capturable: bool = False) -> tuple[Control, Decision]:
    control = control_of(n, len(ranks), capturable=capturable)
    return control, control.decide(torch.stack([message_of(control, n, **changes) for changes in ranks]))


# a reason, by ascending importance, with the rank that gives it
CAUSES: list[tuple[int, int, dict[str, Any]]] = [
    (NONFINITE, 1, {"bad": (2, 4)}),
    (OVERFLOW, 2, {"overflow": torch.tensor([3.0])}),
    (R_UNVERIFIED, 1, {"flags": UNVERIFIED}),
    (DISAGREE, 2, {"layout": 78}),
    (R_STALE, 0, {"flags": STALE}),
    (R_FAILED, 2, {"flags": FAILED}),
]


def test_the_most_important_reason_decides() -> None:
    for chosen in itertools.product((False, True), repeat=len(CAUSES)):
        ranks: list[dict[str, Any]] = [{}, {}, {}]
        causes = list(itertools.compress(CAUSES, chosen))
        for _, rank, changes in causes:
            flags = ranks[rank].get("flags", 0) | changes.get("flags", 0)
            ranks[rank] |= {**changes, **({"flags": flags} if flags else {})}
        report = (found := decided(ranks)[1]).read()
        assert report.reason == max((reason for reason, *_ in causes), default=COMMIT), causes
        assert found.active.tolist() == [int(not causes)] * 5
        assert report.n_active == (0 if causes else 5)
        assert report.step == 4
        if report.reason in (NONFINITE, R_UNVERIFIED, R_FAILED):
            assert report.rank == causes[-1][1], causes
    assert [reason for reason, *_ in CAUSES] == list(range(1, 7))


@pytest.mark.parametrize(
    ("bad", "param", "rank", "named"),
    [
        ([(), (4,), ()], 5, 1, "p4 on rank 1"),
        ([(3, 4), (), (2, 4)], 3, 2, "p2 on rank 2"),
        ([(), (0, 1, 2, 3, 4), (0,)], 1, 1, "p0 on rank 1, 2"),
        ([(1,), (1,), (1,)], 2, 0, "p1 on rank 0, 1, 2"),
    ],
)
def test_the_first_parameter_that_is_not_finite_is_named_with_its_ranks(
    bad: list[tuple[int, ...]], param: int, rank: int, named: str
) -> None:
    control, decision = decided([{"bad": which} for which in bad])
    report = decision.read()
    assert (report.reason, report.param, report.rank) == (NONFINITE, param, rank)
    text = (
        f"step 4: a gradient, momentum or update is not finite, first in parameter {named}; no worker changed anything"
    )
    assert str(control.nonfinite_error(report, decision.everyone)) == text
    # of a captured step the first rank alone is known
    assert f"on rank {rank};" in str(control.nonfinite_error(report))


@pytest.mark.parametrize("n", [1, 62, 63, 64, 65, 126, 127, 200])
def test_every_parameter_has_a_bit_of_its_own(n: int) -> None:
    for chosen in {0, n // 2, n - 2, n - 1} & set(range(n)):
        alone = [i == chosen for i in range(n)]
        _, decision = decided([{"present": [False] * n}, {"present": alone}], n)
        assert decision.active.tolist() == [int(has) for has in alone]
        assert decision.read().n_active == 1
    halves = [[i % 2 == rank for i in range(n)] for rank in range(2)]
    assert decided([{"present": half} for half in halves], n)[1].active.tolist() == [1] * n
    # the last one alone is not finite
    report = decided([{}, {"bad": (n - 1,)}], n)[1].read()
    assert (report.param, report.rank) == (n, 1)
    words = -(-n // 63)
    assert control_of(n, 3).bytes_sent == 2 * message_of(control_of(n, 3), n).nbytes
    assert message_of(control_of(n, 3), n).numel() - message_of(control_of(1, 3), 1).numel() == words - 1


LAYOUT = "the bucket layout at step 4: ranks 0, 2: hash 000000000000004d; rank 1: hash ffffffffffffffff"
DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"step": 5}, "the step at step 4: ranks 0, 2: 4; rank 1: 5"),
    ({"layout": -1}, LAYOUT),
    (
        {"rates": ({"lr": 0.5}, {}, {"lr": 0.5})},
        "the hyperparameters (lr of param group 0) at step 4: ranks 0, 2: 0.1; rank 1: 0.5",
    ),
    (
        {"rates": ({}, {}, {"betas": (0.5, 0.99)})},
        "the hyperparameters (betas[0] of param group 2) at step 4: ranks 0, 2: 0.9; rank 1: 0.5",
    ),
    (
        {"rates": ({}, {}, {"betas": (0.9, 0.5)})},
        "the hyperparameters (betas[1] of param group 2) at step 4: ranks 0, 2: 0.99; rank 1: 0.5",
    ),
    (
        {"rates": ({}, {}, {"weight_decay": 1e-300})},
        "the hyperparameters (weight_decay of param group 2) at step 4: ranks 0, 2: 0.0; rank 1: 1e-300",
    ),
    (
        {"rates": ({"maximize": True}, {}, {})},
        "the hyperparameters (maximize of param group 0) at step 4: ranks 0, 2: 0.0; rank 1: 1.0",
    ),
]


@pytest.mark.parametrize(("change", "text"), DIFFERENCES)
def test_the_error_names_what_differs_and_each_value(change: dict[str, Any], text: str) -> None:
    control, decision = decided([{}, change, {}])
    report = decision.read()
    assert report.reason == DISAGREE
    error = control.disagreement(report, decision.everyone)
    assert isinstance(error, WorkersDisagreeError)
    assert str(error) == f"workers disagree on {text}"
    # the values of a captured step are gone by the time that its report is read
    assert str(control.disagreement(report)).startswith("workers disagree on the step, the bucket layout or the hyper")


def test_hyperparameters_of_a_group_nobody_votes_in_do_not_matter() -> None:
    assert decided([{}, {"rates": ({}, {"lr": 9.0}, {})}])[1].read().reason == COMMIT


def test_other_versions_and_ranks_that_failed_are_named() -> None:
    control = control_of(5, 3)
    everyone = torch.stack([message_of(control, 5) for _ in range(3)])
    everyone[2, 0] += 1
    version = int(everyone[0, 0])
    decision = control.decide(everyone)
    told = f"workers disagree on the wire version at step 4: ranks 0, 1: {version}; rank 2: {version + 1}"
    assert str(control.disagreement(decision.read(), decision.everyone)) == told
    # a rank that failed has no facts of its own
    everyone = torch.stack([message_of(control, 5), control.blank(FAILED, 4), message_of(control, 5)])
    report = control.decide(everyone).read()
    assert (report.reason, report.rank) == (R_FAILED, 1)
    assert str(control.disagreement(report, everyone)) == (
        "step 4 was taken by no worker, because of an error on rank 1 (reported there)"
    )
    control, decision = decided([{}, {}, {"flags": UNVERIFIED}])
    assert str(control.disagreement(decision.read(), decision.everyone)) == (
        "workers disagree on whether state or param groups are new or loaded at step 4: rank 2 has such, not all "
        "others; no worker changed anything"
    )
    assert not control.have_flag(decision.everyone, UNVERIFIED)
    assert control.have_flag(decided([{"flags": UNVERIFIED | STALE}] * 2)[1].everyone, UNVERIFIED)


def test_a_capturable_message_has_the_same_words() -> None:
    changes = {"bad": (1,), "overflow": torch.tensor(1.0), "flags": STALE, "present": [True, False] * 35}
    one, other = (message_of(control_of(70, 2, capturable=way), 70, **changes) for way in (False, True))
    assert torch.equal(one, other)
    moving = torch.tensor(4, dtype=torch.int64), ({"lr": torch.tensor(0.5, dtype=torch.float64)}, {}, {})
    fixed = message_of(control_of(70, 2), 70, rates=({"lr": 0.5}, {}, {}))
    for way in (False, True):
        control = control_of(70, 2, capturable=way)
        assert torch.equal(message_of(control, 70, step=moving[0], rates=moving[1]), fixed)


def test_a_late_report_keeps_the_first_error_and_counts_what_was_skipped() -> None:
    control, _ = decided([{}, {}], capturable=True)
    late, clock = LateReport(CPU, raises=True), torch.tensor(4)
    for ranks in ([{}, {}], [{"overflow": 1}, {}], [{}, {"bad": (3,)}], [{"layout": 1}, {}]):
        late.note(decided(ranks, capturable=True)[1], clock)
        clock += 1
    # an overflow that a GradScaler finds is no error
    assert int(late.skipped) == 2
    with pytest.raises(ArithmeticError, match=r"^step 6: .* first in parameter p3 on rank 1;"):
        late.raise_all(control)
    late.raise_all(control)
    silent = LateReport(CPU, raises=False)
    silent.note(decided([{}, {"bad": (3,)}], capturable=True)[1], clock)
    silent.raise_all(control)
    silent.note(decided([{}, {"flags": FAILED}], capturable=True)[1], clock)
    with pytest.raises(WorkersDisagreeError, match="because of an error on rank 1"):
        silent.raise_last(control)
    assert int(silent.skipped) == 1
