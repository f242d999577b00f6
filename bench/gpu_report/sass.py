"""SASS, the machine code of NVIDIA GPUs, as `cuobjdump -sass -res-usage` prints it."""

from __future__ import annotations

import re

from gpu_report.code import BRANCH, EXIT, JUMP, LOAD, MAY_EXIT, NEXT, STORE, Instruction, Listing

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_REGISTER = re.compile(r"\b(U?R\d+)(\.64)?|\b(U?P\d)\b|\b(SR_TID|SR_LANEID|SR_VIRTID)")
_PREDICATE = re.compile(r"!?U?P(\d|T)$")
_BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}

_MEMORY = {"LDG": LOAD, "STG": STORE, "LD": LOAD, "ST": STORE}
_ATOMIC = {"ATOM", "ATOMG", "RED", "REDG"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_LOCAL = {"LDL", "STL"}
_FMA = {"FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HFMA2", "HMUL2"}
_FP32_ALU = {"FSETP", "FSET", "FSEL", "FMNMX", "FMNMX3", "FCHK", "HSETP2", "HSET2", "HMNMX2"}
_FP64 = {"DADD", "DMUL", "DFMA", "DSETP", "DMNMX"}
_CONVERSIONS = {"F2F": "xu", "F2I": "xu", "I2F": "xu", "FRND": "xu", "I2I": "xu", "F2FP": "alu", "I2FP": "alu"}
_CONVERSIONS |= {"F2IP": "alu", "I2IP": "alu"}
_XU = {"POPC", "FLO", "BREV"}
_CONTROL = {"BRA", "BRX", "JMP", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC", "BAR", "NOP", "YIELD"}
_CONTROL |= {"DEPBAR", "MEMBAR", "ERRBAR", "NANOSLEEP", "BPT", "KILL", "ACQBULK", "CCTL", "FENCE", "SYNCS", "BMOV"}
_INTEGER = {
    "IADD",
    "IADD3",
    "IADD64",
    "LOP",
    "LOP3",
    "SHF",
    "SHL",
    "SHR",
    "LEA",
    "PRMT",
    "SEL",
    "ISETP",
    "MOV",
    "VIADD",
}
_INTEGER |= {"IABS", "IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX", "SGXT", "BMSK", "R2P", "P2R", "PLOP3", "CS2R", "LOP32I"}
_INTEGER |= {"MOV32I", "IADD32I", "VABSDIFF", "PLOP", "MOVM", "VOTE", "MATCH"}
# their first operand is read, or they have none
_WRITE_NOTHING = {"STG", "ST", "STS", "STL", "STSM", "RED", "REDG", *_CONTROL}
_PAIRS = {"DADD", "DMUL", "DFMA", "CS2R", "FADD2", "FMUL2", "FFMA2", "IADD64"}


def parse(text: str) -> Listing:
    """The listing of the only kernel in ``text``. Raises ValueError where there is none."""
    lines = _LINE.findall(text)
    resources = _RESOURCES.search(text)
    if not lines or resources is None:
        raise ValueError("text: expected the output of cuobjdump -sass -res-usage, got no instructions or no resources")
    numbers = {int(address, 16): i for i, (address, *_) in enumerate(lines)}
    instructions = tuple(_instruction(guard, name, operands, numbers) for _, guard, name, operands in lines)
    spills = sum(instruction.kind == "local" for instruction in instructions)
    return Listing(instructions, int(resources[1]), spills or int(resources[3]), frozenset({"tid"}))


def _instruction(guard: str, name: str, operands: str, numbers: dict[int, int]) -> Instruction:
    base, *suffixes = name.split(".")
    kind, pipe = _kind(base, suffixes)
    parts = _split(operands)
    written = _written(base, parts)
    writes = _all_predicates() if base == "R2P" else _registers(parts[:written], _width(base, suffixes))
    reads = _registers([*parts[written:], *[part for part in parts[:written] if "[" in part]])
    access = _MEMORY.get(base, "")
    bits = next((_BITS[suffix] for suffix in suffixes if suffix in _BITS), 32) if access else 0
    address = tuple(reg for part in parts if "[" in part for reg in _registers([part[part.rindex("[") :]]))
    flow, target = _flow(base, guard, parts, numbers)
    # a register of the uniform datapath is the same for all threads of a warp
    reads = () if base in ("R2UR", "S2UR") else reads
    return Instruction(name, kind, pipe, reads, writes, access, bits, address, flow, target, guard)


def _kind(base: str, suffixes: list[str]) -> tuple[str, str]:
    """What an instruction is, and the pipe that takes it."""
    if base == "HADD2" and "F32" in suffixes:
        return "conversion", "fma"
    tables = {
        "global": dict.fromkeys([*_MEMORY, *_ATOMIC], "lsu"),
        "shared": dict.fromkeys(_SHARED, "lsu"),
        "exchange": dict.fromkeys(["SHFL"], "lsu"),
        "local": dict.fromkeys(_LOCAL, "lsu"),
        "fp32": dict.fromkeys(_FMA, "fma") | dict.fromkeys(_FP32_ALU, "alu"),
        "fp64": dict.fromkeys(_FP64, "fp64"),
        "conversion": _CONVERSIONS,
        "special": {"MUFU": "xu"},
        "control": dict.fromkeys(_CONTROL, "issue"),
        "integer": dict.fromkeys(_INTEGER, "alu") | dict.fromkeys(_XU, "xu") | {"IMAD": "imad", "IMUL": "imad"},
        "scalar": dict.fromkeys(["LDC", "LDCU", "S2UR", "R2UR", "REDUX", "CREDUX"], "issue"),
    }
    for kind, pipes in tables.items():
        if base in pipes:
            return kind, pipes[base]
    return ("scalar" if base.startswith("U") else "other"), "issue"


def _split(operands: str) -> list[str]:
    return [part.strip() for part in operands.split(",")] if operands else []


def _written(base: str, parts: list[str]) -> int:
    """How many of the operands are results: one, and the predicates next to it."""
    if base in _WRITE_NOTHING or not parts:
        return 0
    if _PREDICATE.match(parts[0]):
        return 2
    number = 1
    while number < len(parts) and _PREDICATE.match(parts[number]) and not parts[number].startswith("!"):
        number += 1
    return number


def _width(base: str, suffixes: list[str]) -> int:
    """Registers of a result."""
    if base in ("LDG", "LD", "LDS", "LDL", "LDC", "LDCU", "ULDC"):
        return max(next((_BITS[suffix] for suffix in suffixes if suffix in _BITS), 32) // 32, 1)
    pairs = base in _PAIRS or "WIDE" in suffixes or "64" in suffixes or (base in ("F2F", "I2F") and "F64" in suffixes)
    return 2 if pairs and "32" not in suffixes else 1


def _registers(parts: list[str], width: int = 1) -> tuple[str, ...]:
    """Registers that operands name; the first one is ``width`` of them."""
    found: list[str] = []
    for register, wide, predicate, thread in _REGISTER.findall(" ".join(parts)):
        if thread:
            found.append("tid")
        elif predicate:
            found.append(predicate)
        else:
            letters, first = register.rstrip("0123456789"), int(register.lstrip("UR"))
            found += [f"{letters}{first + i}" for i in range(2 if wide else width)]
    return tuple(found)


def _all_predicates() -> tuple[str, ...]:
    return tuple(f"P{i}" for i in range(7))


def _flow(base: str, guard: str, parts: list[str], numbers: dict[int, int]) -> tuple[str, int]:
    if base in ("EXIT", "RET"):
        return (MAY_EXIT if guard else EXIT), -1
    if base != "BRA":
        # a call leads to a subroutine, of which the arithmetic on ordinary numbers has no need, and comes back
        return NEXT, -1
    target = numbers[int(parts[-1], 16)]
    conditional = guard or any(_PREDICATE.match(part) for part in parts[:-1])
    return (BRANCH if conditional else JUMP), target
