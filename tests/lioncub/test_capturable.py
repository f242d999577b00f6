"""Steps that the host never waits for: the same bits as ordinary ones, and errors told later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from gloo_workers import on_ranks, said_by
from nets import Net, all_bits, batch_of, bits_of, groups_of
from optimizers import LionCub
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lioncub import Comm, NonFiniteError
from lioncub.buckets import BucketList
from lioncub.compression import SignVote
from lioncub.control import Attempt, LateReport
from lioncub.membership import Membership
from lioncub.params import Meshes
from lioncub.payloads import Drift, MomentumAverages, SharedScales
from lioncub.precision import Masters, Precision
from lioncub.step import Proposal, StepEngine

ALGORITHMS = ("all_gather", "reduce_scatter", "all_reduce", "auto")
BUCKET_MB = 1e-4


def backward(net: Net, step: int, rank: int) -> None:
    net.zero_grad()
    net(*batch_of(100 * step + rank), use_all=rank != 1).backward()


def two_kinds(seed: int, groups: Callable[[Net], Any] = groups_of, **options: Any) -> list[tuple[Net, LionCub]]:
    """An ordinary and a capturable optimizer of equal networks."""
    nets = Net(seed), Net(seed)
    return [(net, LionCub(groups(net), lr=0.01, capturable=i > 0, **options)) for i, net in enumerate(nets)]


@on_ranks(2, 3)
def test_capturable_steps_are_the_ordinary_ones(rank: int, world_size: int) -> None:
    for algorithm in ALGORITHMS:
        options: dict[str, Any] = {"algorithm": algorithm, "bucket_mb": BUCKET_MB, "compression": SignVote()}
        kinds = two_kinds(rank, **options)
        (_, one), (_, other) = kinds
        for step in range(3):
            for net, opt in kinds:
                backward(net, step, rank)
                opt.step()
                opt.param_groups[0]["lr"] *= 0.7
            assert all_bits(one) == all_bits(other)
        other.check_replicas()
        mine, theirs = one.stats(), other.stats()
        assert (mine.tied, mine.unanimous) == (theirs.tied, theirs.unanimous)
        assert theirs.steps == 3
        used = {bucket.algorithm for bucket in theirs.buckets}
        assert used <= ({"all_gather", "reduce_scatter", "all_reduce"} if algorithm == "auto" else {algorithm})
        assert theirs.bytes_sent_per_step > 0


@on_ranks(2)
def test_a_group_that_is_added_takes_part(rank: int, world_size: int) -> None:
    def matrices(net: Net) -> list[Tensor]:
        return [p for p in net.parameters() if p.dim() > 1]

    kinds = two_kinds(rank, matrices, compression=SignVote())
    for net, opt in kinds:
        backward(net, 0, rank)
        opt.step()
        opt.add_param_group({"params": [p for p in net.parameters() if p.dim() <= 1], "lr": 0.01})
        backward(net, 1, rank)
        opt.step()
    assert all_bits(kinds[0][1]) == all_bits(kinds[1][1])


def test_one_worker_alone() -> None:
    kinds = two_kinds(0, maximize=True)
    for step in range(3):
        for net, opt in kinds:
            backward(net, step, 0)
            opt.step()
        assert all_bits(kinds[0][1]) == all_bits(kinds[1][1])


class Sent(TorchDispatchMode):
    """Bytes that one of three workers sends with what is handed to torch's functional collectives."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("_c10d_functional::") and not name.endswith("wait_tensor"):
            # all-gathers crash on Gloo now and then: see Gather
            shares = {"_c10d_functional::all_to_all_single": 2, "_c10d_functional::all_reduce": 4}
            self.total += -(-shares[name] * args[0].numel() * args[0].element_size() // 3)
        return func(*args, **(kwargs or {}))


@on_ranks(3)
def test_bytes_are_those_that_travel(rank: int, world_size: int) -> None:
    # one bucket of 1000 elements: 128 bytes of votes, chunks of 48
    votes = {"all_gather": 2 * 128, "reduce_scatter": 2 * 48 + 2 * (16 + 48), "all_reduce": -(-4 * 2 * 128 // 3)}
    for algorithm, counted in votes.items():
        param = nn.Parameter(torch.ones(1000))
        opt = LionCub([param], algorithm=algorithm, capturable=True, compression=SignVote())
        param.grad = torch.ones(1000)
        with Sent() as sent:
            opt.step()
        # 13 words of control: 3 + 5 of rates + 4 + 1 of gradients
        assert opt.stats().bytes_sent_per_step == sent.total == counted + 2 * 8 * 13, algorithm


NONFINITE = (
    "NonFiniteError: step {}: a gradient, momentum or update is not finite, first in parameter bias on rank 1; "
    "no worker changed anything"
)
DISAGREE = (
    "WorkersDisagreeError: workers disagree on the step, the bucket layout or the hyperparameters (lr, betas, "
    "weight_decay, maximize) at step 4; no worker changed anything"
)


@on_ranks(2)
def test_what_went_wrong_is_told_by_the_next_step_or_on_demand(rank: int, world_size: int) -> None:
    net = nn.Linear(5, 3)
    opt = LionCub(net.named_parameters(), lr=0.1, capturable=True)

    def step(bad: bool = False) -> str:
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        if bad and rank == 1:
            net.bias.grad[1] = torch.nan  # type: ignore[index]
        return said_by(opt.step)

    assert step() == "no error"
    before = bits_of(net)
    assert step(bad=True) == "no error"
    assert bits_of(net) == before
    assert step() == NONFINITE.format(1)
    assert bits_of(net) == before
    assert step() == "no error"
    assert step(bad=True) == "no error"
    assert said_by(opt.raise_errors) == NONFINITE.format(3)
    assert said_by(opt.raise_errors) == "no error"
    before = bits_of(net)
    opt.param_groups[0]["lr"] = 0.1 + 0.1 * rank
    assert step() == "no error"
    assert bits_of(net) == before
    assert said_by(opt.raise_errors) == DISAGREE
    assert opt.stats().skipped_steps == 2


def test_masters_take_over_what_the_user_writes() -> None:
    p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    opt = LionCub([p], lr=0.5, capturable=True, master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    with torch.no_grad():
        p.mul_(4)
    opt.step()
    assert opt.state[p]["master"].tolist() == p.tolist() == [1.5] * 5
    assert not opt.state[p]["master"].requires_grad


def test_steps_that_are_not_finite_can_be_skipped() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([param], lr=0.5, capturable=True, on_nonfinite="skip")
    for value in (1.0, float("inf"), 1.0):
        param.grad = torch.full((3,), value)
        opt.step()
    opt.raise_errors()
    assert param.tolist() == [0.0, 0.0, 0.0]
    assert (opt.stats().skipped_steps, opt.stats().steps) == (1, 3)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    opt.step()
    assert (opt.stats().skipped_steps, opt.stats().steps) == (1, 4)


@on_ranks(2)
def test_a_gradient_scaler_skips_on_all_ranks(rank: int, world_size: int) -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([param], lr=0.25, capturable=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        opt.zero_grad()
        factor = float("inf") if step == 1 and rank == 0 else 1.0
        scaler.scale((param * factor).sum()).backward()
        scaler.step(opt)
        scaler.update()
    opt.raise_errors()
    assert param.tolist() == [0.5] * 3


def test_what_was_not_told_is_told_before_a_new_layout() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([("first", param)], capturable=True)
    param.grad = torch.full((3,), float("nan"))
    opt.step()
    opt.add_param_group({"params": [("second", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(NonFiniteError, match=r"step 0: .* first in parameter first on rank 0"):
        opt.step()


def test_the_host_reads_nothing_from_the_device() -> None:
    """Tensors without values stand in for a GPU's: whoever asked for one would fail."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(n)) for n in (5, 70)]
        for param in params:
            param.grad = torch.ones_like(param)
        clock, state = torch.zeros((), dtype=torch.int64), defaultdict[Any, dict[str, Any]](dict)
        options = {"lr": torch.ones(()), "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": False}
        groups = [{"params": params, **options}]
        meshes = Meshes([])
        buckets = BucketList(state, [SignVote()], torch.float32, lambda sizes: 8, meshes)
        buckets.append(groups, range(1), by_readiness=False)
        assert len(buckets.all) == 2
        drift = Drift(None, buckets, state)
        engine = StepEngine(
            buckets,
            Membership(None, Comm(bucket_mb=1e-5), False, "reference", meshes),
            Masters(state, False),
            Precision(param_rounding="stochastic"),
            MomentumAverages(None, buckets, drift),
            drift,
            SharedScales(buckets, state, [SignVote()], capturable=True),
            impl="reference",
            capturable=True,
        )
        late = LateReport(clock.device, raises=True)
        proposal = engine.exchange(engine.context(groups, clock, None), Attempt(), [], 0, torch.zeros(1))
        assert isinstance(proposal, Proposal)
        late.note(proposal.decision, clock)
        engine.apply(proposal, None)
        with pytest.raises(DataDependentOutputException):
            int(clock)


def test_a_closure_that_fails_while_a_graph_is_captured_takes_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.zeros(5))
    param.grad = torch.ones(5)
    opt = LionCub([param], lr=0.5, capturable=True)
    opt.verify()

    def closure() -> None:
        raise KeyError("no batch left")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(KeyError, match="no batch left"):
        opt.step(closure)
    assert not param.any()


def test_what_was_told_is_not_told_again_and_verification_that_fails_is_made_again() -> None:
    first, second = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(3))
    opt = LionCub([first], lr=0.5, capturable=True)
    first.grad, second.grad = torch.full((5,), torch.inf), torch.ones(3)
    opt.step()
    # on a GPU the host reads a copy
    late = opt._late
    assert late is not None
    late._last, late._copied = late._report.clone(), SimpleNamespace(synchronize=lambda: None)
    opt.add_param_group({"params": [second]})
    with pytest.raises(NonFiniteError, match="not finite"):
        opt.verify()
    assert not late._last.any()
    late._last = late._copied = None
    first.grad = torch.ones(5)
    opt.step()
    opt.raise_errors()
    assert second.tolist() == [-0.5] * 3


class HostCopies(TorchFunctionMode):
    """Records the calls that would copy values from the host to a device that is not named "cpu"."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, options = getattr(function, "__name__", ""), kwargs or {}
        if name in ("tensor", "as_tensor", "from_numpy", "frombuffer", "new_tensor") and options.get("device") != "cpu":
            self.made.append(name)
        return function(*args, **options)


def copies_of_a_step(rank: int, algorithm: str) -> list[str]:
    net = Net(rank)
    options: dict[str, Any] = {"algorithm": algorithm, "param_rounding": "stochastic", "impl": "reference"}
    opt = LionCub(groups_of(net), lr=0.01, capturable=True, **options)
    net(*batch_of(rank), True).backward()
    with HostCopies() as copies:
        opt.step()
    opt.raise_errors()
    return copies.made


def test_copies_from_the_host_are_counted_and_one_worker_makes_none() -> None:
    # a number that a kernel takes may be written to a tensor of the host's
    with HostCopies() as copies:
        torch.tensor(1.0, device="cpu")
        torch.ones(1).new_tensor([1.0])
    assert copies.made == ["new_tensor"]
    assert copies_of_a_step(0, "all_gather") == []


@on_ranks(2)
def test_a_step_copies_nothing_from_the_host(rank: int, world_size: int) -> None:
    for algorithm in ALGORITHMS[:3]:
        assert copies_of_a_step(rank, algorithm) == []
