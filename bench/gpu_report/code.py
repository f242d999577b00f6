"""Machine code as both disassemblers give it: instructions with what they read, write and cost."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("global", "shared", "exchange", "local", "fp32", "fp64", "integer", "conversion", "special")
# what a warp does once for all its threads; branches, waits and barriers; and what is none of these
KINDS += ("scalar", "control", "other")
LOAD, STORE = "load", "store"
# how an instruction is followed: by the next, by the target, by either, by none, or by the next or none
NEXT, JUMP, BRANCH, EXIT, MAY_EXIT = "next", "jump", "branch", "exit", "may exit"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a thread.

    ``pipe`` is the unit that executes it, as `rooflines` names them. ``access`` is LOAD or STORE where it moves
    ``bits`` between a thread and global memory; ``address`` are the registers that say where. ``target`` is the number
    of the instruction that a branch leads to. ``guard`` is the predicate of the threads that execute it; empty for all.
    """

    name: str
    kind: str
    pipe: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    access: str = ""
    bits: int = 0
    address: tuple[str, ...] = ()
    flow: str = NEXT
    target: int = -1
    guard: str = ""


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions, the registers of a thread, and the spills that the compiler admits to.

    ``varying`` are the registers that differ between threads from the start.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    spills: int
    varying: frozenset[str]
