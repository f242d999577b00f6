"""One worker process of a cell: holds one model and times steps of the methods in its requests.

Only public names of lioncub are used, so that the library of another checkout can be measured as well.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from demo.gpt import GPT, VOCABULARY
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lioncub
from lioncub.params import is_sharded, local_of

SEED = 1


@dataclass(frozen=True)
class Model:
    """A GPT and the windows that each worker trains it on."""

    width: int
    layers: int = 8
    heads: int = 8
    context: int = 64
    batch: int = 1

    def build(self) -> GPT:
        """Initialise it from torch's global generator."""
        return GPT(layers=self.layers, heads=self.heads, width=self.width, context=self.context)


MODELS = {"10M": Model(320), "25M": Model(512), "gpu": Model(512, context=256, batch=16)}
MODELS["tiny"] = Model(64, layers=1, heads=2)
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}
ALGORITHMS = ("auto", "all_gather", "reduce_scatter", "all_reduce", "hierarchical")
OTHERS = ("no_communication", "ddp_fp32_lion_pytorch", "ddp_fp32", "ddp_bf16", "ddp_powersgd")
ADAMW = ("ddp_fp32_adamw", "ddp_bf16_adamw")
# with fsdp_lioncub...: shards within a host, votes between hosts
SHARDED = ("fsdp_no_communication", "hsdp_fp32", "hsdp_bf16", "hsdp_fp32_adamw")
MEMORY = ("parameters", "gradients", "state", "rest")


class Votes(NamedTuple):
    """How LionCub exchanges votes: ``bucket_mb`` None is its default, as is the compression without ``signs``."""

    algorithm: str
    bucket_mb: float | None
    overlap: bool
    synced: bool
    signs: bool

    @property
    def settles(self) -> bool:
        """Whether the first steps try several ways of carrying votes."""
        return self.algorithm == "auto" or (self.overlap and self.bucket_mb is None)


def under_ddp(model: nn.Module, name: str) -> DistributedDataParallel:
    """Wrap the model in DDP with the communication hook that the method's name asks for."""
    is_power = name == "ddp_powersgd"
    # PowerSGD takes all gradients in one bucket
    bucket_mb = 4096 if is_power else None
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False, bucket_cap_mb=bucket_mb)
    if is_power:
        state = PowerSGDState(process_group=None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook)
    elif name.startswith("ddp_bf16"):
        # DDP refuses torch's own hook on Gloo by its name
        ddp.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return ddp


def shard(model: GPT, mesh: DeviceMesh, name: str) -> None:
    """Shard each block and the rest over the ranks of a host; methods of HSDP average gradients over hosts, too."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if name.startswith("hsdp_bf16") else None)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh if name.startswith("hsdp") else mesh["shard"], mp_policy=policy)


def lion_cub(params: Any, votes: Votes, group: dist.ProcessGroup | None) -> torch.optim.Optimizer:
    """Make a LionCub, by the arguments that the measured version has."""
    transport: dict[str, Any] = {"algorithm": votes.algorithm}
    transport |= {} if votes.bucket_mb is None else {"bucket_mb": votes.bucket_mb}
    if "comm" in inspect.signature(lioncub.LionCub).parameters:
        transport = {"comm": lioncub.Comm(**transport)}
    if votes.synced:
        transport["momentum_sync"] = lioncub.MomentumSync(every=4, dtype="int8")
    if votes.signs:
        transport["compression"] = lioncub.SignVote()
    return lioncub.LionCub(params, process_group=group, overlap=votes.overlap, **transport, **OPTIONS)


def peer(params: Any, method: str) -> torch.optim.Optimizer:
    """Make the optimizer of a method without votes."""
    if method.endswith("adamw"):
        return torch.optim.AdamW(params, fused=True, **OPTIONS)
    if method.endswith("lion_pytorch"):
        import lion_pytorch  # type: ignore[import-untyped]

        return lion_pytorch.Lion(params, **OPTIONS)
    return lioncub.Lion(params, **OPTIONS)


class Worker:
    """Requests of a cell. All ranks call them together; answers go to JSON."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
        torch.manual_seed(SEED)
        self._model, self._device = MODELS[model], torch.device(device)
        # all methods train the same memory: what is timed does not depend on the values
        self._initial = self._model.build().to(self._device).state_dict()
        own = torch.Generator().manual_seed(SEED + 1 + dist.get_rank())
        shape = (self._model.batch, self._model.context + 1)
        self._windows = torch.randint(VOCABULARY, shape, generator=own).to(self._device)

    def facts(self) -> dict[str, Any]:
        """Return where the library comes from and how many parameters the model has."""
        parameters = sum(tensor.numel() for tensor in self._initial.values())
        return {"library": str(Path(lioncub.__file__).resolve().parent), "parameters": parameters}

    def measure(self, method: str, untimed: int, steps: int, seconds: float) -> dict[str, Any]:
        """Time up to ``steps`` steps of ``method``, fewer where they would take more than ``seconds``, at least one.

        The bytes per step are those of the network interface, headers and acknowledgements included; those that
        LionCub states are beside them, and the memory at the end of a step.
        """
        gc.collect()
        others = _bytes_of(_live_tensors())
        model, optimizer = self._build(method)
        step = self._step_of(model, optimizer)
        slowest = torch.zeros(1)
        for _ in range(untimed):
            dist.barrier()
            slowest.fill_(self._seconds(step))
        # all ranks take as many steps
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        steps = max(1, min(steps, int(seconds / slowest.item())))
        dist.barrier()
        sent, times = _sent_bytes(), []
        for _ in range(steps):
            dist.barrier()
            times.append(self._seconds(step))
        dist.barrier()
        answer = {"seconds": times, "sent": (_sent_bytes() - sent) / steps, "memory": memory(model, optimizer, others)}
        if isinstance(optimizer, lioncub.LionCub):
            answer["stated"] = optimizer.stats().bytes_sent_per_step
        del step, model, optimizer
        gc.collect()
        return answer

    def carry(self, n_bytes: int) -> dict[str, Any]:
        """Time sending so many bytes to the next rank while as many come from the one before."""
        rank, size = dist.get_rank(), dist.get_world_size()
        data = [torch.zeros(n_bytes, dtype=torch.uint8) for _ in range(2)]
        dist.barrier()
        begin = perf_counter()
        pending = [dist.isend(data[0], (rank + 1) % size), dist.irecv(data[1], (rank - 1) % size)]
        for work in pending:
            assert work is not None
            work.wait()
        return {"seconds": perf_counter() - begin}

    def _seconds(self, step: Callable[[], None]) -> float:
        begin = perf_counter()
        step()
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - begin

    @cached_property
    def _mesh(self) -> DeviceMesh:
        """All ranks, a row for each host."""
        per_host = int(os.environ["LOCAL_WORLD_SIZE"])
        sizes = (dist.get_world_size() // per_host, per_host)
        return init_device_mesh(self._device.type, sizes, mesh_dim_names=("replicate", "shard"))

    def _step_of(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Return one training step."""

        def step() -> None:
            optimizer.zero_grad()
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                loss = model(self._windows)
            loss.backward()
            optimizer.step()

        return step

    def _build(self, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return module and optimizer with new parameters in the shared memory, so that hooks end with them.

        Shards are copies of their part of it.
        """
        with torch.device("meta"):
            model = self._model.build()
        model.load_state_dict(self._initial, assign=True)
        votes, group = parse_method(name), None
        if name.startswith(("fsdp", "hsdp")):
            shard(model, self._mesh, name)
            group = self._mesh.get_group("replicate")
        if votes is not None:
            return model, lion_cub(model.named_parameters(), votes, group)
        optimizer = peer(model.parameters(), name)
        return (under_ddp(model, name) if name.startswith("ddp") else model), optimizer


def parse_method(name: str) -> Votes | None:
    """Parse "lioncub_reduce_scatter_overlap:0.25" to algorithm, MiB of a bucket and overlap; "fsdp_" may precede.

    Returns None for a method without votes. Raises ValueError for a name that does not exist.
    """
    peers = (*OTHERS, *ADAMW, *SHARDED)
    if name in peers:
        return None
    base, _, bucket_mb = name.removeprefix("fsdp_").partition(":")
    base, synced = base.removesuffix("_synced"), base.endswith("_synced")
    base, signs = base.removesuffix("_signs"), base.endswith("_signs")
    base, overlap = base.removesuffix("_overlap"), base.endswith("_overlap")
    algorithm = base.removeprefix("lioncub").removeprefix("_") or "auto"
    if not base.startswith("lioncub") or algorithm not in ALGORITHMS:
        raise ValueError(
            f"method: expected {', '.join(peers)} or [fsdp_]lioncub[_ALGORITHM][_overlap][_signs][_synced][:BUCKET_MB] "
            f"with one of {', '.join(ALGORITHMS)}, got {name!r}"
        )
    return Votes(algorithm, float(bucket_mb) if bucket_mb else None, overlap, synced, signs)


def memory(model: nn.Module, optimizer: torch.optim.Optimizer, others: dict[int, int]) -> dict[str, int]:
    """Return the elements of this rank's parameters, and the bytes of the tensors that live between steps, by kind.

    Every storage is counted once and whole. "rest" is what the garbage collector finds besides them and ``others``: of
    LionCub its codes and messages. Memory that is no tensor's, as Gloo's, is not counted.
    """
    params = [local_of(param) for param in model.parameters()]
    gradients = [local_of(param.grad) for param in model.parameters() if param.grad is not None]
    entries = [value for state in optimizer.state.values() for value in state.values()]
    state = [local_of(value) for value in entries if isinstance(value, Tensor)]
    kinds = [_bytes_of(tensors) for tensors in (params, gradients, state, _live_tensors())]
    found = {"numel": sum(param.numel() for param in params)}
    counted = {place: size for place, size in others.items() if place not in kinds[0]}
    for kind, sizes in zip(MEMORY, kinds, strict=True):
        found[kind] = sum(size for place, size in sizes.items() if place not in counted)
        counted |= sizes
    return found


def _live_tensors() -> Iterable[Tensor]:
    # isinstance would ask deprecated objects of torch for their class, which warns
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return [tensor for tensor in found if not is_sharded(tensor) and tensor.device.type != "meta"]


def _bytes_of(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of tensors' storages, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _sent_bytes() -> float:
    """Count the bytes that left by the interface, of which all workers on this host share the loopback."""
    device = os.environ["GLOO_SOCKET_IFNAME"]
    sent = int((Path("/sys/class/net") / device / "statistics" / "tx_bytes").read_text())
    return sent / dist.get_world_size() if device == "lo" else sent


def serve(channel_number: int, model: str, device: str) -> None:
    """Answer requests until the other end closes. Ends the process."""
    channel = Connection(channel_number)
    try:
        worker = Worker(model, device)
        while True:
            try:
                request = channel.recv()
            except EOFError:
                break
            channel.send(getattr(worker, request.pop("do"))(**request))
    except Exception:
        print(f"worker {os.environ['RANK']} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # sys.exit would wait for threads of a group whose peers may hang
        os._exit(1)
    os._exit(0)
