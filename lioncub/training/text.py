"""The text to train on: bytes of a file or of the interpreter's standard library, and windows drawn from them."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from lioncub.training.config import UserError

VALIDATION_SHARE = 10


@dataclasses.dataclass(frozen=True)
class Text:
    """Training and validation bytes (uint8, 1-D) and the SHA-256 of both together."""

    train: Tensor
    validation: Tensor
    sha256: str


def read_text(path: str | None) -> bytes:
    """Bytes of the file `path`; without one, the top-level modules of the standard library, by name.

    Raises:
        UserError: the file cannot be read, or the interpreter came without its sources.
    """
    if path is None:
        return _standard_library()
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}") from error


def _standard_library() -> bytes:
    folder = Path(sysconfig.get_paths()["stdlib"])
    try:
        return b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    except OSError as error:
        raise UserError(
            f"cannot read the standard library's sources: {error.filename}: {error.strerror}; name a text with --data"
        ) from error


def split_text(data: bytes, context: int, source: str) -> Text:
    """The last tenth is for validation. `source` names the text in the error message.

    Raises:
        UserError: a part would be shorter than one window of `context` + 1 bytes.
    """
    needed = VALIDATION_SHARE * (context + 1)
    if len(data) < needed:
        raise UserError(f"{source}: expected at least {needed} bytes for --context {context}, got {len(data)}")
    # a bytearray, since torch warns about memory that it must not write
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    cut = len(data) - len(data) // VALIDATION_SHARE
    return Text(tokens[:cut], tokens[cut:], hashlib.sha256(data).hexdigest())


def load_text(path: str | None, context: int) -> Text:
    """Read and split; see :func:`read_text` and :func:`split_text`."""
    source = "the standard library's sources (name a text with --data)" if path is None else f"--data {path}"
    return split_text(read_text(path), context, source)


def training_windows(text: Text, *, batch: int, context: int, seed: int, rank: int, step: int) -> Tensor:
    """int64 [batch, context + 1]: random windows that depend on nothing but the arguments."""
    digest = hashlib.blake2b(f"{seed} {rank} {step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    starts = torch.randint(0, len(text.train) - context, (batch,), generator=generator, dtype=torch.int64, device="cpu")
    return _windows(text.train, starts, context)


def validation_windows(text: Text, *, count: int, context: int) -> Tensor:
    """int64 [count, context + 1]: evenly spaced windows, always the same."""
    last = len(text.validation) - context - 1
    starts = torch.arange(count, dtype=torch.int64, device="cpu") * last // max(1, count - 1)
    return _windows(text.validation, starts, context)


def _windows(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    return tokens[starts[:, None] + torch.arange(context + 1, dtype=torch.int64, device="cpu")].long()
