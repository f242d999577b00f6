"""Replicas that train under torchft's manager in real processes, which a test kills and starts again."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from gloo_workers import _CONTEXT

SECONDS = 60.0
# steps that all replicas take together before they end
TOGETHER = 6
# the step in which a rank ends
KILLED_IN = 4
# what must not be collected
_kept: list[Any] = []


@dataclass(frozen=True)
class Step:
    """What a rank reports of a step that it tried: of which number, whether taken, by how many, parameters after it."""

    number: int
    is_taken: bool
    workers: int
    bits: str
    at: float


@dataclass(frozen=True)
class Place:
    """Where a process belongs: a rank of a replica of ``size`` ranks; ``ends`` tells how it is killed."""

    replica: int
    rank: int
    size: int
    replicas: int
    lighthouse: str
    folder: str
    ends: str | None


@dataclass
class Rank:
    """One process, from its start to its end."""

    replica: int
    place: int
    process: Any
    pipe: multiprocessing.connection.Connection
    started: float
    steps: list[Step] = field(default_factory=list)
    said: str = ""
    ended: float = 0.0

    @property
    def taken(self) -> list[Step]:
        return [step for step in self.steps if step.is_taken]

    def read(self) -> None:
        """Take what the process has reported, until it has ended."""
        try:
            while self.pipe.poll(0):
                found = self.pipe.recv()
                if isinstance(found, Step):
                    self.steps.append(found)
                else:
                    self.said = found
        except (EOFError, ConnectionResetError):
            self.ended = self.ended or time.monotonic()


def run(
    replicas: int,
    *,
    size: int = 1,
    ends: str,
    **options: Any,
) -> list[Rank]:
    """Train ``replicas`` of ``size`` ranks until all have taken steps together, and return all ranks there were.

    ``ends`` tells how the last rank of the last replica ends in step `KILLED_IN`; its replica is then started again.
    """
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=max(replicas - 1, 1),
        join_timeout_ms=3000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=1000,
    )
    everyone: list[Rank] = []
    # all that a run starts with are in the first quorum
    ready = _CONTEXT.Barrier(replicas * size)
    deadline = time.monotonic() + 60

    def start(replica: int, *, is_again: bool) -> list[Rank]:
        folder = tempfile.mkdtemp()
        found = []
        for rank in range(size):
            is_killed = (replica, rank, is_again) == (replicas - 1, size - 1, False)
            place = Place(replica, rank, size, replicas, lighthouse.address(), folder, ends if is_killed else None)
            found.append(_start(place, options, None if is_again else ready))
        return found

    running = {replica: start(replica, is_again=False) for replica in range(replicas)}
    try:
        while not all(rank.said for ranks in running.values() for rank in ranks):
            assert time.monotonic() < deadline, "some replica hangs"
            time.sleep(0.01)
            for replica, ranks in running.items():
                for rank in ranks:
                    rank.read()
                if any(rank.ended and not rank.said for rank in ranks):
                    # as torchrun does
                    for rank in ranks:
                        rank.process.kill()
                        rank.process.join()
                        rank.read()
                        rank.ended = rank.ended or time.monotonic()
                    # not before the others go on without it
                    if all(time.monotonic() > rank.ended + 2.0 for rank in ranks):
                        everyone += ranks
                        running[replica] = start(replica, is_again=True)
    finally:
        for rank in [rank for ranks in running.values() for rank in ranks]:
            rank.process.kill()
            rank.process.join()
        lighthouse.shutdown()
    return everyone + [rank for ranks in running.values() for rank in ranks]


def _start(place: Place, options: dict[str, Any], ready: Any) -> Rank:
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_main, args=(theirs, place, options, ready), daemon=True)
    started = time.monotonic()
    process.start()
    theirs.close()
    return Rank(place.replica, place.rank, process, mine, started)


def _main(pipe: Any, place: Place, options: dict[str, Any], ready: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # those of the library; torchft's loggers warn of deprecated methods
    warnings.simplefilter("error", UserWarning)
    # torch's own, of what it receives
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    try:
        _train(pipe, place, options, ready)
        pipe.send("done")
    except BaseException:
        pipe.send(traceback.format_exc())
    # others may still read its last messages
    time.sleep(SECONDS)


def _train(pipe: Any, place: Place, options: dict[str, Any], ready: Any) -> None:
    import torch

    from lioncub.integrations.torchft import FaultTolerant

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    manager = _manager(place, use_async_quorum=options.pop("use_async_quorum", True))
    backward, opt = (_whole if place.size == 1 else _sharded)(place.replica, options)
    params = [param for group in opt.param_groups for param in group["params"]]
    wrapped = FaultTolerant(opt, manager)
    schedule = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: 1.0 / (1 + 0.01 * step))
    manager.register_state_dict_fn("schedule", schedule.load_state_dict, schedule.state_dict)
    if ready is not None:
        ready.wait(SECONDS)
    together, is_armed = 0, False
    while together < TOGETHER or manager.current_step() <= KILLED_IN + TOGETHER:
        if place.ends is not None and manager.current_step() == KILLED_IN and not is_armed:
            is_armed = True
            _arm(place.ends, wrapped)
        wrapped.zero_grad()
        backward(manager.current_step())
        wrapped.step()
        number = manager.current_step() - wrapped.committed
        workers = manager._pg.size() if wrapped.committed else 0
        if wrapped.committed:
            schedule.step()
        bits = hashlib.sha256()
        for param in params:
            local = getattr(param, "_local_tensor", param).detach()
            bits.update(local.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        pipe.send(Step(number, wrapped.committed, workers, bits.hexdigest(), time.monotonic()))
        together = together + 1 if workers == place.replicas else 0
        time.sleep(0.02)


def _manager(place: Place, *, use_async_quorum: bool) -> Any:
    """Connect the ranks of a replica, and make the manager of this one."""
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo

    timeout = timedelta(seconds=SECONDS)
    ports = [None]
    if place.rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        _kept.append(store)
        ports = [store.port]
    if place.size > 1:
        where = {"init_method": f"file://{place.folder}/world", "rank": place.rank, "world_size": place.size}
        dist.init_process_group("gloo", timeout=timeout, **where)
        dist.broadcast_object_list(ports, src=0)
    return Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=max(place.replicas - 1, 1),
        replica_id=f"replica{place.replica}",
        store_addr="localhost",
        store_port=ports[0],
        rank=place.rank,
        world_size=place.size,
        lighthouse_addr=place.lighthouse,
        timeout=timeout,
        quorum_timeout=timeout,
        use_async_quorum=use_async_quorum,
    )


def _whole(replica: int, options: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    import nets
    from optimizers import LionCub

    from lioncub import Quantized

    net = nets.Net(seed=replica)
    if "share_scales_every" in options:
        options["compression"] = Quantized(bits=4, norm="linf", share_scales_every=options.pop("share_scales_every"))
    opt = LionCub(nets.groups_of(net), lr=1e-2, bucket_mb=2e-5, **options)
    return lambda step: net(*nets.batch_of(100 * step + replica), use_all=replica != 1).backward(), opt


def _sharded(replica: int, options: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    import shards
    import torch.distributed as dist
    from optimizers import LionCub
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    net = shards.fsdp(shards.Net(), mesh["shard"])
    group = mesh.get_group("replicate")
    opt = LionCub(list(net.named_parameters()), lr=1e-2, process_group=group, **options)
    return lambda step: net(shards.batch_of(step, replica)).square().mean().backward(), opt


def _arm(how: str, wrapped: Any) -> None:
    """Make this process end in the coming step, or lose a rank where others do not."""
    from lioncub.collectives import transport
    from lioncub.integrations import torchft as integration

    def die(*_: Any, **__: Any) -> None:
        # what was sent has left
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    opt = wrapped.optim
    if how == "between steps":
        die()
    elif how == "after its votes left":
        opt._engine._exchange_control = die
    elif how == "after answering one peer":
        exchange_control, send = opt._engine._exchange_control, transport._PointToPoint._send

        def exchange(*arguments: Any) -> Any:
            def send_one(self: Any, rows: Any, distance: int) -> Any:
                found = send(self, rows, distance)
                die()
                return found

            transport._PointToPoint._send = send_one
            return exchange_control(*arguments)

        # the votes themselves have left, to all
        opt._engine._exchange_control = exchange
    elif how == "after the last message":
        confirm = wrapped._confirm

        def lose() -> None:
            confirm()
            del wrapped._confirm
            raise integration.PeerLostError("a rank of the process group was lost: for a test")

        wrapped._confirm = lose
    else:
        raise AssertionError(how)
