"""The text to train on: bytes of a file or of the interpreter's standard library, and windows drawn from them."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VALIDATION_SHARE = 10


class Text(NamedTuple):
    """Training and validation bytes, uint8, 1-D."""

    train: Tensor
    validation: Tensor


def load_text(path: str | None, context: int) -> Text:
    """Read the file ``path``, or else the top-level modules of the standard library, by name, and split it.

    Raises:
        ValueError: the bytes cannot be read, or a part would be shorter than one window of ``context`` + 1 bytes.
    """
    source = "the standard library's sources (name a text with --data)" if path is None else f"--data {path}"
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    try:
        files = sorted(stdlib.glob("*.py")) if path is None else [Path(path)]
        data = b"".join(file.read_bytes() for file in files)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read: {error.strerror}") from error
    return split_text(data, context, source)


def split_text(data: bytes, context: int, source: str) -> Text:
    """Split off the last tenth for validation, as :func:`load_text`; ``source`` names the text in the error message."""
    needed = VALIDATION_SHARE * (context + 1)
    if len(data) < needed:
        raise ValueError(f"{source}: expected at least {needed} bytes for --context {context}, got {len(data)}")
    # a bytearray, since torch warns about memory that it must not write
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(data) - len(data) // VALIDATION_SHARE
    return Text(tokens[:cut], tokens[cut:])


def seeded(*parts: object) -> torch.Generator:
    """Return a generator whose state is a function of the parts alone."""
    digest = hashlib.blake2b(" ".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def training_windows(text: Text, *, batch: int, context: int, seed: int, rank: int, step: int) -> Tensor:
    """Draw int64 [batch, context + 1]: random windows that depend on nothing but the arguments."""
    options = {"generator": seeded(seed, rank, step), "dtype": torch.int64, "device": "cpu"}
    return windows_at(text.train, torch.randint(0, len(text.train) - context, (batch,), **options), context)


def validation_windows(text: Text, *, count: int, context: int) -> Tensor:
    """Return int64 [count, context + 1]: evenly spaced windows, always the same."""
    last = len(text.validation) - context - 1
    starts = torch.arange(count, dtype=torch.int64, device="cpu") * last // max(1, count - 1)
    return windows_at(text.validation, starts, context)


def windows_at(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """Return int64 [starts, context + 1]."""
    return tokens[starts[:, None] + torch.arange(context + 1, dtype=torch.int64, device="cpu")].long()
