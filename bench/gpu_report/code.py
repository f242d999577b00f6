"""Machine code as the disassemblers print it: registers, spills, widths of accesses, fused multiply-adds."""

from __future__ import annotations

import re
from dataclasses import dataclass

# both lists: names of fp32 multiply-adds that round once
_FUSED = re.compile(r"\b(FFMA\w*|v_(?:pk_)?(?:fma|fmac|mad)_f32)")
_SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_SASS_RESOURCES = re.compile(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:(\d+)")
_SASS_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_AMD_LINE = re.compile(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)", re.MULTILINE)
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(\w+)")
_AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "dwordx2": 64}
_AMD_BITS |= {"dwordx3": 96, "dwordx4": 128}


@dataclass(frozen=True)
class Code:
    """Properties of a kernel's machine code.

    Attributes:
        registers, spills: of a thread.
        loads, stores: bits of the widest access to global memory in each direction; 0 where there is none.
        fused: names of fused multiply-adds of fp32, and "ftz" where denormals are flushed.
    """

    registers: int
    spills: int
    loads: int
    stores: int
    fused: tuple[str, ...]


def read_sass(text: str, ptx: str) -> Code:
    """Read what ``cuobjdump -sass -res-usage`` prints. Raises ValueError where there are no instructions."""
    names = [name.split(".") for name in _SASS_LINE.findall(text)]
    resources = _SASS_RESOURCES.search(text)
    if not names or resources is None:
        raise ValueError("text: expected the output of cuobjdump -sass -res-usage, got no instructions or no resources")
    widths = {"LDG": [0], "STG": [0]}
    for base, *suffixes in names:
        if base in widths:
            widths[base].append(next((_SASS_BITS[part] for part in suffixes if part in _SASS_BITS), 32))
    spills = sum(base in ("LDL", "STL") for base, *_ in names) or int(resources[2])
    fused = {*_FUSED.findall(text)} | ({"ftz"} if ".ftz" in ptx else set())
    return Code(int(resources[1]), spills, max(widths["LDG"]), max(widths["STG"]), tuple(sorted(fused)))


def read_amdgcn(text: str) -> Code:
    """Read the text that Triton hands to AMD's assembler. Raises ValueError where there are no instructions."""
    names = _AMD_LINE.findall(text)
    if not names:
        raise ValueError("text: expected AMDGCN assembly, got no instructions")
    widths = {"load": [0], "store": [0]}
    for name in names:
        if access := _AMD_ACCESS.match(name):
            widths[access[1]].append(_AMD_BITS[re.sub(r"_d16.*|_lds.*|^format_.*", "", access[2])])
    spills = _field(text, "vgpr_spill_count") + _field(text, "sgpr_spill_count")
    spills += sum(name.startswith("scratch_") for name in names)
    fused = tuple(sorted({*_FUSED.findall(text)}))
    return Code(_field(text, "vgpr_count"), spills, max(widths["load"]), max(widths["store"]), fused)


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise ValueError(f"text: expected metadata with {name}, got none")
    return int(found[1])
