"""A small GPT trained with LionCub: learning rate schedule, checkpoints, resume.

    torchrun --nproc-per-node 2 docs/examples/train_gpt.py --out runs/gpt

The same command resumes from the last checkpoint in --out. Momentum differs between ranks, so a checkpoint
has one file per rank; with another number of ranks a run resumes too, and warns. Several nodes need a shared folder.
"""

import argparse
import math
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        return nn.functional.cross_entropy(self.head(hidden).flatten(0, 1), targets.flatten())


def draw_windows(text: Tensor, step: int, batch: int, context: int) -> Tensor:
    """Draw a batch that depends on step and rank alone, so that a resumed run sees the same data."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - context, (batch, 1), generator=generator)
    return text[starts + torch.arange(context + 1)].long()


def save(folder: Path, step: int, parts: dict) -> None:
    """Write a checkpoint, this rank's file, and remove older ones; a collective."""
    partial, complete = folder / f"step-{step:06d}.partial", folder / f"step-{step:06d}"
    partial.mkdir(parents=True, exist_ok=True)
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"step": step}, partial / f"rank-{dist.get_rank()}.pt")
    # it gets its final name when the files of all ranks are complete
    dist.barrier()
    if dist.get_rank() == 0:
        partial.rename(complete)
        for other in folder.glob("step-*"):
            if other != complete:
                shutil.rmtree(other)


def resume(folder: Path, parts: dict, device: torch.device) -> int:
    """Load the newest complete checkpoint into the parts; return its step, 0 where there is none."""
    newest = max(folder.glob("step-??????"), default=None)
    if newest is None:
        return 0
    # where there are more ranks than before, some start with another one's momentum
    rank = dist.get_rank() % len(list(newest.glob("rank-*.pt")))
    state = torch.load(newest / f"rank-{rank}.pt", map_location=device)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
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
    dist.init_process_group("nccl" if cuda else "gloo")
    files = [args.data] if args.data else sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)

    context, warmup = 64, max(1, args.steps // 20)
    model = GPT(layers=2, heads=4, width=args.width, context=context).to(device)
    opt = LionCub(model.named_parameters(), lr=args.lr, weight_decay=0.1)
    # linear warm-up, then a cosine down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
    )
    parts = {"model": model, "optimizer": opt, "schedule": schedule}
    for step in range(resume(args.out, parts, device) + 1, args.steps + 1):
        loss = model(draw_windows(text, step, args.batch, context).to(device))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        if step % args.print_every == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step}: loss {mean.item() / dist.get_world_size():.6f}", flush=True)
        if step % args.save_every == 0 or step == args.steps:
            save(args.out, step, parts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
