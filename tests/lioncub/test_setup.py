"""How LionCub is built over real Gloo processes: handshake, broadcast, groups, DDP, and which shards are refused."""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from counting import Counting
from gloo_workers import everyone, on_ranks, said_by, same_on_all, shared_folder
from nets import Net, batch_of, bits, bits_of, groups_of, train
from optimizers import Lion, LionCub
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub import BySize, MomentumSync, SignVote, TernaryVote

# what rank 1 does otherwise, and what all ranks then say
ODD: list[tuple[dict[str, Any], str]] = [
    (
        {"shapes": [(3, 4), (6,)]},
        "parameter 1: ranks 0, 2: b of torch.float32, shape (5,), strides (1,), group 0; "
        "rank 1: b of torch.float32, shape (6,), strides (1,), group 0; shards, as of FullyShardedDataParallel, "
        "cannot be voted on: every rank needs whole parameters",
    ),
    ({"names": ["a"], "shapes": [(3, 4)]}, "the number of parameters: ranks 0, 2: 2; rank 1: 1"),
    ({"algorithm": "all_gather"}, "algorithm: ranks 0, 2: auto; rank 1: all_gather"),
    ({"on_nonfinite": "skip"}, "on_nonfinite: ranks 0, 2: raise; rank 1: skip"),
    ({"bucket_mb": 2}, "bucket_mb: ranks 0, 2: None; rank 1: 2.0"),
    ({"rounding_seed": 1}, "rounding_seed: ranks 0, 2: 0; rank 1: 1"),
    (
        {"momentum_sync": MomentumSync(every=2)},
        "momentum_sync: ranks 0, 2: (not stated); rank 1: (2, 'fixed', False, None, 'fp32')",
    ),
    ({"compression": TernaryVote()}, f"compression: ranks 0, 2: [{BySize()!r}]; rank 1: [TernaryVote()]"),
]


@on_ranks(3)
def test_ranks_that_differ_are_told_so_when_built(rank: int, world_size: int) -> None:
    for odd, message in ODD:
        options = {"algorithm": "auto", **(odd if rank == 1 else {})}
        shapes, names = options.pop("shapes", [(3, 4), (5,)]), options.pop("names", ["a", "b"])
        params = [(name, torch.zeros(shape).requires_grad_()) for name, shape in zip(names, shapes, strict=True)]
        said = said_by(lambda params=params, options=options: LionCub(params, **options))  # type: ignore[misc]
        assert said == f"WorkersDisagreeError: workers disagree on {message}"


@on_ranks(2)
def test_arguments_that_one_rank_has_wrong_are_told_to_all(rank: int, world_size: int) -> None:
    wrong: list[dict[str, Any]] = [
        {"lr": -1.0},
        {"algorithm": "pigeon"},
        {"compression": "fewer bits"},
        {"capturable": True, "overlap": True},
        {"params": []},
    ]
    for options, culprit in itertools.product(wrong, (0, 1, None)):
        given = {"params": Net(0).named_parameters(), "lr": 0.01, **(options if culprit in (rank, None) else {})}
        said = everyone(said_by(lambda given=given: LionCub(given.pop("params"), **given)))  # type: ignore[misc]
        own = said[culprit or 0]
        assert own.startswith(("ValueError", "TypeError"))
        told = f"WorkersDisagreeError: no worker went on, because of an error on rank {culprit}: {own}"
        assert said == [own if culprit in (r, None) else told for r in range(2)]
    LionCub(Net(0).named_parameters(), lr=0.01).check_replicas()


@on_ranks(3)
def test_construction_broadcasts_the_first_ranks_parameters(rank: int, world_size: int) -> None:
    net = Net(seed=rank)
    before = everyone(bits_of(net))
    assert len(set(before)) == 3
    LionCub(net.named_parameters(), lr=1e-2)
    assert bits_of(net) == before[0]


@on_ranks(2)
def test_without_broadcast_the_first_step_compares(rank: int, world_size: int) -> None:
    net = Net(seed=rank)
    before = bits_of(net)
    opt = LionCub(net.named_parameters(), lr=1e-2, broadcast=False)
    net(*batch_of(rank), use_all=True).backward()
    said = said_by(opt.step)
    assert said.startswith("WorkersDisagreeError: parameter conv.weight differs between workers: rank 0: hash ")
    assert same_on_all(said)
    assert before == bits_of(net)


@on_ranks(3)
def test_check_replicas_names_the_first_parameter_that_differs(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    twins = [torch.zeros(9).requires_grad_() for _ in range(2)]
    opt = LionCub(net.named_parameters(), lr=1e-2)
    # equal names hide nothing
    namesakes = LionCub([{"params": [("w", twin)]} for twin in twins])
    opt.check_replicas()
    if rank == 1:
        net.mix.bias.data[4] += 1
        twins[0].data[3] = 1.0
    for built, name in ((opt, "mix.bias"), (namesakes, "w")):
        said = said_by(built.check_replicas)
        assert said.startswith(f"WorkersDisagreeError: parameter {name} differs between workers: ranks 0, 2: hash ")
        assert same_on_all(said)


@on_ranks(3)
def test_broadcast_module_covers_parameters_and_buffers(rank: int, world_size: int) -> None:
    net = Net(seed=rank)
    net.norm.running_mean.fill_(rank + 0.5)
    lioncub.broadcast_module(net)
    assert same_on_all(bits_of(net))
    assert net.norm.running_mean.tolist() == [0.5] * 5


@on_ranks(2)
def test_masters_follow_a_broadcast(rank: int, world_size: int) -> None:
    model = nn.Linear(5, 3).bfloat16()
    opt = LionCub(model.parameters(), lr=1e-4, master_weights=True)
    with torch.no_grad():
        model.weight.fill_(1.0 + rank)
    lioncub.broadcast_module(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(opt.state[model.weight]["master"], torch.full((3, 5), 1.0) - torch.tensor(1e-4))
    opt.check_replicas()
    assert same_on_all(bits(model.parameters()))


def step_on(model: nn.Module, opt: torch.optim.Optimizer, data: torch.Tensor) -> None:
    opt.zero_grad()
    model(data).square().mean().backward()
    opt.step()


@on_ranks(2)
def test_under_ddp_gradients_stay_local_and_buffers_follow(rank: int, world_size: int) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    inner = copy.deepcopy(plain)
    wrapped = DistributedDataParallel(inner)
    lioncub.keep_gradients_local(wrapped)
    opts = [LionCub(net.parameters(), lr=1e-2) for net in (plain, inner)]
    for step in range(5):
        data = torch.randn(8, 7, generator=torch.Generator().manual_seed(10 * step + rank))
        step_on(plain, opts[0], data)
        step_on(wrapped, opts[1], data)
        for p, q in zip(plain.parameters(), inner.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), "the gradient under DDP must be the local one"
    opts[1].check_replicas()
    # a forward in eval mode brings the buffers of the first rank and changes none
    wrapped.eval()(data)
    assert same_on_all(bits_of(inner))
    assert not same_on_all(plain[1].running_mean.tolist()), "without DDP buffers are each worker's own"
    assert same_on_all(inner[1].running_mean.tolist())


@on_ranks(3)
def test_lion_under_ddp_keeps_replicas_equal(rank: int, world_size: int) -> None:
    torch.manual_seed(3)
    net = nn.Linear(7, 9)
    wrapped, opt = DistributedDataParallel(net), Lion(net.parameters(), lr=1e-2)
    for step in range(5):
        step_on(wrapped, opt, torch.randn(8, 7, generator=torch.Generator().manual_seed(10 * step + rank)))
    assert same_on_all(bits_of(net))


@on_ranks(2)
def test_groups_can_be_added_in_mid_run(rank: int, world_size: int) -> None:
    net = Net(seed=0)
    late = torch.full((70,), float(rank)).requires_grad_()
    opt = LionCub(groups_of(net), lr=1e-2)
    train(net, opt, rank, range(3))
    opt.add_param_group({"params": [("late", late)], "lr": 0.5})
    assert opt.stats().buckets[-1].seconds == 0, "it has not travelled yet"
    late.grad = torch.ones(70)
    opt.step()
    assert torch.equal(late, torch.full((70,), -0.5)), "the first rank's value, moved by the vote"
    train(net, opt, rank, range(4, 6))
    opt.check_replicas()
    assert opt.param_groups[2]["step"] == 6
    assert same_on_all(bits_of(net))


@on_ranks(2)
def test_the_active_path_is_logged_once(rank: int, world_size: int) -> None:
    lines: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lioncub")
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    p = torch.zeros(6400).requires_grad_()
    opt = LionCub([p], algorithm="all_gather", impl="reference", compression=SignVote())
    for _ in range(3):
        p.grad = torch.ones(6400)
        opt.step()
    logger.removeHandler(keep)
    # one bit of 6400, and 13 words of control: 3, 5 hyperparameters, 4, and who has a gradient
    line = (
        "LionCub(lr=0.0001): 2 worker(s), SignVote(); 1 bucket(s) by all_gather, "
        f"{800 + 8 * 13:,} bytes sent per worker and step; reference kernels"
    )
    assert lines == ([line] if rank == 0 else [])


@on_ranks(2, alone=True)
def test_an_optimizer_older_than_the_group_refuses_to_pretend(rank: int, world_size: int) -> None:
    dist.destroy_process_group()
    p = torch.zeros(3).requires_grad_()
    opt = LionCub([p])
    second = f"file://{shared_folder()}/second"
    dist.init_process_group("gloo", init_method=second, rank=rank, world_size=world_size)
    p.grad = torch.ones(3)
    expected = "RuntimeError: process_group: expected torch.distributed to be initialised before LionCub is built"
    assert said_by(opt.step).startswith(expected)


@on_ranks(4)
def test_a_process_group_votes_by_itself(rank: int, world_size: int) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    p = torch.zeros(5).requires_grad_()
    opt = LionCub([p], lr=1.0, process_group=halves[rank // 2])
    p.grad = torch.full((5,), 1.0 if rank < 2 else -1.0)
    opt.step()
    opt.check_replicas()
    assert p.tolist() == [-1.0 if rank < 2 else 1.0] * 5


@on_ranks(3)
def test_stats_count_the_bytes_that_are_sent(rank: int, world_size: int) -> None:
    for algorithm in ("all_gather", "reduce_scatter", "all_reduce"):
        net = Net(seed=0)
        opt = LionCub(net.named_parameters(), lr=1e-2, algorithm=algorithm, bucket_mb=1e-5)
        train(net, opt, rank, range(1))
        with Counting() as counting:
            opt.step()
        assert sum(counting.sent.values()) == opt.stats().bytes_sent_per_step > 0


def test_one_rank_has_one_bucket() -> None:
    params = [nn.Parameter(torch.zeros(1000, 1000)) for _ in range(20)]
    assert len(LionCub(params, lr=0.01).stats().buckets) == 1


# FullyShardedDataParallel


def sharded(use_orig_params: bool, sizes: tuple[int, ...] = (8, 8, 8)) -> tuple[nn.Module, FullyShardedDataParallel]:
    torch.manual_seed(3)
    net = nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
    plain = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plain, FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))


def refusal(params: list[Any], **options: Any) -> str:
    """What is said of parameters, which stay as they were."""
    named = [pair if isinstance(pair, tuple) else ("", pair) for pair in params]
    before = [p.detach().clone() for _, p in named]
    said = said_by(lambda: LionCub(params, **options))
    assert all(torch.equal(p, q) for (_, p), q in zip(named, before, strict=True))
    return said


@on_ranks(2)
def test_shards_are_refused_before_anything_is_written(rank: int, world_size: int) -> None:
    for use_orig_params in (True, False):
        _, net = sharded(use_orig_params)
        said = refusal(list(net.named_parameters()))
        assert "expected a whole tensor, got a shard of FullyShardedDataParallel" in said
    # the same without anything that says so: shards of other sizes, then of equal ones
    _, net = sharded(use_orig_params=True)
    unequal = list(net.parameters())
    _, other = sharded(use_orig_params=True, sizes=(8, 8, 8, 8, 8))
    equal = [p for p in other.parameters() if p.numel()]
    for p in unequal + equal:
        del p._fsdp_flattened
    by_size, by_storage = refusal(unequal, broadcast=False), refusal(equal)
    assert by_size.startswith("WorkersDisagreeError: workers disagree on parameter 0")
    assert "shards, as of FullyShardedDataParallel, cannot be voted on" in by_size
    assert "got 1-d views into one flat storage, as shards of FullyShardedDataParallel are" in by_storage


@on_ranks(2)
def test_lion_steps_on_shards(rank: int, world_size: int) -> None:
    for use_orig_params in (True, False):
        plain, net = sharded(use_orig_params)
        one, other = Lion(plain.parameters(), lr=0.1), Lion(net.parameters(), lr=0.1)
        for step in range(3):
            data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            for model, opt in ((plain, one), (net, other)):
                opt.zero_grad()
                model(data).square().sum().backward()
                opt.step()
        with FullyShardedDataParallel.summon_full_params(net):
            whole = dict(net.module.named_parameters())
            assert all(torch.equal(p, whole[name]) for name, p in plain.named_parameters())


@on_ranks(2)
def test_whole_parameters_may_share_a_storage(rank: int, world_size: int) -> None:
    """Matrices and vectors in one storage, as cuDNN has those of an LSTM, are no shards."""
    flat = torch.zeros(100)
    params = [flat[:60].view(6, 10), flat[60:80], flat[80:]]
    params = [p.detach().requires_grad_() for p in params]
    opt = LionCub(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    assert float(flat.sum()) == -50.0


@on_ranks(2)
def test_zero_redundancy_is_refused(rank: int, world_size: int) -> None:
    """Of shards of equal shapes the first rank's would overwrite the others'."""
    with warnings.catch_warnings():
        # torch's own, of torch.jit.script
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer
    params = [torch.full((8,), float(i)).requires_grad_() for i in range(4)]
    said = said_by(lambda: ZeroRedundancyOptimizer(params, lioncub.LionCub, lr=1e-3))
    assert said.startswith("TypeError: optimizer_class: expected an optimizer that steps on each rank alone"), said
    assert [p.detach().tolist() for p in params] == [[float(i)] * 8 for i in range(4)]
    alone = ZeroRedundancyOptimizer(params, lioncub.Lion, lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    alone.step()
    assert same_on_all([p.tolist() for p in params])
