"""The words between the tables of docs/netlab.md."""

from __future__ import annotations

from netlab.records import Record, of_kind
from netlab.summary import Table

SPEED = [
    "## Speedup over DDP fp32 + lion-pytorch",
    "",
    'Medians of the ratios of paired repetitions. LionCub is `algorithm="auto"` with a profile, with or without',
    "overlap, whichever has the lesser median; the best is that of all algorithms. It votes by signs on all tensors,",
    "`compression=SignVote()`. The floor is forward, backward and our Lion's step without a group.",
    "",
]
STEPS = [
    "## Step times",
    "",
    "Median (least-greatest) over repetitions of the slowest worker's step time, in ms. Workers share the machine's",
    "cores, each keeping to one, so computation takes longer the more of them there are, for every method alike.",
    "",
    "- bf16: gradients are cast, divided by the number of workers and summed by Gloo, which rounds to bf16 after each",
    "  addition. The stock hook refuses Gloo by its name; it runs here under another one.",
    "- PowerSGD: rank 4, one bucket. Its time waiting for communication contains its factorisation.",
    "- int8: each sign is a byte, summed by one all-reduce. It holds for up to 127 workers.",
    "",
]
BYTES = [
    "## Bytes per step, 4 workers",
    "",
    "Of the busiest interface, by the kernel's counters: headers, acknowledgements and the barriers between steps",
    "(about 1 kB) included. Headers are counted once per segment of up to 64 KiB, as links here carry whole",
    "segments; frames of 1500 bytes would add 4.6%. `bytes_sent` is what the optimizer says that it sends, its own",
    "headers included.",
    "",
]
ALONE = [
    "## An exchange alone, against the wire limit",
    "",
    "Measured: a barrier, then a vote on messages like the optimizer's, from start to result on the slowest worker.",
    "The wire limit is what a worker sends for it over the link's raw rate. An idle link may send one segment at once,",
    "which is 5 ms at 100 Mb/s. In a step: a barrier, then `step()` with gradients that are there already; its seconds",
    "of communication, median over workers, who wait for each other's encoding but send while they encode.",
    "",
]
OVERLAP = [
    "## Overlap, 4 workers",
    "",
    "Perfect hiding is forward + max(backward, wire limit) + optimizer, with the parts of the compute floor.",
    "",
]
AUTO = [
    "## The automatic choice against the best fixed algorithm",
    "",
    "The median ratio of paired repetitions, and a 95% interval of the mean ratio (Student's t, log scale); resolved",
    "where 1 is outside of it.",
    "",
]
PREDICTED = [
    "## Predicted against measured time of an exchange alone",
    "",
    "Predicted from the profile that a probe of 15 s measured on the same links, before the repetitions; the sum of",
    "all buckets.",
    "",
]
TWO_LEVEL = [
    "## Two levels: 2 hosts of 4 workers",
    "",
    "Workers of one host talk over its loopback; the bytes are those that a host sends over its link in a step. The",
    "hash is of all parameters after the same steps from the same start; every worker's must be the same.",
    "",
]
LAB = [
    "## The lab",
    "",
    "A host is a network namespace on a veth pair, a bridge in a namespace of its own joins them, and `tc` tbf shapes",
    "both directions of every link. Before anything is measured, iperf3 sends from each host to the next, over every",
    "link in both directions: payload as a share of the rate.",
    "",
]


def introduction(records: list[Record], table: Table) -> list[str]:
    """Title, machine, method of measurement."""
    about = of_kind(records, "environment")[0]
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    models = {s["model"]: s["parameters"] for s in of_kind(records, "session")}
    sizes = ", ".join(f"{name} = {count:,} parameters" for name, count in models.items())
    counts = sorted({len(r) for methods in table.values() for r in methods.values()})
    repeated = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    dates = [environment["date"][:16].replace("T", " ") for environment in of_kind(records, "environment")]
    again = f"Runs began at {', '.join(dates)} UTC; what a later one measured of a cell replaces the earlier figures."
    several = [again, ""] if len(dates) > 1 else []
    unfinished = [] if of_kind(records, "end") else ["**The run was interrupted: these are its findings so far.**", ""]
    return [
        "# Training on links of known speed",
        "",
        f"Written by `make netlab`. {about['cpu']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GiB; "
        f"Linux {about['kernel']}, Python {about['python']}, {packages}, iperf3 {about['iperf3']}; "
        f"{about['date'][:10]}.",
        "",
        *several,
        *unfinished,
        f"Byte-level GPTs ({sizes}), batch 1, sequence 64, one thread per worker, Gloo. Every worker process",
        "holds one model, on which all methods take turns, repetition by repetition, each of which starts with another",
        f"method; {repeated} repetitions of 1 to 4 timed steps, each after a barrier that is not timed. Rates are",
        "changed while workers stay up.",
        "",
    ]


def memory(records: list[Record]) -> list[str]:
    """The most that all workers of a session took."""
    totals = {(m["hosts"] * m["per_host"], m["model"]): sum(m["peak_bytes"]) for m in of_kind(records, "memory")}
    if not totals:
        return []
    (workers, model), most = max(totals.items(), key=lambda item: item[1])
    return [
        f"Memory: {most / 2**30:.1f} GiB at most, the sum of all workers' peaks with {workers} workers of {model};",
        "libraries that they share are counted for each of them.",
        "",
    ]
