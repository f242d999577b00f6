"""Tasks: a byte-level GPT on text and a small ResNet on digits, with equal or skewed shards for the workers.

Batches are functions of (task, seed, shards, workers, batch, rank, step) and nothing else, so that all methods see the
same. Whatever the shards, workers together see every kind of data equally often.
"""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from typing import Any

import torch
from demo.gpt import GPT
from demo.text import Text as Bytes
from demo.text import seeded, split_text, windows_at
from torch import Tensor, nn
from torch.nn import functional

SHARDS = ("iid", "skewed")


class Text:
    """Next bytes of four kinds of files of the standard library; skewed: each worker has one kind."""

    steps, lr, batch = 200, 2.8e-3, 4
    context = 32
    kinds = (
        ("encodings",),
        ("pydoc_data",),
        ("idlelib", "tkinter", "turtledemo"),
        ("asyncio", "email", "http", "urllib", "xml"),
    )

    @functools.cached_property
    def _parts(self) -> list[Bytes]:
        """Return training and validation bytes of each kind."""
        stdlib, found = Path(sysconfig.get_paths()["stdlib"]), []
        for packages in self.kinds:
            files = sorted(file for package in packages for file in (stdlib / package).rglob("*.py"))
            source = f"{stdlib}, {', '.join(packages)}"
            found.append(split_text(b"".join(file.read_bytes() for file in files), self.context, source))
        return found

    def model(self, seed: int) -> nn.Module:
        """Return a GPT of 117 thousand parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT(layers=2, heads=2, width=64, context=self.context)
        with torch.no_grad():
            # few steps must get past the frequencies of single bytes: every layer starts with its output's scale
            for name, p in model.named_parameters():
                if p.dim() == 2:
                    p *= (0.1 if "embedding" in name or "position" in name else p.shape[1] ** -0.5) / 0.02
        return model

    def batch_of(self, seed: int, shards: str, workers: int, batch: int, rank: int, step: int) -> tuple[Tensor, ...]:
        """Return int64[batch, context + 1] windows."""
        generator = seeded("text", seed, shards, workers, batch, rank, step)
        if shards == "iid":
            chosen = torch.randint(0, len(self.kinds), (batch,), generator=generator).tolist()
        else:
            chosen = [rank * len(self.kinds) // workers % len(self.kinds)] * batch
        rows = []
        for kind in chosen:
            tokens = self._parts[kind].train
            start = torch.randint(0, len(tokens) - self.context, (1,), generator=generator)
            rows.append(windows_at(tokens, start, self.context))
        return (torch.cat(rows),)

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss in nats per byte."""
        loss: Tensor = model(*batch)
        return loss

    @functools.cached_property
    def _windows(self) -> Tensor:
        rows = []
        for _, tokens in self._parts:
            starts = torch.linspace(0, len(tokens) - self.context - 1, 256).long()
            rows.append(windows_at(tokens, starts, self.context))
        # kinds by turns, so that a quarter of them has as many of each
        return torch.stack(rows, dim=1).flatten(0, 1)

    def validation_loss(self, model: nn.Module) -> float:
        """Return the loss in nats per byte on 1024 windows of held-out text, as many of each kind."""
        with torch.no_grad():
            return float(model(self._windows))


class _ResNet(nn.Module):
    """Two residual blocks of 3x3 convolutions behind group norms, at 4x4 and 2x2 places."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(1, 32, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList([_Block(32), _Block(32)])
        self.halve = nn.Conv2d(32, 32, 2, stride=2)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map [n, 8, 8] to logits [n, 10]."""
        x = self.blocks[0](self.embedding(images[:, None]))
        x = self.blocks[1](self.halve(x))
        logits: Tensor = self.head(functional.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(functional.relu(self.first(functional.relu(self.norm(x)))))
        return x + hidden


class Digits:
    """scikit-learn's 1,797 handwritten digits, shifted and noisy; skewed: sorted by class, each worker has a piece."""

    steps, lr, batch = 250, 5.6e-3, 16
    noise = 0.5

    @functools.cached_property
    def _data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return training images [n, 8, 8] in 0..1 and their classes, sorted by class; held-out ones."""
        from sklearn.datasets import load_digits

        raw = load_digits()
        images, labels = torch.tensor(raw.images / 16.0, dtype=torch.float32), torch.tensor(raw.target)
        order = torch.randperm(len(images), generator=seeded("digits"))
        train, held = order[:1347], order[1347:]
        train = train[torch.argsort(labels[train], stable=True)]
        return images[train], labels[train], images[held], labels[held]

    def model(self, seed: int) -> nn.Module:
        """Return a ResNet of 42 thousand parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _ResNet()

    def batch_of(self, seed: int, shards: str, workers: int, batch: int, rank: int, step: int) -> tuple[Tensor, ...]:
        """Return float[batch, 8, 8] and int64[batch]."""
        images, labels, *_ = self._data
        generator = seeded("digits", seed, shards, workers, batch, rank, step)
        first, last = 0, len(images)
        if shards == "skewed":
            first, last = len(images) * rank // workers, len(images) * (rank + 1) // workers
        chosen = torch.randint(first, last, (batch,), generator=generator)
        return self._disturbed(images[chosen], generator), labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(model(batch[0]), batch[1])

    @functools.cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        *_, images, labels = self._data
        copies = 8
        disturbed = [self._disturbed(images, seeded("digits", "held out", i)) for i in range(copies)]
        return torch.cat(disturbed), labels.repeat(copies)

    def validation_loss(self, model: nn.Module) -> float:
        """Return the cross-entropy on eight disturbed copies of 450 held-out images."""
        images, labels = self._held_out
        with torch.no_grad():
            return float(functional.cross_entropy(model(images), labels))

    def _disturbed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Shift by up to a pixel each way, and add Gaussian noise."""
        padded = functional.pad(images, (1, 1, 1, 1))
        shifts = torch.randint(0, 3, (len(images), 2), generator=generator)
        rows = shifts[:, :1] + torch.arange(8)
        columns = shifts[:, 1:] + torch.arange(8)
        moved = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
        return moved + self.noise * torch.randn(moved.shape, generator=generator)


TASKS: dict[str, Any] = {"text": Text(), "digits": Digits()}
