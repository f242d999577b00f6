"""Another checkout of the library, made importable beside this one: old and new code are timed by one benchmark."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link_library(checkout: Path, folder: Path) -> dict[str, str]:
    """Link the library of ``checkout`` into ``folder`` as it is installed, and return the environment that imports it.

    The source folders lie side by side in a checkout and inside one package where they are installed. Compiled Numba
    kernels are kept in the checkout. Raises ValueError where ``checkout`` has no library.
    """
    missing = [name for name in ("lioncub", "kernels", "collectives") if not (checkout / name).is_dir()]
    if missing:
        raise ValueError(f"checkout: expected lioncub, kernels and collectives in {checkout}, got no {missing[0]}")
    package = folder / "lioncub"
    package.mkdir(parents=True)
    sources = [*(checkout / "lioncub").iterdir(), checkout / "kernels", checkout / "collectives"]
    for source in sources:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source.resolve())
    # before site-packages, where an editable install would be found
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}
