"""Runs the examples of training stacks in the processes of a test."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load_example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def as_torchrun(rank: int, world_size: int, folder: Path) -> Iterator[list[str]]:
    """Within it, the process looks like one of torchrun in a folder of all; gives what lioncub warned of.

    Stacks warn of much that is theirs.
    """
    folder.mkdir(exist_ok=True)
    ranks: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    ranks |= {"GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "tests"}
    forget_accelerate()
    before, place, said = dict(os.environ), Path.cwd(), list[str]()
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update({"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
    os.chdir(folder)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("always")
            try:
                yield said
            finally:
                said += [str(one.message) for one in caught if is_ours(str(one.message))]
    finally:
        logging.disable(logging.NOTSET)
        os.chdir(place)
        os.environ.clear()
        os.environ.update(before)


def is_ours(message: str) -> bool:
    return message.startswith(("all votes of the last", "state_dict: expected", "no parameter had a gradient"))


def forget_accelerate() -> None:
    """Forget what Accelerate remembers of this process, as if the script were a new one."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
