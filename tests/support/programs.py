"""Runs a script on N processes, as torchrun does, but forked from one that has imported torch already."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import runpy
import socket
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gloo_workers import everyone, results_of


def printed_by(
    script: Path, workers: int, folder: Path, backend: str | None = None, arguments: Sequence[str] = ()
) -> str:
    """What all of them print, in the order of ranks; ``backend`` is that of `torch.compile` where none is named."""
    return "".join(results_of(_run_script, workers, str(script), str(folder), backend, arguments, timeout=200.0))


def _run_script(
    rank: int, world_size: int, script: str, folder: str, backend: str | None, arguments: Sequence[str]
) -> str:
    import torch
    import torch.distributed as dist

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = everyone(free.getsockname()[1])[0]
    # the script makes its own
    dist.destroy_process_group()
    os.chdir(folder)
    ranks: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    found = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, **ranks}
    os.environ.update({name: str(value) for name, value in found.items()})
    sys.argv = [script, *arguments]
    warnings.resetwarnings()
    if backend is not None:
        torch.compile = functools.partial(torch.compile, backend=backend)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()
