"""Checkpoints of sharded parameters by torch.distributed.checkpoint: saved on one mesh, loaded on another."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_workers import everyone, on_ranks, results_of, said_by, shared_folder
from optimizers import LionCub
from shards import Net, fsdp, grid, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

# rows that vote, columns that shard; without columns the model is whole
LAYOUTS: dict[str, tuple[int, int]] = {"2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4), "1x3": (1, 3), "ddp": (3, 0)}
LAYOUTS["one"] = (1, 0)


def build(layout: str, seed: int = 0, **options: Any) -> tuple[nn.Module, LionCub, int]:
    rows, columns = LAYOUTS[layout]
    net: nn.Module = Net()
    if not columns:
        group, row = None, dist.get_rank()
    else:
        mesh = grid(rows, columns)
        net, group, row = fsdp(net, mesh["shard"]), mesh.get_group("replicate"), mesh.get_local_rank("replicate")
    return net, LionCub(net.named_parameters(), lr=1e-2, process_group=group, **options), row


def train(net: nn.Module, opt: LionCub, row: int, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + row)
        for param in net.parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            is_shard = isinstance(param, DTensor)
            param.grad = (
                distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None) if is_shard else grad
            )
        opt.step()


def bits_of(net: nn.Module, opt: LionCub) -> list[bytes]:
    """Whole parameters, momentum and masters."""
    tensors = [t for param in net.parameters() for t in (param.detach(), *opt.state[param].values()) if t.dim()]
    return [whole(tensor).contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def state_of(net: nn.Module, opt: LionCub, options: StateDictOptions) -> dict[str, Any]:
    return {"net": get_model_state_dict(net), "opt": get_optimizer_state_dict(net, opt, options=options)}


def save(rank: int, world_size: int, layout: str, path: str, flat: bool, asynchronous: bool) -> Any:
    net, opt, row = build(layout)
    train(net, opt, row, range(3))
    opt.sync_momentum()
    state = state_of(net, opt, StateDictOptions(flatten_optimizer_state_dict=flat))
    if asynchronous:
        dcp.async_save(state, checkpoint_id=path).result()
    else:
        dcp.save(state, checkpoint_id=path)
    saved = bits_of(net, opt)
    train(net, opt, row, range(3, 6))
    return saved, bits_of(net, opt)


def load(rank: int, world_size: int, layout: str, path: str, flat: bool) -> Any:
    net, opt, row = build(layout)
    with torch.no_grad():
        for param in net.parameters():
            param.zero_()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = state_of(net, opt, options)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(net, state["net"])
    set_optimizer_state_dict(net, opt, state["opt"], options=options)
    loaded = bits_of(net, opt)
    assert opt.stats().steps == 3
    train(net, opt, row, range(3, 6))
    opt.check_replicas()
    return loaded, bits_of(net, opt)


def ranks_of(layout: str) -> int:
    rows, columns = LAYOUTS[layout]
    return rows * max(columns, 1)


@pytest.mark.parametrize("flat", [False, True])
def test_a_checkpoint_of_one_mesh_loads_on_any(flat: bool, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    saved = results_of(save, 4, "2x2", path, flat, flat)
    for layout in LAYOUTS if not flat else ("2x2", "1x3"):
        loaded = results_of(load, ranks_of(layout), layout, path, flat)
        assert all(bits == saved[0][0] for bits, _ in loaded), f"loaded on {layout}"
        if layout == "2x2":
            assert loaded == saved, "a run that resumed must have the bits of one that never stopped"


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "2x2"])
def test_a_checkpoint_of_any_mesh_loads_on_another(layout: str, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    saved, _ = results_of(save, ranks_of(layout), layout, path, False, False)[0]
    for loaded, _ in results_of(load, 4, "2x2", path, False):
        assert loaded == saved


@on_ranks(4)
def test_each_replica_can_save_its_own_momentum(rank: int, world_size: int) -> None:
    net, opt, row = build("2x2")
    train(net, opt, row, range(3))
    mesh = next(net.parameters()).device_mesh
    state = state_of(net, opt, StateDictOptions())
    dcp.save(state, checkpoint_id=shared_folder() / f"replica{row}", process_group=mesh.get_group())
    saved = bits_of(net, opt)
    train(net, opt, row, range(3, 5))
    ended = bits_of(net, opt)

    net, opt, row = build("2x2")
    state = state_of(net, opt, StateDictOptions())
    dcp.load(state, checkpoint_id=shared_folder() / f"replica{row}", process_group=mesh.get_group())
    set_model_state_dict(net, state["net"])
    set_optimizer_state_dict(net, opt, state["opt"])
    assert bits_of(net, opt) == saved
    train(net, opt, row, range(3, 5))
    assert bits_of(net, opt) == ended


@on_ranks(4)
def test_momentum_that_is_not_averaged_warns_where_it_is_loaded(rank: int, world_size: int) -> None:
    net, opt, row = build("2x2")
    train(net, opt, row, range(2))
    state = state_of(net, opt, StateDictOptions())
    dcp.save(state, checkpoint_id=shared_folder() / "patchwork")
    state = state_of(net, opt, StateDictOptions())
    dcp.load(state, checkpoint_id=shared_folder() / "patchwork")
    said = everyone(said_by(lambda: set_optimizer_state_dict(net, opt, state["opt"])))
    assert sum(text != "no error" for text in said) == 2, said
    texts = [text for text in said if text != "no error"]
    assert all("expected that of rank" in text for text in texts), texts
    assert all("call sync_momentum() on all" in text for text in texts)


@on_ranks(2)
def test_one_ranks_file_warns_on_the_others(rank: int, world_size: int) -> None:
    """Three training stacks save the first rank's state alone, and load it on all."""
    net, _, _ = build("one")
    opt = LionCub(net.named_parameters(), lr=1e-2)
    assert opt.state_dict()["param_groups"][0]["momentum_state"] == "averaged"
    train(net, opt, rank, range(2))
    state = opt.state_dict()
    assert state["param_groups"][0]["momentum_state"] == f"rank {rank} of 2"
    opt.load_state_dict(state)
    path = shared_folder() / "first.pt"
    if rank == 0:
        torch.save(state, path)
    dist.barrier()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        opt.load_state_dict(torch.load(path))
    texts = [str(warning.message) for warning in found]
    assert len(texts) == rank
    if rank:
        assert texts[0].startswith("state_dict: expected that of rank 1 of 2, or averaged, got the momentum of rank 0")
    opt.sync_momentum()
    assert opt.state_dict()["param_groups"][0]["momentum_state"] == "averaged"
    train(net, opt, rank, range(2, 3))
    assert opt.state_dict()["param_groups"][0]["momentum_state"] == f"rank {rank} of 2"


@on_ranks(4)
def test_a_whole_checkpoint_loads_into_shards(rank: int, world_size: int) -> None:
    net, opt, row = build("2x2")
    train(net, opt, row, range(2))
    opt.sync_momentum()
    state = opt.state_dict()
    wholes = {
        "state": {
            i: {name: whole(value).clone() for name, value in entries.items()} for i, entries in state["state"].items()
        },
        "param_groups": state["param_groups"],
    }
    before = bits_of(net, opt)
    train(net, opt, row, range(2, 4))
    assert bits_of(net, opt) != before
    opt.load_state_dict(wholes)
    momentum = [whole(opt.state[param]["exp_avg"]) for param in net.parameters()]
    for i, mine in enumerate(momentum):
        assert torch.equal(mine, wholes["state"][i]["exp_avg"])
    wholes["state"][3]["exp_avg"] = wholes["state"][3]["exp_avg"][:1]
    said = said_by(lambda: opt.load_state_dict(wholes))
    assert said.startswith("ValueError: state_dict: expected exp_avg of parameter"), said
    assert [whole(opt.state[param]["exp_avg"]).tolist() for param in net.parameters()] == [m.tolist() for m in momentum]
