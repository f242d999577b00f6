"""What the compiled code of a variant says: accesses, instructions, bytes and times per element."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gpu_report.code import LOAD, STORE
from gpu_report.compiling import Compiled, Target
from gpu_report.flow import blocks_of, executed, varying_accesses
from gpu_report.rooflines import GPUS, issue_seconds, memory_seconds
from gpu_report.variants import Variant

Widths = dict[str, int]
FUSED = ("FFMA", "v_fma_f32", "v_fmac_f32", "v_mad_f32", "v_pk_fma_f32")


@dataclass(frozen=True)
class Finding:
    """One variant on one target.

    Attributes:
        label, dtype, target: which.
        threads, elements: of a program.
        registers, spills, shared: of a thread, of a thread, and bytes of a program.
        loads, stores: accesses of a thread to tensors on the path of a whole tile, by bits.
        least_loads, least_stores: the fewest that its share of each tensor allows.
        kinds: instructions per element, by kind.
        bytes: moved per element, at the least.
        memory, issue: picoseconds per element at the two rooflines; ``port`` is what limits issue.
        exchanges: why threads exchange values through shared memory.
        fused: names of fused multiply-adds of fp32 anywhere in the code, and "ftz" where denormals are lost.
    """

    label: str
    dtype: str
    target: str
    threads: int
    elements: int
    registers: int
    spills: int
    shared: int
    loads: Widths
    stores: Widths
    least_loads: Widths
    least_stores: Widths
    kinds: dict[str, float]
    bytes: float
    memory: float
    issue: float
    port: str
    exchanges: str
    fused: list[str]

    @property
    def instructions(self) -> float:
        """Instructions of a thread per element."""
        return sum(self.kinds.values())

    @property
    def ratio(self) -> float:
        """Issue-bound time as a share of memory-bound time."""
        return self.issue / self.memory

    @property
    def is_narrow(self) -> bool:
        """Whether a thread takes more accesses than its data allows."""
        return (self.loads, self.stores) != (self.least_loads, self.least_stores)


def finding_of(variant: Variant, target: Target, compiled: Compiled) -> Finding:
    """Read the figures from the code. Raises ValueError where its loops are not understood."""
    gpu = GPUS[target.name]
    listing = compiled.listing
    varying = {id(listing.instructions[i]) for i in varying_accesses(listing, blocks_of(listing.instructions))}
    path = executed(listing, variant.loaded_bytes, variant.stored_bytes)
    per_thread = variant.elements / variant.threads
    kinds, pipes = Counter[str](), Counter[str]()
    widths: dict[str, Counter[str]] = {LOAD: Counter(), STORE: Counter()}
    for instruction, times in path:
        kinds[instruction.kind] += times
        pipes[instruction.pipe] += times
        if id(instruction) in varying:
            widths[instruction.access][str(instruction.bits)] += times
    issue, port = issue_seconds(gpu, {pipe: count / per_thread for pipe, count in pipes.items()})
    least = [{str(bits): n for bits, n in variant.widths(part).items()} for part in (variant.reads, variant.writes)]
    fused = {instruction.name for instruction in listing.instructions if instruction.name.startswith(FUSED)}
    fused |= {"ftz"} if compiled.flushes else set()
    return Finding(
        label=variant.label,
        dtype=variant.dtype,
        target=target.name,
        threads=variant.threads,
        elements=variant.elements,
        registers=listing.registers,
        spills=listing.spills,
        shared=compiled.shared,
        loads=dict(widths[LOAD]),
        stores=dict(widths[STORE]),
        least_loads=least[0],
        least_stores=least[1],
        kinds={kind: count / per_thread for kind, count in kinds.items()},
        bytes=variant.bytes_per_element,
        memory=1e12 * memory_seconds(gpu, variant.bytes_per_element),
        issue=1e12 * issue,
        port=port,
        exchanges=variant.exchanges,
        fused=sorted(fused),
    )
