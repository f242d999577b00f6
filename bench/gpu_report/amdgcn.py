"""AMDGCN, the machine code of AMD GPUs, as the text that Triton hands to the assembler."""

from __future__ import annotations

import re

from gpu_report.code import BRANCH, EXIT, JUMP, LOAD, NEXT, STORE, Instruction, Listing

_INSTRUCTION = re.compile(r"^\t((?:v|s|ds|global|buffer|flat|scratch)_\w+)[ \t]*(.*)$")
_LABEL = re.compile(r"^(\.LBB\w+):")
_REGISTER = re.compile(r"\b([vsa])(?:(\d+)|\[(\d+):(\d+)\])|\b(vcc)\b")
_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32, "dwordx2": 64}
_BITS |= {"dwordx3": 96, "dwordx4": 128}
_EXCHANGES = ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane")
# a transcendental function, or the multiplication of 32-bit integers, takes a SIMD four times as long
_QUARTER = re.compile(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_|v_mul_(lo|hi)_|v_mad_[ui]64_")
_CONTROL = ("s_waitcnt", "s_nop", "s_barrier", "s_sleep", "s_setprio", "s_sched", "s_cbranch", "s_branch", "s_endpgm")
_SUFFIX = re.compile(r"_(e32|e64|sdwa|dpp)$")
# the second operand of these is a result too
_CARRIES = re.compile(r"_co_|v_div_scale|v_mad_[ui]64_")


def parse(text: str) -> Listing:
    """The listing of the only kernel in ``text``. Raises ValueError where there is none."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _INSTRUCTION.match(line.split(";")[0].rstrip()):
            lines.append((found[1], found[2]))
    if not lines:
        raise ValueError("text: expected AMDGCN assembly, got no instructions")
    instructions = tuple(_instruction(name, operands, labels) for name, operands in lines)
    spills = _field(text, "vgpr_spill_count") + _field(text, "sgpr_spill_count")
    spills += sum(instruction.kind == "local" for instruction in instructions)
    return Listing(instructions, _field(text, "vgpr_count"), spills, frozenset({"v0"}))


def _field(text: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", text)
    if found is None:
        raise ValueError(f"text: expected metadata with {name}, got none")
    return int(found[1])


def _instruction(name: str, operands: str, labels: dict[str, int]) -> Instruction:
    kind, pipe = _kind(name)
    parts = [part.strip() for part in operands.split(",")] if operands else []
    memory = re.match(r"(?:global|buffer|flat)_(load|store)_(\w+)", name)
    access = memory[1] if memory else ""
    bits = _BITS[re.sub(r"_d16.*|_lds.*|^format_.*", "", memory[2])] if memory else 0
    writes_nothing = access == STORE or kind == "control" or re.search(r"atomic|ds_write|scratch_store|s_cmp", name)
    written = 0 if writes_nothing else 2 if _CARRIES.search(name) else 1
    reads = () if name.startswith(("v_readfirstlane", "v_readlane")) else _registers(parts[written:])
    address: tuple[str, ...] = ()
    if access == LOAD:
        address = _registers(parts[1:])
    elif access == STORE:
        # what is stored stands first after a buffer's name, and second after others'
        address = _registers(parts[1:] if name.startswith("buffer") else [parts[0], *parts[2:]])
    flow, target = _flow(name, parts, labels)
    return Instruction(name, kind, pipe, reads, _registers(parts[:written]), access, bits, address, flow, target)


def _kind(name: str) -> tuple[str, str]:
    """What an instruction is, and the port that takes it."""
    if name.startswith(("global_", "buffer_", "flat_")):
        return "global", "vmem"
    if name.startswith("scratch_"):
        return "local", "vmem"
    if name.startswith(_EXCHANGES):
        return "exchange", "lds"
    if name.startswith("ds_"):
        return "shared", "lds"
    if name.startswith(_CONTROL):
        return "control", "branch" if "branch" in name else "internal"
    if name.startswith("s_"):
        return "scalar", "smem" if re.match(r"s_(buffer_)?load", name) else "salu"
    pipe = "quarter" if _QUARTER.match(name) else "valu"
    if re.match(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_", name):
        return "special", pipe
    if name.startswith("v_cvt"):
        return "conversion", pipe
    plain = _SUFFIX.sub("", name)
    return ("fp64" if plain.endswith("f64") else "fp32" if plain.endswith("f32") else "integer"), pipe


def _registers(parts: list[str]) -> tuple[str, ...]:
    found: list[str] = []
    for letter, one, first, last, vcc in _REGISTER.findall(" ".join(parts)):
        if vcc:
            found.append("vcc")
        else:
            found += [f"{letter}{i}" for i in range(int(one or first), int(one or last) + 1)]
    return tuple(found)


def _flow(name: str, parts: list[str], labels: dict[str, int]) -> tuple[str, int]:
    if name == "s_endpgm":
        return EXIT, -1
    if name == "s_branch":
        return JUMP, labels[parts[0]]
    if name.startswith("s_cbranch"):
        return BRANCH, labels[parts[0]]
    return NEXT, -1
