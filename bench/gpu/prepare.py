"""Fills build/gpu, which is copied with the checkout: the package, and peers that such a machine may lack."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from reporting.records import ROOT

from gpu.driver import CARRIED, ENTRY

_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
# bitsandbytes brings a library for every version of CUDA and more: that of the machine's torch, CUDA 13.0, is enough
PEERS = {"lion-pytorch==0.2.5": "", "bitsandbytes==0.50.2": r"cuda11|cuda12|cuda13[^0]|rocm|xpu|hip"}


def prepare(peers: dict[str, str] = PEERS) -> int:
    """Fill it anew; gives 1 where the package could not be installed. Other things that are missing are named."""
    shutil.rmtree(CARRIED, ignore_errors=True)
    install = [*_PIP, "install", "--no-deps", "--no-build-isolation", "--no-compile", "--target", str(CARRIED / "copy")]
    if not _succeeds([*install, str(ROOT)]):
        return 1
    added = {requirement: _add_peer(requirement, unwanted) for requirement, unwanted in peers.items()}
    library = ["-O2", "-shared", "-fPIC", "-o", str(CARRIED / "pace.so"), str(ENTRY / "pace.c"), "-ldl"]
    added["pace.so"] = shutil.which("gcc") is not None and _succeeds(["gcc", *library])
    for name, is_there in added.items():
        print(f"{name}: {'added' if is_there else 'ABSENT'}")
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"{CARRIED.relative_to(ROOT)}: {size / 2**20:.1f} MiB")
    return 0


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, check=False).returncode == 0


def _add_peer(requirement: str, unwanted: str) -> bool:
    """Unpack a wheel; False where it cannot be downloaded."""
    with tempfile.TemporaryDirectory() as folder:
        download = [*_PIP, "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        if not _succeeds([*download, requirement]):
            return False
        for wheel in Path(folder).glob("*.whl"):
            unpack(wheel, CARRIED / "extra", unwanted)
    return True


def unpack(wheel: Path, folder: Path, unwanted: str) -> None:
    """Unpack the files of a wheel whose names do not match ``unwanted``, a pattern, or "" for all."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not unwanted or re.search(unwanted, name) is None:
                archive.extract(name, folder)
