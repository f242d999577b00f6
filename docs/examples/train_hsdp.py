"""A small GPT that is sharded inside every node by FSDP2; between nodes LionCub sends one bit per parameter.

    torchrun --nproc-per-node 4 docs/examples/train_hsdp.py --nodes 2 --out runs/hsdp

This machine plays two nodes of two ranks. On real nodes leave --nodes out, and let --out be a shared folder. The same
command resumes from the last checkpoint in --out; with another number of nodes or ranks it does so, too.
"""

import argparse
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lioncub import LionCub


class GPT(nn.Module):
    """Next-byte prediction; the call returns the mean loss of int64[batch, context + 1] windows."""

    def __init__(self, *, layers: int, heads: int, width: int, context: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, windows: Tensor) -> Tensor:
        inputs, targets = windows[:, :-1], windows[:, 1:]
        time = torch.arange(inputs.shape[1], device=windows.device)
        mask = nn.Transformer.generate_square_subsequent_mask(len(time), device=windows.device)
        hidden = self.blocks(self.embedding(inputs) + self.position(time), mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1).float(), targets.flatten())


def shard(model: GPT, mesh: DeviceMesh) -> None:
    """Shard the model over the ranks of one node, block by block: each rank keeps one part of every parameter."""
    half = torch.bfloat16 if mesh.device_type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for block in model.blocks.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def draw_windows(text: Tensor, step: int, batch: int, context: int) -> Tensor:
    """Draw a batch that depends on step and rank alone: every rank has its own data, inside a node, too."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the folders of complete checkpoints, the newest last: their metadata is written when all else is."""
    return sorted(path.parent for path in folder.glob("step-*/.metadata"))


def state_of(model: GPT, opt: LionCub, schedule: torch.optim.lr_scheduler.LRScheduler, step: int) -> dict:
    """Return what a checkpoint has; every rank's part of the tensors, without copies."""
    weights, optimizer = get_state_dict(model, opt)
    return {"model": weights, "optimizer": optimizer, "schedule": schedule, "step": step}


def save(folder: Path, step: int, parts: tuple) -> None:
    """Write a checkpoint that loads on any mesh, and keep the one before it; a collective of all ranks."""
    # one node's momentum is saved for all, so all must have the same
    parts[1].sync_momentum()
    dcp.save(state_of(*parts, step), checkpoint_id=folder / f"step-{step:06d}")
    if dist.get_rank() == 0:
        for old in complete_checkpoints(folder)[:-2]:
            shutil.rmtree(old)


def resume(folder: Path, parts: tuple) -> int:
    """Load the newest complete checkpoint, every rank its own part; return its step, 0 where there is none."""
    complete = complete_checkpoints(folder)
    if not complete:
        return 0
    state = state_of(*parts, 0)
    dcp.load(state, checkpoint_id=complete[-1])
    set_state_dict(*parts[:2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--nodes", type=int, help="groups of ranks that vote; default: the machines of torchrun")
    parser.add_argument("--data", type=Path, help="text file; default: the standard library's sources")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--print-every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    ranks = dist.get_world_size()
    nodes = args.nodes or ranks // int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks % nodes:
        parser.error(f"--nodes: expected a divisor of {ranks} ranks, got {nodes}")
    mesh = init_device_mesh(device.type, (nodes, ranks // nodes), mesh_dim_names=("replicate", "shard"))
    files = [args.data] if args.data else sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)

    context, warmup = 64, max(1, args.steps // 20)
    # the shards of one node are parts of one model; LionCub copies the first node's to the others
    torch.manual_seed(0)
    model = GPT(layers=2, heads=4, width=args.width, context=context).to(device)
    # inside a node gradients are averaged, between nodes their signs are voted on
    shard(model, mesh["shard"])
    opt = LionCub(model.named_parameters(), lr=args.lr, weight_decay=0.1, process_group=mesh.get_group("replicate"))
    # linear warm-up, then a cosine down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    parts = model, opt, schedule
    for step in range(resume(args.out, parts) + 1, args.steps + 1):
        loss = model(draw_windows(text, step, args.batch, context).to(device))
        opt.zero_grad()
        loss.backward()
        # the norm is that of the node's gradient
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        if step % args.print_every == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {mean.item() / ranks:.6f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(args.out, step, parts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
