"""Compressions of LionCub: against their rules in plain torch, param groups, checkpoints.

That results depend neither on buckets nor algorithm nor overlap is in tests/golden.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from gloo_workers import on_ranks
from nets import Net, bits_of, groups_of, train
from optimizers import LionCub
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lioncub import BySize, Quantized, SignMean, SignVote, TernaryVote
from lioncub.collectives import CodeFormat
from lioncub.collectives.average import average_bytes
from lioncub.compression import AnyCompression, Compression, compression_of, default_compression

COMPRESSIONS: list[AnyCompression] = [
    SignVote(),
    SignMean(),
    TernaryVote(),
    Quantized(),
    Quantized(bits=4, norm="l2", stochastic=True, seed=3),
    Quantized(bits=8, norm="linf", block=64),
    Quantized(bits=2, norm="l2", stochastic=True, block=64, share_scales_every=2),
    BySize(large=TernaryVote(), max_numel=50),
]


def gradients(world_size: int, step: int, n: int) -> Tensor:
    """[N, n]: in whole quarters, so that updates are often zero and sums often tied."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(-2, 3, (world_size, n), generator=generator).float() / 4


def codes_by_the_rules(compression: Compression, update: Tensor, step: int, rank: int, workers: int) -> Tensor:
    """A rank's codes of float [n], as whole numbers; without random numbers and blocks."""
    if isinstance(compression, TernaryVote):
        return update.sign()
    if isinstance(compression, Quantized):
        level = 2 ** (compression.bits - 1) - 1
        magnitude = update.abs().double()
        scale = {"l1": magnitude.mean(), "l2": magnitude.square().mean().sqrt(), "linf": magnitude.max()}
        gain = 1.0 if compression.norm == "linf" else 0.5
        factor = torch.tensor(gain * level) / scale[compression.norm].float()
        return (update * factor).round().clamp(-level, level)
    abstain = (torch.arange(len(update)) + step + (rank + step // 4) % workers) % 2 * 2 - 1
    return torch.where(update == 0, abstain, update.sign())


@on_ranks(2, 3)
def test_steps_follow_the_rules(rank: int, world_size: int) -> None:
    n, lr, decay = 130, 0.5, 0.1
    deterministic = [Quantized(bits=4, norm="l1"), Quantized(bits=8, norm="linf"), Quantized(bits=2, norm="l2")]
    small, large = BySize(small=deterministic[0], max_numel=n), BySize(large=deterministic[0], max_numel=n - 1)
    singles: list[Compression] = [SignVote(), SignMean(), TernaryVote(), Quantized()]
    for compression in [*singles, *deterministic, small, large]:
        p = torch.zeros(n).requires_grad_()
        opt = LionCub([p], lr=lr, weight_decay=decay, compression=compression)
        compression = compression_of(compression, n)
        x, m = torch.zeros(n), torch.zeros(world_size, n)
        for t in range(5):
            grads = gradients(world_size, t, n)
            update = torch.tensor(0.9) * m + torch.tensor(1 - 0.9) * grads
            total = sum(codes_by_the_rules(compression, row, t, r, world_size) for r, row in enumerate(update))
            if compression.form.result == "majority":
                direction = torch.where(total == 0, (torch.arange(n) + t // 2) % 2 * 2.0 - 1, total.sign())
                move = direction * lr
            elif isinstance(compression, SignMean):
                move = total * (torch.tensor(lr, dtype=torch.float64) / world_size).float()
            else:
                move = total.sign() * lr
            x = x * torch.tensor(1 - lr * decay) - move
            m = torch.tensor(0.99) * m + torch.tensor(1 - 0.99) * grads
            p.grad = grads[rank].clone()
            opt.step()
            wrong = (p != x).nonzero()
            assert not len(wrong), f"{compression}, step {t}, element {int(wrong[0])}: {p[wrong[0]]}, not {x[wrong[0]]}"
            assert torch.equal(opt.state[p]["exp_avg"], m[rank])
            assert opt.stats().tied == pytest.approx(float((total == 0).float().mean()))


@on_ranks(2, 3)
def test_shared_scales_are_means_of_all_ranks(rank: int, world_size: int) -> None:
    """Levels of c by the mean of all workers' scales of the last even step; in the first step by each one's own."""
    n, lr = 130, 0.5
    for grad_scale in (1.0, -1.0):
        compression = Quantized(bits=4, norm="linf", block=64, share_scales_every=2)
        p = torch.zeros(n).requires_grad_()
        opt = LionCub([p], lr=lr, compression=compression, maximize=grad_scale < 0)
        x, m, shared = torch.zeros(n), torch.zeros(world_size, n), None
        for t in range(7):
            # gradients of one worker are larger than the other's
            sizes = 4.0 ** torch.arange(world_size)
            grads = gradients(world_size, t, n) * sizes[:, None]
            update = torch.tensor(0.9) * m + torch.tensor(1 - 0.9) * grads * grad_scale
            own = torch.stack([part.abs().amax(1) for part in update.split(64, dim=1)], dim=1)
            scale = own if shared is None else shared.expand(world_size, -1)
            factor = torch.where(scale == 0, 0.0, 7 / scale).repeat_interleave(64, dim=1)[:, :n]
            total = (update * factor).round().clamp(-7, 7).sum(0)
            parity = (torch.arange(n) + t // 2) % 2 * 2.0 - 1
            direction = torch.where(total == 0, parity, total.sign())
            if t % 2 == 0:
                shared = sum(own) / world_size
            x = x - direction * lr
            m = torch.tensor(0.99) * m + torch.tensor(1 - 0.99) * grads * grad_scale
            p.grad = grads[rank].clone()
            opt.step()
            assert torch.equal(p, x), (grad_scale, t)
            assert torch.equal(opt.state[p]["scale"], shared)
            stats = opt.stats()
            # of control 13 words: 3, 5 hyperparameters, 4, and who has a gradient
            control = 8 * 13 * (world_size - 1)
            sent = stats.bytes_sent_per_step - stats.buckets[0].bytes_sent - control
            assert sent == (average_bytes(3, world_size) if t % 2 == 0 else 0)
    return opt.state[p]["scale"].tolist()


@on_ranks(2)
def test_shared_scales_are_in_the_checkpoint(rank: int, world_size: int) -> None:
    compression = Quantized(norm="l2", stochastic=True, block=64, share_scales_every=3)
    nets = [Net(seed=rank) for _ in range(2)]
    whole, resumed = (LionCub(groups_of(net), lr=1e-2, compression=compression) for net in nets)
    train(nets[0], whole, rank, range(4))
    nets[1].load_state_dict(nets[0].state_dict())
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert not resumed.state[nets[1].table.weight]["scale"].isnan().any()
    train(nets[0], whole, rank, range(4, 7))
    train(nets[1], resumed, rank, range(4, 7))
    assert bits_of(nets[0]) == bits_of(nets[1])
    # checkpoints without scales fit: the next average makes them
    without = copy.deepcopy(whole.state_dict())
    for state in without["state"].values():
        del state["scale"]
    resumed.load_state_dict(without)
    assert resumed.state[nets[1].table.weight]["scale"].isnan().all()


@on_ranks(2)
def test_each_param_group_has_its_own_compression(rank: int, world_size: int) -> None:
    net = Net(seed=rank)
    ternary, *others = groups_of(net)
    groups = [{**ternary, "compression": TernaryVote()}, *others]
    opt = LionCub(groups, lr=1e-2, bucket_mb=1.0, algorithm="all_gather", compression=SignVote())
    train(net, opt, rank, range(3))
    added = torch.nn.Parameter(torch.zeros(64))
    opt.add_param_group({"params": [("added", added)], "compression": Quantized(bits=8)})
    for p in [*net.parameters(), added]:
        p.grad = torch.ones_like(p)
    opt.step()
    opt.check_replicas()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    opt.load_state_dict(torch.load(file, weights_only=True))
    buckets = opt.stats().buckets
    assert [bucket.compression.split("(")[0] for bucket in buckets] == ["TernaryVote", "SignVote", "Quantized"]
    # 64 codes of 8 bits; messages are padded to 16 codes a byte
    assert buckets[2].bytes_sent == 128


@on_ranks(2)
def test_by_size_small_tensors_go_apart(rank: int, world_size: int) -> None:
    """A param group by size, and the same tensors in two groups."""
    small, large = Quantized(bits=8, norm="linf", share_scales_every=2), SignVote()
    found = []
    for by_size in (True, False):
        net = Net(seed=rank)
        named = list(net.named_parameters())
        parts = [[pair for pair in named if (pair[1].numel() <= 49) == is_small] for is_small in (True, False)]
        groups = [{"params": part, "compression": c} for part, c in zip(parts, (small, large), strict=True)]
        further = {"compression": BySize(small=small, max_numel=49)} if by_size else {}
        opt = LionCub(named if by_size else groups, lr=1e-2, bucket_mb=1.0, **further)
        train(net, opt, rank, range(4))
        opt.check_replicas()
        found.append((bits_of(net), sorted((b.elements, b.compression, b.bytes_sent) for b in opt.stats().buckets)))
        sizes = [sum(p.numel() for _, p in part) for part in parts]
    assert found[0] == found[1]
    assert [elements for elements, *_ in found[0][1]] == sorted(sizes)
    assert {compression.split("(")[0] for _, compression, _ in found[0][1]} == {"Quantized", "SignVote"}


FINE, SIGNS = repr(BySize().small), repr(SignVote())


@on_ranks(4)
def test_the_default_is_finer_for_small_tensors(rank: int, world_size: int) -> None:
    assert FINE.startswith("Quantized(")
    for capturable in (False, True):
        params = [torch.zeros(n).requires_grad_() for n in (1024, 1025)]
        opt = LionCub(params, mesh=DeviceMesh("cpu", [[0, 1], [2, 3]]), capturable=capturable)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        assert [bucket.compression for bucket in opt.stats().buckets] == [FINE, SIGNS]


def test_the_default_is_signs_where_no_field_holds_sums_of_levels() -> None:
    assert default_compression(258) == BySize()
    assert default_compression(259) == SignVote()
    BySize().small.form.field_bits(258)
    with pytest.raises(ValueError, match="16"):
        BySize().small.form.field_bits(259)
    alone = LionCub([torch.zeros(n).requires_grad_() for n in (1024, 1025)])
    assert [bucket.compression for bucket in alone.stats().buckets] == [SIGNS]
    assert CodeFormat(1, "sum") == SignMean().form
    assert Quantized(bits=4).wire_bits(8) == (4, 1)
    assert SignMean().wire_bits(16) == (1, 8)


def test_one_worker_alone_is_lion_whatever_the_compression() -> None:
    ends = []
    for compression in (None, *COMPRESSIONS):
        net = Net(seed=1)
        train(net, LionCub(groups_of(net), lr=1e-2, compression=compression), 0, range(3))
        ends.append(bits_of(net))
    assert ends == [ends[0]] * len(ends)
