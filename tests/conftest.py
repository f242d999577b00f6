"""Set before anything imports triton: its kernels then run on CPU tensors, interpreted, unless told otherwise."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
# files that take a minute and more
LONGEST = ("test_triton_compile.py", "test_gpu.py", "test_examples.py", "test_golden.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no process is left with one of them when the others have ended."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
