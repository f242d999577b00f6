"""bf16 and fp16 parameters that learn: stochastic rounding, fp32 masters and bf16 momentum in both optimizers."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_workers import results_of, together
from nets import Net, batch_of, bits_of, groups_of, train
from optimizers import Lion, LionCub
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lioncub import (
    MomentumSync,
    Quantized,
    SignMean,
    SignVote,
    TernaryVote,
    WorkersDisagreeError,
    broadcast_module,
    simulate,
)

BOTH = pytest.mark.parametrize("optimizer", [Lion, LionCub])
STOCHASTIC: dict[str, Any] = {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16, "rounding_seed": 5}
WAYS: dict[str, dict[str, Any]] = {
    "stochastic": {"param_rounding": "stochastic"},
    "stochastic, bf16 momentum": STOCHASTIC,
    "masters": {"master_weights": True},
    "masters, bf16 momentum": {"master_weights": True, "momentum_dtype": torch.bfloat16},
}
each_way = pytest.mark.parametrize("way", list(WAYS))


def bits(tensors: list[Tensor]) -> bytes:
    return b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors if t.numel())


def state_bits(opt: torch.optim.Optimizer) -> bytes:
    states = [opt.state[p] for group in opt.param_groups for p in group["params"]]
    return bits([state[name] for state in states for name in sorted(state)])


def descend(net: Net, opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        net(*batch_of(step), use_all=step % 3 == 0).backward()
        opt.step()


@each_way
def test_one_worker_is_plain_lion_bit_for_bit(way: str) -> None:
    nets = Net(seed=0), Net(seed=0)
    opts = [kind(groups_of(net), lr=1e-2, **WAYS[way]) for kind, net in zip((Lion, LionCub), nets, strict=True)]
    for net, opt in zip(nets, opts, strict=True):
        descend(net, opt, range(6))
    assert bits_of(nets[0]) == bits_of(nets[1])
    assert state_bits(opts[0]) == state_bits(opts[1])


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_are_the_parameters_of_an_fp32_run(optimizer: type, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    low = [torch.randn(shape, generator=generator).to(dtype) for shape in ((7, 9), (65,), (4, 3, 3, 3), (0,))]
    low[2] = low[2].to(memory_format=torch.channels_last)
    full = [p.float().requires_grad_() for p in low]
    low = [p.requires_grad_() for p in low]
    options = {"lr": 1e-3, "weight_decay": 0.1}
    one, other = optimizer(full, **options), optimizer(low, master_weights=True, **options)
    for step in range(7):
        for p, q in zip(full, low, strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(dtype).to(memory_format=torch.preserve_format)
            p.grad = None if step == 3 and p.dim() == 2 else q.grad.float()
            q.grad = None if p.grad is None else q.grad
        one.step()
        other.step()
    for p, q in zip(full, low, strict=True):
        assert torch.equal(other.state[q]["master"], p)
        assert other.state[q]["master"].stride() == q.stride()
        assert torch.equal(q, p.to(dtype))
        assert torch.equal(other.state[q]["exp_avg"], one.state[p]["exp_avg"])


@BOTH
def test_fp32_parameters_have_no_master_and_are_not_rounded(optimizer: type) -> None:
    results = []
    for options in ({}, {"param_rounding": "stochastic"}, {"master_weights": True}):
        p = torch.randn(70, generator=torch.Generator().manual_seed(0)).requires_grad_()
        opt = optimizer([p], lr=1e-3, **options)
        for _ in range(3):
            p.grad = p.detach().clone()
            opt.step()
        assert set(opt.state[p]) == {"exp_avg"}
        results.append(bits([p, opt.state[p]["exp_avg"]]))
    assert results == [results[0]] * 3


@BOTH
def test_what_is_stuck_when_rounded_to_nearest_learns(optimizer: type) -> None:
    """Weights of 1 whose best value is 0.9, with steps a twentieth of what bf16 can hold there."""
    ends = {}
    for name, options in {"nearest": {}, **WAYS}.items():
        p = torch.ones(200, dtype=torch.bfloat16).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name == "nearest" else "error")
            opt = optimizer([p], lr=2e-4, **options)
        for _ in range(500):
            p.grad = p.detach() - 0.9
            opt.step()
        ends[name] = p.detach().float().mean().item()
    assert ends.pop("nearest") == 1.0
    # 500 steps of 2e-4 lead exactly there; half a spacing of bf16, 2^-9, is what masters lose to rounding
    assert ends == pytest.approx(dict.fromkeys(ends, 0.9), abs=4e-3)


@BOTH
def test_the_warning_names_the_cures(optimizer: type) -> None:
    p = torch.ones(100, dtype=torch.bfloat16).requires_grad_()
    cures = r"Precision\(param_rounding='stochastic'\) or Precision\(master_weights=True\), fp32 parameters or"
    with pytest.warns(UserWarning, match=cures):
        optimizer([p], lr=1e-5)
    with pytest.warns(UserWarning, match="lr 1e-05 is too small"):
        optimizer([p], lr=1e-5, momentum_dtype=torch.bfloat16)


@BOTH
def test_bad_arguments_are_named(optimizer: type) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            {"param_rounding": "up"},
            ValueError,
            r"^param_rounding: expected one of \('nearest', 'stochastic'\), got 'up'",
        ),
        ({"master_weights": 1}, TypeError, "^master_weights: expected True or False, got 1"),
        ({"momentum_dtype": torch.float16}, ValueError, "^momentum_dtype: expected .*bfloat16, got torch.float16"),
        ({"rounding_seed": 0.5}, TypeError, "^rounding_seed: expected an integer, got 0.5"),
        (
            {"master_weights": True, "param_rounding": "stochastic"},
            ValueError,
            "^param_rounding: expected 'nearest' with master_weights=True, .* got 'stochastic'",
        ),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            optimizer([torch.ones(3).requires_grad_()], **options)


def capturable_ways(rank: int, size: int) -> list[int]:
    """Capturable steps, and traced ones, against ordinary ones; gives the number of graphs of each way."""
    graphs = []
    for options in WAYS.values():
        torch._dynamo.reset()
        nets = [Net(seed=rank) for _ in range(3)]
        counter = CompileCounterWithBackend("eager")
        ordinary, *capturable = (
            LionCub(
                net.named_parameters(),
                lr=torch.tensor(1e-2),
                capturable=i > 0,
                bucket_mb=1e-4,
                compression=SignVote(),
                **options,
            )
            for i, net in enumerate(nets)
        )
        traced = torch.compile(capturable[1].step, fullgraph=True, backend=counter)
        for step in range(4):
            for net, take in zip(nets, (ordinary.step, capturable[0].step, traced), strict=True):
                net.zero_grad()
                net(*batch_of(100 * step + rank), use_all=True).backward()
                take()
        for net, opt in zip(nets[1:], capturable, strict=True):
            assert bits_of(net) == bits_of(nets[0])
            assert state_bits(opt) == state_bits(ordinary)
            opt.check_replicas()
            # what the user writes, masters take over
            with torch.no_grad():
                net.mix.weight.mul_(2)
            opt.verify()
            if options.get("master_weights"):
                master = opt.state[net.mix.weight]["master"]
                assert torch.equal(master, net.mix.weight.float())
                assert not master.requires_grad
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize("workers", [1, 2])
def test_capturable_steps_are_the_ordinary_ones(workers: int) -> None:
    assert results_of(capturable_ways, workers, timeout=200.0) == [[1] * len(WAYS)] * workers


@BOTH
@each_way
def test_resume_gives_the_bits_of_never_stopping(optimizer: type, way: str) -> None:
    straight, broken, resumed = Net(seed=0), Net(seed=0), Net(seed=9)
    opts = [optimizer(groups_of(net), lr=1e-2, **WAYS[way]) for net in (straight, broken, resumed)]
    descend(straight, opts[0], range(7))
    descend(broken, opts[1], range(4))
    saved = pickle.loads(pickle.dumps({"net": broken.state_dict(), "opt": opts[1].state_dict()}))
    resumed.load_state_dict(saved["net"])
    opts[2].load_state_dict(saved["opt"])
    descend(resumed, opts[2], range(4, 7))
    assert bits_of(straight) == bits_of(resumed)
    assert state_bits(opts[0]) == state_bits(opts[2])


@each_way
def test_lion_can_be_copied_and_pickled(way: str) -> None:
    net = Net(seed=0)
    opt = Lion(groups_of(net), lr=1e-2, **WAYS[way])
    descend(net, opt, range(2))
    twin_net, twin = copy.deepcopy((net, opt))
    descend(net, opt, range(2, 4))
    descend(twin_net, twin, range(2, 4))
    assert bits_of(net) == bits_of(twin_net)
    assert state_bits(opt) == state_bits(twin)


def with_masters(optimizer: type, value: float) -> tuple[Tensor, Any]:
    p = torch.full((5,), value, dtype=torch.bfloat16).requires_grad_()
    opt = optimizer([p], lr=1e-4, master_weights=True)
    p.grad = torch.ones_like(p)
    opt.step()
    return p, opt


@BOTH
def test_a_parameter_that_was_changed_takes_its_master_along(optimizer: type) -> None:
    p, opt = with_masters(optimizer, 1.0)
    moved = torch.full((5,), 1.0) - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], moved)
    with torch.no_grad():
        # a change that changes nothing
        p.mul_(1)
    opt.step()
    moved = moved - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], moved)
    with torch.no_grad():
        p[2] = 3.0
    opt.step()
    expected = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0]) - torch.tensor(1e-4)
    assert torch.equal(opt.state[p]["master"], expected)
    assert torch.equal(p, expected.bfloat16())


@BOTH
def test_checkpoints_without_and_with_masters(optimizer: type) -> None:
    p, opt = with_masters(optimizer, 1.0)
    saved = copy.deepcopy(opt.state_dict())
    without = copy.deepcopy(saved)
    del without["state"][0]["master"]
    q, other = with_masters(optimizer, 2.0)
    other.load_state_dict(without)
    assert torch.equal(other.state[q]["master"], q.float())
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(saved)
    assert torch.equal(other.state[q]["master"], opt.state[p]["master"])
    q.grad = p.grad = torch.ones_like(p)
    opt.step()
    other.step()
    assert torch.equal(other.state[q]["master"], opt.state[p]["master"])
    plain = optimizer([torch.ones(5, dtype=torch.bfloat16).requires_grad_()], lr=0.5)
    with pytest.raises(ValueError, match=r"expected no master of parameter .*without master_weights=True, got one"):
        plain.load_state_dict(saved)
    half = optimizer([torch.ones(5, dtype=torch.bfloat16).requires_grad_()], lr=0.5, momentum_dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"exp_avg of parameter .* of dtype torch.bfloat16, got torch.float32"):
        half.load_state_dict(optimizer([torch.ones(5, dtype=torch.bfloat16).requires_grad_()], lr=0.5).state_dict())


@BOTH
def test_added_groups_have_masters_and_the_step(optimizer: type) -> None:
    _, opt = with_masters(optimizer, 1.0)
    q = torch.full((5,), 2.0, dtype=torch.float16).requires_grad_()
    opt.add_param_group({"params": [q]})
    q.grad = torch.ones_like(q)
    opt.step()
    assert torch.equal(opt.state[q]["master"], torch.full((5,), 2.0) - torch.tensor(1e-4))
    assert [int(group["step"]) for group in opt.param_groups] == [2, 2]


def same_on_all_workers(rank: int, size: int) -> list[bytes]:
    """Every option with compressions, synchronization and overlap; gives the bits of all parameters of each."""
    found = []
    cases: list[dict[str, Any]] = [
        STOCHASTIC | {"overlap": True},
        STOCHASTIC | {"overlap": False},
        STOCHASTIC | {"compression": Quantized(stochastic=True)},
        STOCHASTIC | {"compression": SignMean(), "momentum_sync": MomentumSync(every=2), "drift_every": 2},
        {"master_weights": True, "compression": TernaryVote(), "momentum_dtype": torch.bfloat16},
        {"master_weights": True, "broadcast": True, "overlap": True},
    ]
    # one way with momentum averaged, one with masters, where there are more workers
    for options in cases if size == 2 else cases[3:5]:
        net = Net(seed=rank)
        opt = LionCub(groups_of(net), lr=1e-2, bucket_mb=1e-5, **options)
        train(net, opt, rank, range(4))
        opt.check_replicas()
        found.append(bits_of(net))
        weight = net.mix.weight
        momentum = opt.state[weight]["exp_avg"]
        assert momentum.dtype == options.get("momentum_dtype", torch.float32)
        if options.get("master_weights"):
            assert torch.equal(opt.state[weight]["master"].bfloat16(), weight)
        mine = momentum.float().clone()
        everyone = [torch.empty_like(mine) for _ in range(size)]
        torch.distributed.all_gather(everyone, mine)
        if "momentum_sync" not in options:
            assert not all(torch.equal(other, mine) for other in everyone), "momentum is a worker's own"
        opt.sync_momentum()
        total = everyone[0]
        for other in everyone[1:]:
            total = total + other
        assert torch.equal(momentum, (total / size).to(momentum.dtype))
    return found


def test_replicas_stay_bit_identical(of_two: Answers, of_three: Answers) -> None:
    for answers in (of_two["same_on_all_workers"], of_three["same_on_all_workers"]):
        assert answers == [answers[0]] * len(answers)
    overlapped, plain = of_two["same_on_all_workers"][0][:2]
    assert overlapped == plain


def save_and_go_on(rank: int, size: int, folder: str) -> bool:
    for way in ("stochastic, bf16 momentum", "masters, bf16 momentum"):
        options = WAYS[way]
        straight, broken, resumed = Net(seed=0), Net(seed=0), Net(seed=9)
        opts = [LionCub(groups_of(net), lr=1e-2, **options) for net in (straight, broken, resumed)]
        train(straight, opts[0], rank, range(3))
        train(broken, opts[1], rank, range(3))
        path = Path(folder) / f"{way} {rank}.pt"
        torch.save({"net": broken.state_dict(), "opt": opts[1].state_dict()}, path)
        saved = torch.load(path)
        # in either order
        opts[2].load_state_dict(saved["opt"])
        resumed.load_state_dict(saved["net"])
        for net, opt in ((straight, opts[0]), (resumed, opts[2])):
            for group in opt.param_groups:
                group["lr"] = 5e-3
            train(net, opt, rank, range(3, 6))
        assert bits_of(straight) == bits_of(resumed), way
        assert state_bits(opts[0]) == state_bits(opts[2]), way
    return True


def test_workers_resume_with_the_bits_of_never_stopping(tmp_path: Path) -> None:
    assert results_of(save_and_go_on, 2, str(tmp_path)) == [True] * 2


def disagree(rank: int, size: int) -> str:
    p = torch.ones(5, dtype=torch.bfloat16).requires_grad_()
    with pytest.raises(WorkersDisagreeError) as caught:
        LionCub([p], lr=0.5, param_rounding="stochastic", rounding_seed=rank)
    return str(caught.value)


def test_workers_that_disagree_are_told(of_two: Answers) -> None:
    assert of_two["disagree"] == ["workers disagree on rounding_seed: rank 0: 0; rank 1: 1"] * 2


def broadcast_later(rank: int, size: int) -> bytes:
    model = nn.Linear(5, 3).bfloat16()
    opt = LionCub(model.parameters(), lr=1e-4, master_weights=True)
    with torch.no_grad():
        model.weight.fill_(1.0 + rank)
    broadcast_module(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(opt.state[model.weight]["master"], torch.full((3, 5), 1.0) - torch.tensor(1e-4))
    opt.check_replicas()
    return bits(list(model.parameters()))


def test_masters_follow_a_broadcast(of_two: Answers) -> None:
    results = of_two["broadcast_later"]
    assert results[0] == results[1]


def test_momentum_that_is_averaged_is_rounded_to_nearest() -> None:
    """Simulated, so that the momentum before the step can be seen."""
    params = [torch.ones(130, dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    with simulate.Workers(2) as workers:
        opts = workers.run(
            lambda rank, group: LionCub(
                [params[rank]], lr=0.1, process_group=group, momentum_sync=MomentumSync(every=2), **STOCHASTIC
            )
        )
        for step in range(2):
            before = [opt.state[p]["exp_avg"].float() for opt, p in zip(opts, params, strict=True)]
            for rank, p in enumerate(params):
                p.grad = torch.randn(130, generator=torch.Generator().manual_seed(2 * step + rank)).bfloat16()
            workers.run(lambda rank, group: opts[rank].step())
        b2, b2c = torch.tensor(0.99), torch.tensor(1 - 0.99)
        to_come = [b2 * m + b2c * p.grad.float() for m, p in zip(before, params, strict=True)]
        mean = ((to_come[0] + to_come[1]) / 2).bfloat16()
        for opt, p in zip(opts, params, strict=True):
            assert torch.equal(opt.state[p]["exp_avg"], mean)


def test_bf16_momentum_takes_half_the_memory_and_its_buckets_too() -> None:
    p = torch.ones(64).requires_grad_()
    opt = LionCub([p], lr=0.5, momentum_dtype=torch.bfloat16, compression=SignVote())
    assert [bucket.exp_avg.dtype for bucket in opt._buckets.all] == [torch.bfloat16]


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "low-precision.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {"torch": torch, "LionCub": LionCub, "model": nn.Linear(16, 4)}
    exec(block, names)
    small, opt = names["small"], names["cheap"]
    before = small.weight.detach().clone()
    for p in small.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert not torch.equal(small.weight, before)
    assert opt.state[small.weight]["exp_avg"].dtype == torch.bfloat16


Answers = dict[str, list[Any]]


@pytest.fixture(scope="module")
def of_two() -> Answers:
    return together(2, same_on_all_workers, disagree, broadcast_later)


@pytest.fixture(scope="module")
def of_three() -> Answers:
    return together(3, same_on_all_workers)
