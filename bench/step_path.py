"""Functions and files of ours that a warm step enters, and its host time on tiny tensors: real processes over Gloo.

With ``--old``, the library of another checkout takes its turns in between, and ratios old / new are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

TENSORS, ELEMENTS, WARM_UP = 148, 64, 30


def main() -> None:
    """Measure, alternating between the checkouts, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the functions")
    parser.add_argument("--old", type=Path, metavar="CHECKOUT", help="measure its library too")
    parser.add_argument("--steps", type=int, default=300, help="timed steps of a turn; default: 300")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each checkout; default: 3")
    options = parser.parse_args()
    from checkouts import ROOT, link_library

    checkouts = {"new": ROOT} | ({"old": options.old} if options.old else {})
    with tempfile.TemporaryDirectory() as folder:
        paths = {code: link_library(checkout, Path(folder) / code) for code, checkout in checkouts.items()}
        for workers in (4, 1):
            turns: dict[str, list[dict[str, Any]]] = {code: [] for code in paths}
            for i in range(options.rounds):
                for code in sorted(paths, reverse=i % 2 == 1):
                    turns[code].append(run_workers(workers, options.steps, paths[code]))
            for code in paths:
                names = turns[code][0]["names"]
                wall, cpu = (median(turn[key] for turn in turns[code]) for key in ("wall", "cpu"))
                path = f"{len(names)} functions in {len({file for file, _ in names})} files"
                print(f"{code}, {workers} workers: {path}; {1e6 * wall:.0f} us, of the processor {1e6 * cpu:.0f}")
                print("".join(f"    {file}: {name}\n" for file, name in names) if options.list else "", end="")
            for key in ("wall", "cpu") if options.old else ():
                ratios = [old[key] / new[key] for old, new in zip(turns["old"], turns["new"], strict=True)]
                print(f"  {key} old / new: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


def run_workers(workers: int, steps: int, environment: dict[str, str]) -> dict[str, Any]:
    """Run one turn in fresh processes and return what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", str(workers), str(steps), f"file://{folder}/store"]
        options: dict[str, Any] = {"env": os.environ | environment, "stdout": subprocess.PIPE}
        ranks = [subprocess.Popen([*command, str(rank)], **options) for rank in range(workers)]
        outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a worker failed")
    answer: dict[str, Any] = json.loads(outputs[0])
    return answer


def work(workers: int, steps: int, store: str, rank: int) -> None:
    """Take steps as one rank: timed ones, then one whose functions are noted in all threads."""
    import torch
    import torch.distributed as dist

    import lioncub

    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)

    def make() -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(TENSORS)]
        for param in params:
            param.grad = torch.randn_like(param)
        return lioncub.LionCub(params, lr=1e-3, compression=lioncub.SignVote())

    def take_steps(optimizer: torch.optim.Optimizer, count: int) -> float:
        seconds = []
        for _ in range(count):
            if workers > 1:
                dist.barrier()
            begin = perf_counter()
            optimizer.step()
            seconds.append(perf_counter() - begin)
        return median(seconds)

    optimizer = make()
    take_steps(optimizer, WARM_UP)
    before = process_time()
    times = {"wall": take_steps(optimizer, steps), "cpu": (process_time() - before) / steps}
    codes: set[Any] = set()
    # threads are profiled from their start on, so this optimizer brings its own
    threading.setprofile(lambda frame, event, _: codes.add(frame.f_code) if event == "call" else None)
    optimizer = make()
    take_steps(optimizer, WARM_UP)
    codes.clear()
    sys.setprofile(lambda frame, event, _: codes.add(frame.f_code) if event == "call" else None)
    optimizer.step()
    sys.setprofile(None)
    root = Path(lioncub.__file__).resolve().parents[1]
    ours = [(Path(code.co_filename).resolve(), code.co_qualname) for code in codes]
    folders = [root / name for name in ("lioncub", "kernels", "collectives")]
    names = {(str(path.relative_to(root)), name) for path, name in ours if any(map(path.is_relative_to, folders))}
    # comprehensions are frames, not functions
    names = {(path, name) for path, name in names if not name.endswith(("comp>", "genexpr>"))}
    if rank == 0:
        print(json.dumps({**times, "names": sorted(names)}))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
    else:
        main()
