"""The text of docs/gpu.md."""

from __future__ import annotations

INTRODUCTION = """# What the Triton kernels compile to

Written by `make gpu-report`, which compiles every kernel ahead of time and reads the machine code; no GPU takes part,
so nothing here is a measurement of time. The two rooflines are lower bounds: what the memory takes for the bytes, and
what the units take for the instructions. The same figures for all targets are in `gpu.json`.
"""

CLAIMS = """## What is asked of the code

Tests hold these (`tests/test_gpu_report.py`).
"""

MISSED = """### Where it is not so
"""

GPUS = """## GPUs

| target | GPU | bandwidth, TB/s | SMs or CUs | clock, GHz | figures from |
|---|---|---:|---:|---:|---|
"""

METHOD = """
The clocks of H100 and B200 are those that their data sheets' fp32 peaks imply. What is modelled of a processor:

- NVIDIA: an SM's four schedulers issue 128 threads' instructions per clock. Per SM and clock, the ALU (logic, integer
  sums, comparisons, selections) takes 64, the FMA pipe 64 on A100 and 128 on H100 and B200, its half that multiplies
  integers 64, conversions and special functions 16, loads and stores 32, fp64 32 on A100, else 64. The assignment of
  instructions to pipes follows the Nsight Compute documentation; B200 is assumed to be like H100.
- AMD: a CU's four SIMDs take 64 vector instructions per clock, a quarter of that for transcendental functions and
  products of 32-bit integers. Scalar, memory, LDS and branch instructions go to ports of their own, 64 each.
- Issue-bound time is that of the slowest of these. Not modelled: latency, occupancy, caches, bank conflicts, queues,
  the launch, and what a clock under load is below a data sheet's.

## How the code is read

Kernels are compiled with the arguments, tile sizes and warps that the launchers use, for whole tiles at aligned
addresses. An element is a parameter's, or one code of one voter; all figures are per element:
instructions of a thread over the elements of a thread. A warp instruction counts 32 threads, a wave's 64, whatever
their masks.

- Instructions are those of one path through the kernel: of all ways that load and store exactly the bytes of a whole
  tile, the one with the most 128-bit accesses, and of those the shortest. So the tiles of a list that are cut or not
  aligned, a gate that is shut, a flag that is set, and the slow path of a division do not count.
- A loop's trips are what its loads must come to: a vote is on 8 workers, so 128 bytes per thread are 2 trips through a
  loop that loads 4 rows of 16 bytes. Of several loops the first makes as many trips as fit.
- Loads whose address is the same for a whole warp (tables, gates, scales) count as instructions, not as bytes.
- Bytes are the least that the op must move: each tensor once in each direction. Where accesses are as wide as asked,
  the code moves no more.
- Registers, spills and shared memory are those of the whole kernel, not of the path.

"mixed" are bf16 parameters and gradients with fp32 momentum, the optimizers' default for bf16.
"""

MAIN = """## The kernels of a step

Instructions per element, picoseconds per element at the memory's and at the units' roofline, the share of the second
in the first, and what limits it.
"""

BY_KIND = """## Instructions by kind

Per element, on sm_90 and gfx942. "scalar" is what a warp executes once for all its threads.
"""

ALL = """## All kernels

Registers of a thread, instructions per element, and issue-bound as a share of memory-bound time.
"""

ACCESSES = """## Accesses of a thread

On sm_90, for a whole tile: number x bits. Shared memory is in bytes per program.
"""

TRIED = """## What was tried

Tile shapes, by the same report: elements and threads of a program, with registers, instructions per element and the
share of issue-bound in memory-bound time. The first of each kernel is what it is launched with.
"""

LAYOUTS = """### Layouts and arithmetic

Tried in copies of the kernels, with bf16 data unless said otherwise. Percentages are issue-bound time as a share of
memory-bound time on sm_80, sm_90 and gfx942.
"""

# what, as it is here, instead, and which is better
LAYOUTS_TRIED = (
    (
        "signs of a list: negated where ties go up and compared once, the parity of a row's byte at once; Inf and NaN "
        "found by a sum of products with 0; instead two comparisons, a selection and a count per element",
        "52%, 52%, 36%",
        "61%, 64%, 39%",
        "kept",
    ),
    ("the same for one tensor", "45%, 45%, 43%", "50%, 59%, 48%", "kept"),
    ("the same for `pack`", "75%, 74%, 69%", "85%, 81%, 56%", "kept; worse on gfx942"),
    (
        "codes of 2 bits masked by rows, those of lists known to begin with a 64-bit word; instead masked by bytes",
        "one load of 16 bits, by the thread itself",
        "two loads of 8 bits, of lists by other threads",
        "kept",
    ),
    (
        "signs of 16-bit fields masked by rows; the same for applying codes of 16 bits",
        "66%, 63%, 76%; loads of 128 bits",
        "101%, 97%, 94%; loads of 16 bits",
        "kept",
    ),
    ("`dequantize` to fp32 with 4 elements per thread; instead 8", "no shared memory", "shared memory", "kept"),
    (
        "scales of chunks, fp32: a number of tiles that the compiler does not know; instead one that it does",
        "44, 44, 64 registers",
        "48, 48, 266 registers",
        "kept",
    ),
    (
        "flags of a row joined by or; codes past the end masked in the packed byte",
        "45%, 45%, 43%",
        "58%, 65%, 55%",
        "worse",
    ),
    (
        "apply and step in rows of 8 elements per thread where a tensor is fp32; apply with momentum, mixed",
        "16%, 16%, 17%; bf16 by 64 bits",
        "12%, 12%, 16%; all by 128 bits",
        "open",
    ),
    ("encode with 16 or 32 elements per thread", "above", "fewer instructions, more registers", "open"),
)

OPEN = """In rows, each access of a warp to an fp32 tensor touches half of every 32-byte sector that it covers. What
that costs the memory is not in these figures, nor is the occupancy that more registers cost: both need a GPU.
"""
