"""Numbers with units, as the command line takes them."""

import math
import re

_NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}


def parameters(text: str) -> int:
    """A number of parameters: ``1.3e9``, ``1.3B``, ``25M``, ``1000``. Raises ValueError for anything else."""
    count = _scaled(text, _COUNTS)
    if count is None or not math.isfinite(count) or count < 1 or count != round(count):
        raise ValueError(f"expected a whole number of parameters such as 25M, 1.3B or 1.3e9, got {text!r}")
    return round(count)


def bandwidth(text: str) -> float:
    """Bytes per second from bits: ``100mbit``, ``10gbit``. Raises ValueError for anything else."""
    bits = _scaled(text, _BITS)
    if bits is None or not math.isfinite(bits) or bits <= 0:
        raise ValueError(f"expected a bandwidth such as 100mbit or 10gbit, got {text!r}")
    return bits / 8


def _scaled(text: str, units: dict[str, float]) -> float | None:
    found = re.fullmatch(_NUMBER + "([a-z]*)", text.strip().lower())
    if found is None or found[2] not in units:
        return None
    # rounded, since 1.3e9 may be written as 1.3 and a unit, whose product need not be whole
    return round(float(found[1]) * units[found[2]], 3)
