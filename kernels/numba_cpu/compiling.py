"""How kernels are compiled: without fast-math, without the GIL, cached on disk under a key of all sources here."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

# numpy's error model has no branch for a division by zero, which would keep a loop from being vectorized
_OPTIONS = {"nogil": True, "error_model": "numpy"}

# arithmetic on values, and whatever is called once per word
device_function = numba.njit(forceinline=True, **_OPTIONS)
# what is called once per block of words; a call costs nothing there, and copies of it cost seconds of compilation
block_function = numba.njit(**_OPTIONS)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile ``function`` at its first call with new types; later processes load it from Numba's cache folder.

    Where no such folder can be written, every process compiles anew, with one warning.
    """
    dispatcher = numba.njit(**_OPTIONS)(function)
    try:
        # numba's own key covers the kernel's file alone, so a changed device function would go unnoticed
        dispatcher._cache = _PackageCache(dispatcher.py_func)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        _warn_uncached("neither the folder of lioncub nor the home folder can be written")
    return dispatcher


class _PackageCache(FunctionCache):
    """Numba's cache of one kernel, with the sources of the whole package in its key."""

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _SOURCES)

    @contextlib.contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        """Around loading and saving: a folder that became full, read-only or broken costs time, and stops nobody."""
        try:
            yield
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            _warn_uncached(f"{type(error).__name__}: {error}")


def _warn_uncached(why: str) -> None:
    if _warned:
        return
    _warned.append(why)
    warnings.warn(
        f"lioncub cannot keep its compiled CPU kernels, so every process compiles them anew, for seconds each ({why}); "
        "set NUMBA_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _hash_sources() -> str:
    digest = hashlib.sha256()
    package = Path(__file__).parent
    # constants come from the modules beside the package
    for path in sorted([*package.glob("*.py"), *package.parent.glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_SOURCES = _hash_sources()
# why there is no cache, once that has been told
_warned: list[str] = []
