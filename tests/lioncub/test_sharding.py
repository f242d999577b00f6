"""Sharded parameters over real Gloo processes: steps have the bits of unsharded ones, and ranks decide together."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import everyone, on_ranks, said_by, same_on_all
from optimizers import Lion, LionCub
from shards import WIDTH, Net, batch_of, fsdp, grid, tensor_parallel, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from lioncub import MomentumSync, Quantized, SignMean, SignVote, TernaryVote

MESHES = {"2x2": (2, 2), "1x4": (1, 4), "4x1": (4, 1)}


def sharded(shard: Callable[[Net, DeviceMesh], nn.Module], mesh: DeviceMesh, **sizes: Any) -> tuple[nn.Module, Net]:
    """A model, sharded, and the same one whole."""
    return shard(Net(**sizes), mesh["shard"]), Net(**sizes)


def pairs_of(net: nn.Module, twin: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, param), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        yield name, param, other


def give_gradients(net: nn.Module, twin: nn.Module, seed: int, *, missing: int = 0) -> None:
    """Give both the same gradients, at which every element's sign may differ between the ranks that vote."""
    generator = torch.Generator().manual_seed(seed)
    for i, (_, param, other) in enumerate(pairs_of(net, twin)):
        grad = torch.randn(other.shape, generator=generator)
        # ties and abstentions go by the index of an element
        grad[torch.rand(other.shape, generator=generator) < 0.2] = 0
        grad = grad.to(other.dtype)
        other.grad = None if missing and i % missing == 0 else grad
        param.grad = None
        if other.grad is not None:
            param.grad = shard_of(grad, param)


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor.clone()
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def assert_equal(net: nn.Module, twin: nn.Module, opt: Any, other: Any) -> None:
    for name, param, theirs in pairs_of(net, twin):
        assert torch.equal(whole(param.detach()), theirs), f"parameter {name}"
        mine = opt.state[param]["exp_avg"]
        assert torch.equal(whole(mine), other.state[theirs]["exp_avg"]), f"momentum of {name}"
        assert isinstance(mine, DTensor) == isinstance(param, DTensor)
        if isinstance(param, DTensor):
            assert (mine.placements, mine.shape, mine.stride()) == (param.placements, param.shape, param.stride())


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [(name, param) for name, param in named if param.dim() > 1], "weight_decay": 0.1},
        {"params": [(name, param) for name, param in named if param.dim() <= 1], "lr": 3e-3},
    ]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "signs": {"compression": SignVote()},
    "mean of signs": {"compression": SignMean()},
    "ternary": {"compression": TernaryVote()},
    "own scales": {"compression": Quantized(bits=4, norm="linf")},
    "blocks": {"compression": Quantized(bits=4, norm="linf", block=2, share_scales_every=3)},
    "momentum, in turns": {"momentum_sync": MomentumSync(every=3, schedule="staggered", dtype="bf16")},
    "momentum, bf16": {"momentum_sync": MomentumSync(every=2, select=["*weight"]), "momentum_dtype": torch.bfloat16},
    "masters": {"master_weights": True},
    "stochastic rounding": {"param_rounding": "stochastic", "momentum_dtype": torch.bfloat16},
    "stochastic codes": {"compression": Quantized(bits=4, norm="linf", stochastic=True)},
}
LOW = ("masters", "stochastic rounding")
# blocks of scales, and of random words, begin with a shard
_FOURS: dict[str, Any] = {"hidden": (8, 104), "width": 16, "outputs": 8}
SHAPES = {"blocks": {"hidden": (8, 100)}, "stochastic rounding": _FOURS, "stochastic codes": _FOURS}


def run_both(
    shard: Callable[[Net, DeviceMesh], nn.Module],
    mesh: DeviceMesh,
    *,
    steps: int,
    dtype: torch.dtype = torch.float32,
    shapes: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    net, twin = sharded(shard, mesh, **shapes or {})
    net, twin = net.to(dtype), twin.to(dtype)
    # torch clips parameters of one mesh
    clips = len({getattr(param, "device_mesh", None) for param in net.parameters()}) == 1
    row, group = mesh.get_local_rank("replicate"), mesh.get_group("replicate")
    opt, other = (LionCub(groups_of(n), lr=1e-2, process_group=group, **options) for n in (net, twin))
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in (opt, other)]
    for step in range(steps):
        give_gradients(net, twin, 100 * step + row, missing=4 if step % 3 == row else 0)
        if clips and step % 5 == 2:
            for n in (net, twin):
                norm = nn.utils.clip_grad_norm_(n.parameters(), 1.0)
            # norms are summed in another order
            for _, param, theirs in pairs_of(net, twin):
                if theirs.grad is not None:
                    theirs.grad.copy_(whole(param.grad))
            assert math.isfinite(whole(norm))
        opt.step()
        other.step()
        for schedule in schedules:
            schedule.step()
    assert_equal(net, twin, opt, other)
    opt.check_replicas()
    assert opt.stats().steps == steps


@pytest.mark.parametrize("options", OPTIONS)
@on_ranks(4)
def test_sharded_steps_have_the_bits_of_whole_ones(rank: int, world_size: int, options: str) -> None:
    dtype = torch.bfloat16 if options in LOW else torch.float32
    run_both(fsdp, grid(2, 2), steps=9, dtype=dtype, shapes=SHAPES.get(options), **OPTIONS[options])


@pytest.mark.parametrize("mesh", MESHES)
@on_ranks(4)
def test_on_any_mesh(rank: int, world_size: int, mesh: str) -> None:
    run_both(fsdp, grid(*MESHES[mesh]), steps=30)


@on_ranks(4)
def test_tensor_parallel_steps_have_the_bits_of_whole_ones(rank: int, world_size: int) -> None:
    run_both(tensor_parallel, grid(2, 2), steps=9, shapes={"hidden": (8, 100, 16)})


@on_ranks(4)
def test_shards_of_shards_have_the_bits_of_whole_ones(rank: int, world_size: int) -> None:
    """FSDP of tensor-parallel blocks, uneven in both."""
    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))

    def both(net: Net, shard: DeviceMesh) -> nn.Module:
        return fsdp(tensor_parallel(net, mesh["tp"]), shard)

    # of rows that two ranks of one column split, one has 3 and the other 2: odd offsets
    run_both(both, mesh, steps=6, shapes={"hidden": (20, 100)})


def train(net: nn.Module, opt: Any, row: int, steps: range, micro: int = 1, twin: nn.Module | None = None) -> None:
    """Real backward passes; a twin gets the sharded model's gradients."""
    for step in steps:
        opt.zero_grad()
        for part in range(micro):
            if isinstance(net, nn.Module) and hasattr(net, "set_requires_gradient_sync"):
                net.set_requires_gradient_sync(part == micro - 1)
            net(batch_of(micro * step + part, row)).square().sum().backward()
        if twin is not None:
            for _, param, other in pairs_of(net, twin):
                other.grad = whole(param.grad).clone()
        opt.step()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", ["fsdp", "sequence"])
@on_ranks(4)
def test_backward_passes_of_shards(rank: int, world_size: int, kind: str, overlap: bool) -> None:
    """Accumulation, reduction in another dtype, partial sums of sequence parallelism, votes during backward."""
    mesh = grid(2, 2)
    row, group = mesh.get_local_rank("replicate"), mesh.get_group("replicate")

    def shard(net: Net, sub: DeviceMesh) -> nn.Module:
        if kind == "sequence":
            return tensor_parallel(net, sub, sequence=True)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in net.blocks:
            fully_shard(block, mesh=sub, mp_policy=policy)
        return fully_shard(net, mesh=sub, mp_policy=policy)

    net, twin = sharded(shard, mesh, hidden=(8, 100, 16))
    opt = LionCub(net.named_parameters(), lr=1e-2, process_group=group, overlap=overlap)
    other = LionCub(twin.named_parameters(), lr=1e-2, process_group=group)
    for step in range(6):
        train(net, opt, row, range(step, step + 1), micro=2 if kind == "fsdp" else 1, twin=twin)
        other.step()
    if overlap:
        assert any(not bucket.is_late for bucket in opt._buckets.all)
        assert opt._overlap is not None
        assert opt._overlap.sends_early
    assert_equal(net, twin, opt, other)
    opt.close()


@on_ranks(4)
def test_whole_and_sharded_parameters_in_one_model(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)

    def some(net: Net, sub: DeviceMesh) -> nn.Module:
        fully_shard(net.blocks[1], mesh=sub)
        return net

    run_both(some, mesh, steps=9)


@pytest.mark.parametrize("skips", [False, True])
@on_ranks(4)
def test_a_nan_in_one_shard_stops_all_ranks(rank: int, world_size: int, skips: bool) -> None:
    mesh = grid(2, 2)
    net, twin = sharded(fsdp, mesh)
    row, group = mesh.get_local_rank("replicate"), mesh.get_group("replicate")
    opt, other = (
        LionCub(n.named_parameters(), process_group=group, on_nonfinite="skip" if skips else "raise")
        for n in (net, twin)
    )
    for step in range(6):
        give_gradients(net, twin, 10 * step + row)
        if step == 3:
            name, param, theirs = list(pairs_of(net, twin))[4]
            if rank == 2:
                param.grad._local_tensor.view(-1)[1] = math.nan
            theirs.grad = whole(param.grad)
            said = said_by(opt.step)
            assert same_on_all(said)
            if not skips:
                assert said.startswith("NonFiniteError"), said
                assert f"in parameter {name} on rank 2;" in said
            said_by(other.step)
        else:
            opt.step()
            other.step()
    assert_equal(net, twin, opt, other)
    assert same_on_all(opt.stats().skipped_steps)
    assert opt.stats().skipped_steps == int(skips)


@on_ranks(4)
def test_an_overflow_in_one_shard_skips_on_all_ranks(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    net, _ = sharded(fsdp, mesh)
    opt = LionCub(net.named_parameters(), process_group=mesh.get_group("replicate"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [whole(param.detach()).clone() for param in net.parameters()]
    for step in range(2):
        opt.zero_grad()
        scaler.scale(net(batch_of(step, rank // 2)).square().sum()).backward()
        if step == 0 and rank == 1:
            next(net.parameters()).grad._local_tensor[0] = math.inf
        scaler.step(opt)
        scaler.update()
        moved = [not torch.equal(whole(p.detach()), old) for p, old in zip(net.parameters(), before, strict=True)]
        assert same_on_all(moved)
        assert all(moved) if step else not any(moved)
    opt.check_replicas()


@on_ranks(4)
def test_an_error_on_one_rank_stops_all(rank: int, world_size: int) -> None:
    """While a step is prepared, when ranks of another shard have other hyperparameters, and at construction."""
    mesh = grid(2, 2)
    net, twin = sharded(fsdp, mesh)
    group = mesh.get_group("replicate")
    opt = LionCub(net.named_parameters(), process_group=group)
    give_gradients(net, twin, rank // 2)
    opt.step()
    before = [whole(param.detach()).clone() for param in net.parameters()]

    param = next(net.parameters())
    kept, wrong = param.grad, distribute_tensor(torch.zeros(param.shape), param.device_mesh, [Replicate()])
    if rank == 3:
        param.grad = wrong
    said = said_by(opt.step)
    assert ("expected placements" in said) if rank == 3 else ("because of an error on rank 3" in said), said
    param.grad = kept
    if rank % 2:
        opt.param_groups[0]["lr"] = 0.5
    said = said_by(opt.step)
    assert said.startswith("WorkersDisagreeError: workers disagree on the hyperparameters (lr of param group 0)"), said
    assert "ranks 0, 2: 0.0001; ranks 1, 3: 0.5" in said
    opt.param_groups[0]["lr"] = 1e-4
    assert all(torch.equal(whole(p.detach()), old) for p, old in zip(net.parameters(), before, strict=True))
    opt.step()

    for failing in range(4):
        lr = -1.0 if rank == failing else 1.0
        said = said_by(lambda lr=lr: LionCub(net.named_parameters(), lr=lr, process_group=group))
        if rank == failing:
            assert said == "ValueError: lr: expected a finite number >= 0, got -1.0"
        else:
            assert said.startswith("WorkersDisagreeError: no worker went on, because of an error on rank"), said
    for i, kind in enumerate(everyone({"lr": 0.1})):
        assert kind == {"lr": 0.1}, i
    capturable = said_by(lambda: LionCub(net.named_parameters(), process_group=group, capturable=True))
    assert capturable == "ValueError: params: expected whole tensors with capturable=True, got 'shards (DTensor)'"


@on_ranks(4)
def test_replicas_are_compared_over_votes_and_meshes(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    net = tensor_parallel(Net((8, 16)), mesh["shard"], sequence=True)
    opt = LionCub(net.named_parameters(), process_group=mesh.get_group("replicate"))
    opt.check_replicas()
    # replicated over the mesh, and another on the ranks 1 and 3
    norm = net.blocks[0].norm.weight
    with torch.no_grad():
        norm._local_tensor.add_(float(rank % 2))
    assert "differs between workers" in said_by(opt.check_replicas)
    with torch.no_grad():
        norm._local_tensor.sub_(float(rank % 2))
        net.blocks[0].up.weight._local_tensor.add_(float(rank == 3))
    said = everyone(said_by(opt.check_replicas))
    assert all("WorkersDisagreeError" in text for text in said)
    assert all("blocks.0.up.weight" in text for text in said)


@on_ranks(4)
def test_gradients_that_changed_after_backward_are_noticed(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    net, _ = sharded(fsdp, mesh)
    row, group = mesh.get_local_rank("replicate"), mesh.get_group("replicate")
    opt = LionCub(net.named_parameters(), process_group=group, overlap=True)
    train(net, opt, row, range(3))
    for change in (
        lambda grads: nn.utils.clip_grad_norm_(net.parameters(), 0.01),
        lambda grads: torch._foreach_mul_(grads, -1.0),
    ):
        opt.zero_grad()
        net(batch_of(3, row)).square().sum().backward()
        before = [whole(param.detach()).clone() for param in net.parameters()]
        change([param.grad for param in net.parameters()])
        said = said_by(opt.step)
        assert "RuntimeError: gradient" in said, said
        assert "expected" in said
        assert all(torch.equal(whole(p.detach()), old) for p, old in zip(net.parameters(), before, strict=True))
    train(net, opt, row, range(4, 6))
    opt.check_replicas()
    opt.close()


@on_ranks(4)
def test_what_is_written_into_a_parameter_reaches_its_master(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    net, twin = sharded(fsdp, mesh)
    net, twin = net.to(torch.bfloat16), twin.to(torch.bfloat16)
    group = mesh.get_group("replicate")
    opts = [LionCub(n.named_parameters(), lr=1e-3, process_group=group, master_weights=True) for n in (net, twin)]
    for step in range(4):
        give_gradients(net, twin, 10 * step + rank // 2)
        if step == 2:
            with torch.no_grad():
                torch._foreach_mul_(list(net.parameters()), 2.0)
                torch._foreach_mul_(list(twin.parameters()), 2.0)
        if step == 3:
            kept = {name: theirs.detach().clone() for name, _, theirs in pairs_of(net, twin)}
            for _, param, theirs in pairs_of(net, twin):
                param.data.copy_(param.data * 2)
                theirs.data.copy_(theirs.data * 2)
        for opt in opts:
            opt.step()
    assert_equal(net, twin, *opts)
    for name, param, theirs in pairs_of(net, twin):
        masters = whole(opts[0].state[param]["master"]), opts[1].state[theirs]["master"]
        assert torch.equal(*masters), f"master of {name}"
        # lr is 1e-3, and bf16 has a spacing of 1/64 from 2 on
        assert (theirs - 2 * kept[name]).abs().max() < 0.01, f"parameter {name}"


def hybrid(net: Net, mesh: DeviceMesh) -> nn.Module:
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


@on_ranks(4)
def test_what_cannot_be_voted_on_is_refused_with_what_to_write(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    proper = hybrid(Net(), mesh)
    said = said_by(lambda: LionCub(proper.named_parameters(), process_group=mesh.get_group("replicate")))
    assert said.startswith("ValueError: parameter blocks.0.norm.weight: expected a mesh that does not replicate"), said
    assert 'fully_shard(model, mesh=mesh["shard"])' in said
    net = fsdp(Net(), mesh["shard"])
    said = said_by(lambda: LionCub(net.named_parameters()))
    assert said.startswith("ValueError: process_group: expected ranks that hold the same shard of parameter"), said
    assert 'process_group=mesh.get_group("replicate")' in said
    opt = LionCub(net.named_parameters(), process_group=mesh.get_group("replicate"))
    other = nn.Parameter(torch.zeros(3))
    opt.param_groups[0]["params"][0] = other
    assert "param_groups[0]['params'][0]" in said_by(opt.step)


@on_ranks(4)
def test_groups_can_be_added_and_ranks_change(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    net, twin = sharded(fsdp, mesh)
    row, group = mesh.get_local_rank("replicate"), mesh.get_group("replicate")
    opts = []
    for n in (net, twin):
        first, *rest = n.named_parameters()
        opts.append(LionCub([first], process_group=group))
        opts[-1].add_param_group({"params": rest, "lr": 1e-3})
    for step in range(3):
        give_gradients(net, twin, 10 * step + row)
        for opt in opts:
            opt.step()
    assert_equal(net, twin, *opts)
    # the second node leaves, and comes back with what the first one has
    alone = [dist.new_group([i]) for i in range(4)][rank]
    for opt in opts:
        opt.rebind(alone)
    if row == 0:
        give_gradients(net, twin, 77)
    else:
        give_gradients(net, twin, 78)
    for opt in opts:
        opt.step()
    assert_equal(net, twin, *opts)
    with torch.no_grad():
        for param in [*net.parameters(), *twin.parameters()]:
            local = param._local_tensor if isinstance(param, DTensor) else param
            dist.broadcast(local, group=group, group_src=0)
    for opt in opts:
        opt.rebind(group)
    give_gradients(net, twin, 80 + row)
    for opt in opts:
        opt.step()
    assert_equal(net, twin, *opts)
    opts[0].check_replicas()


@on_ranks(4)
def test_lion_steps_on_shards(rank: int, world_size: int) -> None:
    mesh = grid(1, 4)
    net, twin = sharded(fsdp, mesh)
    opts = [Lion(n.named_parameters(), lr=1e-2, weight_decay=0.1) for n in (net, twin)]
    for step in range(4):
        give_gradients(net, twin, step)
        for opt in opts:
            opt.step()
    assert_equal(net, twin, *opts)
    # a gradient that is a partial sum
    replicated = nn.Parameter(distribute_tensor(torch.ones(6), mesh["shard"], [Replicate()], src_data_rank=None))
    alone = nn.Parameter(torch.ones(6))
    opts = [Lion([replicated], lr=0.1), Lion([alone], lr=0.1)]
    part = torch.arange(6.0) - (10.0 if rank == 0 else 0.0)
    replicated.grad = DTensor.from_local(part, mesh["shard"], [Partial()])
    alone.grad = 4 * torch.arange(6.0) - 10.0
    for opt in opts:
        opt.step()
    assert torch.equal(replicated._local_tensor.detach(), alone.detach())


@on_ranks(4)
def test_models_made_without_memory(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    with torch.device("meta"):
        net = Net()
    fsdp(net, mesh["shard"])
    said = said_by(lambda: LionCub(net.named_parameters(), process_group=mesh.get_group("replicate")))
    assert "got one on the meta device" in said
    net.to_empty(device="cpu")
    torch.manual_seed(rank)
    for param in net.parameters():
        nn.init.normal_(param._local_tensor)
    # ranks of one shard start alike, and a first forward may move parameters to other memory
    opt = LionCub(net.named_parameters(), lr=1e-2, process_group=mesh.get_group("replicate"))
    before = [whole(param.detach()).clone() for param in net.parameters()]
    train(net, opt, rank // 2, range(2))
    assert all(not torch.equal(whole(p.detach()), old) for p, old in zip(net.parameters(), before, strict=True))
    opt.check_replicas()


@on_ranks(4)
def test_plain_parameters_that_drift_apart_inside_a_node_are_noticed(rank: int, world_size: int) -> None:
    """A call of fully_shard that was forgotten: gradients of the root's parameters are reduced by nobody."""
    mesh = grid(2, 2)
    net = Net()
    for block in net.blocks:
        fully_shard(block, mesh=mesh["shard"])
    opt = LionCub(net.named_parameters(), lr=1e-2, process_group=mesh.get_group("replicate"))
    opt.check_replicas()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        # as backward would leave them
        for step in range(8):
            give_gradients(net, Net(), 10 * step + mesh.get_local_rank("replicate"))
            net.head.weight.grad = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
            opt.step()
    texts = [str(warning.message) for warning in found]
    assert len(texts) == int(rank == 0), texts
    assert all(text.startswith("parameter head.weight differs between workers: ") for text in texts)
    assert all("as fully_shard(model) does" in text for text in texts)
    assert "parameter head.weight differs between workers" in said_by(opt.check_replicas)


@on_ranks(4)
def test_a_checkpoint_rolls_back_scales_of_parts(rank: int, world_size: int) -> None:
    mesh = grid(2, 2)
    options = {"process_group": mesh.get_group("replicate"), "compression": OPTIONS["blocks"]["compression"]}
    net, twin = fsdp(Net((8, 100)), mesh["shard"]), fsdp(Net((8, 100)), mesh["shard"])
    opt = LionCub(net.named_parameters(), lr=1e-2, **options)
    saved = copy.deepcopy(opt.state_dict())
    start = [param._local_tensor.clone() for param in net.parameters()]
    for step in range(2):
        give_gradients(net, Net((8, 100)), 10 * step + rank // 2)
        opt.step()
    with torch.no_grad():
        for param, old in zip(net.parameters(), start, strict=True):
            param._local_tensor.copy_(old)
    opt.load_state_dict(saved)
    other = LionCub(twin.named_parameters(), lr=1e-2, **options)
    for step in range(2, 4):
        for n, o in ((net, opt), (twin, other)):
            give_gradients(n, Net((8, 100)), 10 * step + rank // 2)
            o.step()
    for param, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(param._local_tensor, theirs._local_tensor)
