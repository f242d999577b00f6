"""Which implementation runs: ``auto`` picks by device, an explicit choice runs or raises."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from types import ModuleType

import torch

IMPLS = ("auto", "triton", "cpu", "reference")
_MODULES = {
    "triton": "lioncub.kernels.triton_gpu",
    "cpu": "lioncub.kernels.numba_cpu",
    "reference": "lioncub.kernels.reference",
}


def resolve_impl(impl: str, device: torch.device) -> str:
    """The implementation that ``impl`` means for tensors on ``device``: "triton", "cpu" or "reference".

    ``auto``: Triton on CUDA and HIP, Numba on CPU. Where the package for it is absent, the reference, with one
    warning. Raises ValueError where an explicit choice cannot run on the device, ImportError where its
    package is missing.
    """
    return _resolve(impl, device.type)


def backend(impl: str, device: torch.device) -> ModuleType:
    """The module that implements every op for ``impl`` on ``device``; errors as in `resolve_impl`."""
    return _load(_resolve(impl, device.type))


@functools.cache
def _load(resolved: str) -> ModuleType:
    return importlib.import_module(_MODULES[resolved])


@functools.cache
def _resolve(impl: str, device_type: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {IMPLS}, got {impl!r}")
    if impl == "auto":
        return _automatic(device_type)
    if impl == "cpu":
        _require_cpu(device_type)
    if impl == "triton":
        _require_triton(device_type)
    return impl


def _automatic(device_type: str) -> str:
    wanted = {"cuda": ("triton", "triton", "triton"), "cpu": ("cpu", "numba", "lioncub[cpu]")}.get(device_type)
    if wanted is None:
        return "reference"
    impl, package, install = wanted
    if importlib.util.find_spec(package) is not None:
        return impl
    warnings.warn(
        f"{package} is not installed, so lioncub runs its slow reference kernels on {device_type} tensors; "
        f"install {install} for the fast ones",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


def _require_cpu(device_type: str) -> None:
    if device_type != "cpu":
        raise ValueError(f"impl: 'cpu' expected tensors on the cpu, got {device_type}")
    if importlib.util.find_spec("numba") is None:
        raise ImportError("impl: 'cpu' needs numba, which is not installed; install lioncub[cpu]")


def _require_triton(device_type: str) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ImportError("impl: 'triton' needs triton, which is not installed")
    if device_type != "cuda" and not (device_type == "cpu" and _load("triton").INTERPRETED):
        raise ValueError(
            "impl: 'triton' expected CUDA or HIP tensors (or TRITON_INTERPRET=1, set before lioncub is imported, "
            f"and cpu tensors), got {device_type}"
        )
