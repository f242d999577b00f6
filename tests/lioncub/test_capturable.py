"""Steps that the host never waits for: the same bits as ordinary ones, eager or compiled, and errors told later."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from gloo_workers import results_of, together
from nets import Net, batch_of, groups_of
from optimizers import LionCub
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lioncub import Comm, MomentumSync, NonFiniteError, WorkersDisagreeError
from lioncub.buckets import BucketList
from lioncub.compression import SignVote
from lioncub.control import Attempt, LateReport
from lioncub.membership import Membership
from lioncub.payloads import Drift, MomentumAverages, SharedScales
from lioncub.precision import Masters, Precision
from lioncub.simulate import Workers
from lioncub.step import Proposal, StepEngine

ALGORITHMS = ("all_gather", "reduce_scatter", "all_reduce", "auto")
BUCKET_MB = 1e-4


def assert_alike(one: LionCub, other: LionCub) -> None:
    """Parameters and momentum, bit for bit."""
    pairs = zip(one._named_parameters(), other._named_parameters(), strict=True)
    for (name, p), (_, q) in pairs:
        assert torch.equal(p, q), name
        assert torch.equal(one.state[p]["exp_avg"], other.state[q]["exp_avg"]), name


def backward(net: Net, step: int, rank: int) -> None:
    net.zero_grad()
    net(*batch_of(100 * step + rank), use_all=rank != 1).backward()


def all_algorithms(rank: int, size: int) -> list[tuple[Any, ...]]:
    found = []
    for algorithm in ALGORITHMS:
        ordinary, capturable = Net(rank), Net(rank)
        options = {"lr": 0.01, "algorithm": algorithm, "bucket_mb": BUCKET_MB, "compression": SignVote()}
        one = LionCub(groups_of(ordinary), **options)
        other = LionCub(groups_of(capturable), capturable=True, **options)
        for step in range(3):
            backward(ordinary, step, rank)
            backward(capturable, step, rank)
            one.step()
            other.step()
            for opt in (one, other):
                opt.param_groups[0]["lr"] *= 0.7
            assert_alike(one, other)
        other.check_replicas()
        mine, theirs = one.stats(), other.stats()
        assert (mine.tied, mine.unanimous) == (theirs.tied, theirs.unanimous)
        assert theirs.steps == 3
        found.append((algorithm, [bucket.algorithm for bucket in theirs.buckets], theirs.bytes_sent_per_step))
    return found


def test_capturable_steps_are_the_ordinary_ones(of_two: Answers, of_three: Answers) -> None:
    for found in of_two["all_algorithms"] + of_three["all_algorithms"]:
        for algorithm, used, sent in found:
            assert set(used) <= {"all_gather", "reduce_scatter", "all_reduce"}
            assert algorithm == "auto" or set(used) == {algorithm}
            assert sent > 0


def test_one_worker_alone() -> None:
    ordinary, capturable = Net(0), Net(0)
    one = LionCub(groups_of(ordinary), lr=0.01, maximize=True)
    other = LionCub(groups_of(capturable), lr=0.01, maximize=True, capturable=True)
    for step in range(3):
        backward(ordinary, step, 0)
        backward(capturable, step, 0)
        one.step()
        other.step()
        assert_alike(one, other)


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


def counted_bytes(rank: int, size: int) -> dict[str, tuple[int, int, int]]:
    """Bytes told, travelled, and in a hand count, of one bucket of 1000 elements in one tensor."""
    found = {}
    for algorithm in ALGORITHMS[:3]:
        param = nn.Parameter(torch.ones(1000))
        opt = LionCub([param], algorithm=algorithm, capturable=True, compression=SignVote())
        param.grad = torch.ones(1000)
        with Sent() as sent:
            opt.step()
        # 128 bytes of votes, chunks of 48; 13 words of control: 3 + 5 of rates + 4 + 1 of gradients
        votes = {"all_gather": 2 * 128, "reduce_scatter": 2 * 48 + 2 * (16 + 48), "all_reduce": -(-4 * 2 * 128 // 3)}
        found[algorithm] = (opt.stats().bytes_sent_per_step, sent.total, votes[algorithm] + 2 * 8 * 13)
    return found


def test_bytes_are_those_that_travel(of_three: Answers) -> None:
    for found in of_three["counted_bytes"]:
        for algorithm, (told, sent, counted) in found.items():
            assert told == sent == counted, algorithm


def told_later(rank: int, size: int) -> dict[str, str]:
    found: dict[str, str] = {}

    def attempt(what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (NonFiniteError, WorkersDisagreeError) as error:
            found[what] = f"{type(error).__name__}: {error}"

    net = nn.Linear(5, 3)
    opt = LionCub(net.named_parameters(), lr=0.1, capturable=True)

    def step(bad: bool = False) -> None:
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        if bad and rank == 1:
            net.bias.grad[1] = float("nan")
        opt.step()

    step()
    before = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in net.parameters()]
    attempt("at once", lambda: step(bad=True))
    assert all(map(torch.equal, before[1], net.parameters()))
    attempt("next step", step)
    assert all(map(torch.equal, before[1], net.parameters()))
    attempt("no more", step)
    step(bad=True)
    attempt("on demand", opt.raise_errors)
    attempt("no more on demand", opt.raise_errors)
    after = [p.detach().clone() for p in net.parameters()]
    opt.param_groups[0]["lr"] = 0.1 + 0.1 * rank
    step()
    assert all(map(torch.equal, after, net.parameters()))
    attempt("another lr", opt.raise_errors)
    found["skipped"] = str(opt.stats().skipped_steps)
    return found


def test_what_went_wrong_is_told_by_the_next_step_or_on_demand(of_two: Answers) -> None:
    message = "NonFiniteError: step {}: a gradient, momentum or update is not finite, first in parameter bias on rank "
    message += "1; no worker changed anything"
    disagree = "WorkersDisagreeError: workers disagree on the step, the bucket layout or the hyperparameters (lr, "
    disagree += "betas, weight_decay, maximize) at step 4; no worker changed anything"
    for found in of_two["told_later"]:
        expected = {"next step": message.format(1), "on demand": message.format(3), "another lr": disagree}
        assert found == {**expected, "skipped": "2"}


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


def test_what_was_not_told_is_told_before_a_new_layout() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([("first", param)], capturable=True)
    param.grad = torch.full((3,), float("nan"))
    opt.step()
    opt.add_param_group({"params": [("second", nn.Parameter(torch.ones(2)))]})
    with pytest.raises(NonFiniteError, match=r"step 0: .* first in parameter first on rank 0"):
        opt.step()


def scaled(rank: int, size: int) -> list[list[float]]:
    """With a GradScaler, whose overflow on one worker skips the step on all."""
    found = []
    for capturable in (False, True):
        param = nn.Parameter(torch.ones(3))
        opt = LionCub([param], lr=0.25, capturable=capturable)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            opt.zero_grad()
            factor = float("inf") if step == 1 and rank == 0 else 1.0
            scaler.scale((param * factor).sum()).backward()
            scaler.step(opt)
            scaler.update()
        opt.raise_errors()
        found.append(param.tolist())
    return found


def test_a_gradient_scaler_skips_on_all_workers(of_two: Answers) -> None:
    for ordinary, capturable in of_two["scaled"]:
        assert ordinary == capturable == [0.5] * 3


def test_checkpoints_serve_both_kinds() -> None:
    def trained(capturable: bool, steps: range, state: Any = None, net: Net | None = None) -> tuple[Net, LionCub]:
        net = net or Net(0)
        opt = LionCub(groups_of(net), lr=torch.tensor(0.01), capturable=capturable)
        clock, lr = opt.param_groups[0]["step"], opt.param_groups[0]["lr"]
        if state is not None:
            opt.load_state_dict(state)
            if capturable:
                # what a graph may hold stays where it was
                assert opt.param_groups[0]["step"] is opt.param_groups[1]["step"] is clock
                assert opt.param_groups[0]["lr"] is lr
        for step in steps:
            backward(net, step, 0)
            opt.step()
        return net, opt

    _, whole = trained(False, range(4))
    for first in (False, True):
        for second in (False, True):
            net, opt = trained(first, range(2))
            opt.param_groups[1]["betas"] = (0.8, 0.95)
            _, resumed = trained(second, range(2, 4), copy.deepcopy(opt.state_dict()), net)
            assert_alike(whole, resumed)
            assert int(resumed.param_groups[0]["step"]) == 4


def added_group(rank: int, size: int) -> bool:
    net, twin = Net(rank), Net(rank)
    matrices = [[p for p in model.parameters() if p.dim() > 1] for model in (net, twin)]
    one = LionCub(matrices[0], lr=0.1, compression=SignVote())
    other = LionCub(matrices[1], lr=0.1, capturable=True, compression=SignVote())
    for opt, model in ((one, net), (other, twin)):
        backward(model, 0, rank)
        opt.step()
        opt.add_param_group({"params": [p for p in model.parameters() if p.dim() <= 1], "lr": 0.01})
        backward(model, 1, rank)
        opt.step()
    assert_alike(one, other)
    return True


def test_a_group_that_is_added_takes_part(of_two: Answers) -> None:
    assert of_two["added_group"] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": True}, "^overlap: expected False with capturable=True, got True"),
        (
            {"momentum_sync": MomentumSync(every=2)},
            r"^momentum_sync: expected None or MomentumSync\(every=1\)",
        ),
        ({"drift_every": 5}, "^drift_every: expected None with capturable=True, got 5"),
        ({"algorithm": "hierarchical"}, "^algorithm: expected one of .* with capturable=True, got 'hierarchical'"),
    ],
)
def test_what_cannot_be_captured_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LionCub([nn.Parameter(torch.ones(3))], capturable=True, **options)


def test_simulated_workers_are_refused() -> None:
    def build(rank: int, group: Any) -> None:
        LionCub([nn.Parameter(torch.ones(3))], capturable=True, process_group=group)

    with pytest.raises(Exception, match="process_group: expected real workers with capturable=True"):
        Workers(2).run(build)


def test_the_host_reads_nothing_from_the_device() -> None:
    """Tensors without values stand in for a GPU's: whoever asked for one would fail."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(n)) for n in (5, 70)]
        for param in params:
            param.grad = torch.ones_like(param)
        clock, state = torch.zeros((), dtype=torch.int64), defaultdict[Any, dict[str, Any]](dict)
        options = {"lr": torch.ones(()), "betas": (0.9, 0.99), "weight_decay": 0.1, "maximize": False}
        groups = [{"params": params, **options}]
        buckets = BucketList(state, [SignVote()], torch.float32, lambda sizes: 8)
        buckets.append(groups, range(1), by_readiness=False)
        assert len(buckets.all) == 2
        drift = Drift(None, buckets, state)
        engine = StepEngine(
            buckets,
            Membership(None, Comm(bucket_mb=1e-5), False, "reference"),
            Masters(state, {}, False),
            Precision(param_rounding="stochastic"),
            MomentumAverages(None, buckets, drift),
            drift,
            SharedScales(buckets, state, capturable=True),
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


def copies_from_the_host(rank: int, size: int) -> list[list[str]]:
    found = []
    for algorithm in ("all_gather", "reduce_scatter", "all_reduce"):
        net = Net(rank)
        how = {"algorithm": algorithm, "param_rounding": "stochastic"}
        opt = LionCub(groups_of(net), lr=0.01, capturable=True, impl="reference", **how)
        net(*batch_of(rank), True).backward()
        with HostCopies() as copies:
            opt.step()
        opt.raise_errors()
        found.append(copies.made)
    return found


def test_a_step_copies_nothing_from_the_host(of_two: Answers) -> None:
    # a number that a kernel takes may be written to a tensor of the host's
    with HostCopies() as copies:
        torch.tensor(1.0, device="cpu")
        torch.ones(1).new_tensor([1.0])
    assert copies.made == ["new_tensor"]
    assert copies_from_the_host(0, 1) == [[]] * 3
    assert of_two["copies_from_the_host"] == [[[]] * 3] * 2


def reset_compiler() -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # importing it warns of torch's own use of torch.jit
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")


def compiled(opt: LionCub, backend: str = "inductor") -> tuple[Callable[[], Any], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(opt.step, fullgraph=True, backend=counter), counter


def steps_under_a_schedule(rank: int, size: int, algorithm: str, backend: str) -> int:
    reset_compiler()
    eager, traced = Net(rank), Net(rank)
    options = {"algorithm": algorithm, "bucket_mb": BUCKET_MB, "capturable": True, "compression": SignVote()}
    one = LionCub(eager.named_parameters(), lr=torch.tensor(0.01), **options)
    other = LionCub(traced.named_parameters(), lr=torch.tensor(0.01), **options)
    assert len(other.stats().buckets) > 1
    step, counter = compiled(other, backend)
    schedules = [torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t)) for opt in (one, other)]
    for t in range(50):
        backward(eager, t % 3, rank)
        for p, q in zip(eager.parameters(), traced.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        one.step()
        step()
        with warnings.catch_warnings():
            # a scheduler sees only calls of the step that it wrapped, which a compiled one is not
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            for schedule in schedules:
                schedule.step()
    assert_alike(one, other)
    other.check_replicas()
    assert other.stats().steps == 50
    return int(counter.frame_count)


# machine code takes each worker half a minute and a trace five seconds; on neither has their number any influence
@pytest.mark.parametrize(
    ("workers", "algorithm", "backend"),
    [(1, "auto", "aot_eager"), (2, "reduce_scatter", "inductor"), (4, "all_gather", "eager")],
)
def test_a_compiled_step_is_one_graph_and_the_eager_step(workers: int, algorithm: str, backend: str) -> None:
    assert results_of(steps_under_a_schedule, workers, algorithm, backend, timeout=200.0) == [1] * workers


def whole_training_steps(rank: int, size: int) -> tuple[int, bool]:
    reset_compiler()
    torch._dynamo.config.trace_autograd_ops = True
    nets = [nn.Sequential(nn.Linear(9, 33), nn.GELU(), nn.Linear(33, 2)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = [LionCub(net.parameters(), lr=torch.tensor(0.01), capturable=True) for net in nets]

    def train(net: nn.Module, opt: LionCub, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    # the compiler's own forward and backward differ in the last bits; docs/examples/compiled.py runs with them
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(lambda x, y: train(nets[1], opts[1], x, y), fullgraph=True, backend=counter)
    for t in range(50):
        generator = torch.Generator().manual_seed(100 * t + rank)
        x = torch.randn(8, 9, generator=generator)
        y = x[:, :2].tanh()
        train(nets[0], opts[0], x, y)
        fast(x, y)
        for opt in opts:
            opt.zero_grad()
            opt.param_groups[0]["lr"].mul_(0.99)
    opts[1].check_replicas()
    same = all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
    return int(counter.frame_count), same


def test_a_whole_training_step_is_one_graph() -> None:
    assert results_of(whole_training_steps, 2, timeout=200.0) == [(1, True)] * 2


def test_a_compiled_step_asks_for_verification_first() -> None:
    param = nn.Parameter(torch.ones(3))
    opt = LionCub([param], lr=torch.tensor(0.1), capturable=True)
    param.grad = torch.ones(3)
    step, _ = compiled(opt, "eager")
    step()
    opt.load_state_dict(opt.state_dict())
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"expected verify\(\) before a compiled or captured step"):
        step()
    opt.verify()
    torch._dynamo.reset()
    step()
    assert torch.allclose(param, torch.full((3,), 0.8))


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def of_two() -> Answers:
    return together(2, all_algorithms, told_later, scaled, added_group, copies_from_the_host)


@pytest.fixture(scope="module")
def of_three() -> Answers:
    return together(3, all_algorithms, counted_bytes)
