"""Replicas that train under torchft's manager in real processes, which a test kills and starts again."""

from __future__ import annotations

import hashlib
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


@dataclass(frozen=True)
class Step:
    """What a rank reports of a step that it tried: of which number, whether taken, by how many, parameters after it."""

    number: int
    is_taken: bool
    workers: int
    bits: str
    at: float


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
    deaths: dict[int, tuple[str, int]] | None = None,
    **options: Any,
) -> list[Rank]:
    """Train ``replicas`` of ``size`` ranks until all have taken steps together, and return all ranks there were.

    ``deaths`` tells how a replica's last rank ends and in which step; all its ranks are then killed and started again.
    """
    import logging

    from torchft._torchft import LighthouseServer

    logging.getLogger("torchft").setLevel(logging.ERROR)
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=3000, quorum_tick_ms=20, heartbeat_timeout_ms=500
    )
    deaths = dict(deaths or {})
    everyone: list[Rank] = []
    deadline = time.monotonic() + 240

    def start(replica: int, *, is_again: bool) -> list[Rank]:
        folder = tempfile.mkdtemp()
        death = None if is_again else deaths.get(replica)
        return [
            _start(
                replica,
                rank,
                size,
                replicas,
                lighthouse.address(),
                folder,
                death if rank == size - 1 else None,
                options,
            )
            for rank in range(size)
        ]

    running = {replica: start(replica, is_again=False) for replica in range(replicas)}
    try:
        while any(running.values()):
            assert time.monotonic() < deadline, "some replica hangs"
            time.sleep(0.01)
            for replica, ranks in running.items():
                for rank in ranks:
                    rank.read()
                if ranks and all(rank.ended for rank in ranks):
                    everyone += ranks
                    running[replica] = []
                elif any(rank.ended and not rank.said for rank in ranks):
                    # as torchrun does
                    for rank in ranks:
                        rank.process.kill()
                        rank.process.join()
                        rank.read()
                        rank.ended = rank.ended or time.monotonic()
                    everyone += ranks
                    running[replica] = start(replica, is_again=True)
    finally:
        for ranks in running.values():
            for rank in ranks:
                rank.process.kill()
        lighthouse.shutdown()
    return everyone


def _start(
    replica: int, rank: int, size: int, replicas: int, lighthouse: str, folder: str, death: Any, options: dict[str, Any]
) -> Rank:
    mine, theirs = _CONTEXT.Pipe(duplex=False)
    arguments = (theirs, replica, rank, size, replicas, lighthouse, folder, death, options)
    process = _CONTEXT.Process(target=_main, args=arguments, daemon=True)
    started = time.monotonic()
    process.start()
    theirs.close()
    return Rank(replica, rank, process, mine, started)


def _main(pipe: Any, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("DBG"):
        import faulthandler

        faulthandler.dump_traceback_later(25)
    # those of the library; torchft's loggers warn of deprecated methods
    warnings.simplefilter("error", UserWarning)
    # torch's own, of what it receives
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    try:
        _train(pipe, *arguments)
        pipe.send("done")
    except BaseException:
        pipe.send(traceback.format_exc())
    pipe.close()
    # threads of servers would go on
    os._exit(0)


def _train(
    pipe: Any,
    replica: int,
    rank: int,
    size: int,
    replicas: int,
    lighthouse: str,
    folder: str,
    death: tuple[str, int] | None,
    options: dict[str, Any],
) -> None:
    import logging

    import torch
    import torch.distributed as dist
    from torchft import Manager, ProcessGroupGloo

    from lioncub.integrations.torchft import FaultTolerant

    for name in ("torchft", "torchft.manager", "torchft.process_group"):
        logging.getLogger(name).setLevel(logging.INFO if os.environ.get("DBG") else logging.CRITICAL)
    torch.set_num_threads(1)
    timeout = timedelta(seconds=SECONDS)
    port, store = None, None
    if rank == 0:
        store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        port = store.port
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/world", rank=rank, world_size=size, timeout=timeout
        )
        ports = [port]
        dist.broadcast_object_list(ports, src=0)
        port = ports[0]
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timeout),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=1,
        replica_id=f"replica{replica}",
        store_addr="localhost",
        store_port=port,
        rank=rank,
        world_size=size,
        lighthouse_addr=lighthouse,
        timeout=timeout,
        quorum_timeout=timeout,
        use_async_quorum=options.pop("use_async_quorum", True),
    )
    backward, opt = (_whole if size == 1 else _sharded)(replica, options)
    params = [param for group in opt.param_groups for param in group["params"]]
    wrapped = FaultTolerant(opt, manager)
    schedule = torch.optim.lr_scheduler.LambdaLR(wrapped, lambda step: 1.0 / (1 + 0.01 * step))
    manager.register_state_dict_fn("schedule", schedule.load_state_dict, schedule.state_dict)
    together = 0
    while together < TOGETHER:
        number = manager.current_step()
        if death is not None and death[1] == number:
            _arm(death[0], wrapped)
        if number == 0:
            # so that all of a test are in the first quorum
            time.sleep(0.01)
        wrapped.zero_grad()
        backward(number)
        wrapped.step()
        if wrapped.committed:
            schedule.step()
        bits = hashlib.sha256()
        for param in params:
            local = getattr(param, "_local_tensor", param).detach()
            bits.update(local.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        number = manager.current_step() - wrapped.committed
        workers = manager._pg.size() if wrapped.committed else 0
        pipe.send(Step(number, wrapped.committed, workers, bits.hexdigest(), time.monotonic()))
        together = together + 1 if workers == replicas else 0
        if options.get("until") is not None and together and number < options["until"]:
            together = 0


def _whole(replica: int, options: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    import nets
    from optimizers import LionCub

    net = nets.Net(seed=replica)
    opt = LionCub(nets.groups_of(net), lr=1e-2, bucket_mb=2e-5, **_options(options))
    return lambda step: net(*nets.batch_of(100 * step + replica), use_all=replica != 1).backward(), opt


def _sharded(replica: int, options: dict[str, Any]) -> tuple[Callable[[int], None], Any]:
    import shards
    import torch.distributed as dist
    from optimizers import LionCub
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    net = shards.fsdp(shards.Net(), mesh["shard"])
    opt = LionCub(list(net.named_parameters()), lr=1e-2, process_group=mesh.get_group("replicate"), **_options(options))
    return lambda step: net(shards.batch_of(step, replica)).square().mean().backward(), opt


def _options(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "until"}


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
