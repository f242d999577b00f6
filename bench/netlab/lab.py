"""N hosts as network namespaces, joined by a bridge, every link shaped in both directions.

The bridge has its own namespace, so nothing of the machine's own network is touched. A host's link is a veth
pair; `tc` tbf shapes what leaves the host at its end and what comes to it at the bridge's. Several workers on one host
talk over its loopback, which is not shaped. Each worker keeps to one core: where the kernel may move them, three share
one for a tenth of a second while another has its own, and every exchange waits for the last. Namespaces are named
after the process that made them, so that labs can stand side by side, and what a killed one left behind is known.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

PREFIX = "lioncub-"
DEVICE = "eth0"
MASTER_PORT = 29500
_TOOLS = {
    "ip": "iproute2",
    "tc": "iproute2",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "taskset": "util-linux",
}
_NAMESPACES = Path("/run/netns")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_LARGEST_SEGMENT = 64 * 1024


class LabError(RuntimeError):
    """The lab cannot be built or does not work; one line with what to do."""


def parse_rate(text: str) -> int:
    """Parse "100mbit" to 100_000_000 bits per second. Raises ValueError for anything else than a number with a unit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    rate = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 10**6 <= rate <= 10**11:
        raise ValueError(f"rate: expected 1mbit to 100gbit, such as 100mbit or 1gbit, got {text!r}")
    return rate


def rate_name(rate: int) -> str:
    """Return "100 Mb/s" for 100_000_000."""
    return f"{rate / 1e9:g} Gb/s" if rate >= 10**9 else f"{rate / 1e6:g} Mb/s"


def shape_of(rate: int) -> tuple[int, int]:
    """Return burst and queue in bytes of the token bucket for a link of ``rate`` bits per second.

    The burst is 1 ms of traffic, what a late timer of a busy machine costs, and no less than one whole segment: where
    real cards cut segments into frames, the kernel would do it here, in processor time that the workers need. An idle
    link may send that much at once, 5 ms at 100 Mb/s. The queue holds 100 ms, so that nothing is lost where several
    hosts send to one.
    """
    per_second = rate // 8
    return max(per_second // 1000, _LARGEST_SEGMENT + 2048), max(per_second // 10, 4 * _LARGEST_SEGMENT)


def require_abilities() -> None:
    """Raise LabError unless this process is root on Linux and all tools are there."""
    if os.geteuid() != 0:
        raise LabError("the network lab makes network namespaces: run it as root")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        packages = " ".join(sorted({_TOOLS[tool] for tool in missing}))
        raise LabError(f"not found: {', '.join(missing)}; on Debian and Ubuntu: apt-get install {packages}")


def owner_tag(pid: int) -> str | None:
    """Return what namespaces of process ``pid`` are named after: its id and when it started; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # a zombie runs no lab any more
    return None if fields[0] == "Z" else f"{pid}.{fields[19]}"


def is_stale(namespace: str) -> bool:
    """Return whether ``namespace`` belongs to a lab whose process is gone."""
    if not namespace.startswith(PREFIX):
        return False
    tag = namespace[len(PREFIX) :].rpartition("-")[0]
    pid = tag.partition(".")[0]
    return pid.isdigit() and owner_tag(int(pid)) != tag


def address_of(host: int) -> str:
    """Return the IPv4 address of a host, the first of which is host 0."""
    return f"10.77.0.{host + 1}"


def shaping_command(namespace: str, device: str, rate: int, verb: str) -> list[str]:
    """Return the argv that shapes what leaves through ``device``; ``verb`` is add, or change for a live link."""
    burst, queue = shape_of(rate)
    tbf = ["tbf", "rate", f"{rate}bit", "burst", f"{burst}b", "limit", f"{queue}b"]
    return ["tc", "-n", namespace, "qdisc", verb, "dev", device, "root", *tbf]


def rate_commands(tag: str, hosts: int, rate: int, verb: str) -> list[list[str]]:
    """Return the argvs that shape all links in both directions."""
    commands = []
    for host in range(hosts):
        commands.append(shaping_command(f"{PREFIX}{tag}-h{host}", DEVICE, rate, verb))
        commands.append(shaping_command(f"{PREFIX}{tag}-bridge", f"port{host}", rate, verb))
    return commands


def build_commands(tag: str, hosts: int, rate: int) -> list[list[str]]:
    """Return the argvs that build a lab, in order."""
    bridge = f"{PREFIX}{tag}-bridge"
    commands = [
        ["ip", "netns", "add", bridge],
        ["ip", "-n", bridge, "link", "add", "bridge0", "type", "bridge", "mcast_snooping", "0"],
        # without an address, nothing but the hosts' traffic is counted
        ["ip", "-n", bridge, "link", "set", "bridge0", "addrgenmode", "none", "up"],
    ]
    for host in range(hosts):
        name, port = f"{PREFIX}{tag}-h{host}", f"port{host}"
        commands += [
            ["ip", "netns", "add", name],
            [*f"ip link add {DEVICE} netns {name} type veth peer name {port} netns {bridge}".split()],
            ["ip", "-n", bridge, "link", "set", port, "master", "bridge0", "addrgenmode", "none", "up"],
            ["ip", "-n", name, "link", "set", "lo", "up"],
            ["ip", "-n", name, "link", "set", DEVICE, "addrgenmode", "none", "up"],
            ["ip", "-n", name, "address", "add", f"{address_of(host)}/24", "dev", DEVICE],
        ]
    return commands + rate_commands(tag, hosts, rate, "add")


def launch_command(namespace: str, host_name: str, command: Sequence[str]) -> list[str]:
    """Return the argv that runs ``command`` on a host with its own host name; it is killed when its starter dies."""
    rename = 'echo "$0" > /proc/sys/kernel/hostname && exec "$@"'
    inside = ["unshare", "--uts", "setpriv", "--pdeathsig", "KILL", "sh", "-c", rename, host_name]
    return ["ip", "netns", "exec", namespace, *inside, *command]


def pinning_command(rank: int, cores: Sequence[int]) -> list[str]:
    """Return what before an argv keeps worker ``rank`` on its core; workers take the cores in turn."""
    return ["taskset", "--cpu-list", str(cores[rank % len(cores)])]


def worker_environment(rank: int, hosts: int, per_host: int) -> dict[str, str]:
    """Return the variables of worker ``rank`` for env:// and Gloo, as torchrun sets them."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(hosts * per_host),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GROUP_RANK": str(rank // per_host),
        "MASTER_ADDR": address_of(0),
        "MASTER_PORT": str(MASTER_PORT),
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def run(command: Sequence[str]) -> str:
    """Run ``command`` and return its standard output. Raises LabError with its own words where it fails."""
    # its own session, so that Ctrl-C does not reach it and a step of cleaning up is done or not
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise LabError(f"{' '.join(command)}: {words}")
    return done.stdout


def _remove(namespace: str) -> None:
    """End what runs in a namespace and delete it."""
    for pid in run(["ip", "netns", "pids", namespace]).split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue
    run(["ip", "netns", "delete", namespace])


def _remove_stale() -> None:
    """Remove the namespaces of labs whose process is gone, with what runs in them."""
    for name in sorted(path.name for path in _NAMESPACES.glob(f"{PREFIX}*")):
        if is_stale(name):
            _remove(name)


@contextmanager
def handling_signals(handler: Any) -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP, also where a shell had them ignored."""
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


class Lab:
    """A running lab; leaving its context removes it, with every process in it, however the context is left."""

    def __init__(self, hosts: int, rate: int, per_host: int = 1) -> None:
        self.hosts, self.per_host, self.rate = hosts, per_host, rate
        self._tag = str(owner_tag(os.getpid()))
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Lab:
        require_abilities()
        _remove_stale()
        try:
            for command in build_commands(self._tag, self.hosts, self.rate):
                run(command)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    @property
    def workers(self) -> int:
        """Return the number of workers."""
        return self.hosts * self.per_host

    def set_rate(self, rate: int) -> None:
        """Change the rate of all links, in bits per second, while connections stay up."""
        for command in rate_commands(self._tag, self.hosts, rate, "change"):
            run(command)
        self.rate = rate

    def start_worker(
        self, rank: int, command: Sequence[str], further: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start ``command`` as worker ``rank``, with ``further`` variables; it ends with the lab at the latest."""
        environment = worker_environment(rank, self.hosts, self.per_host) | dict(further or {})
        host, core = rank // self.per_host, pinning_command(rank, sorted(os.sched_getaffinity(0)))
        argv = launch_command(f"{PREFIX}{self._tag}-h{host}", f"host{host}", [*core, *command])
        process = subprocess.Popen(argv, env={**os.environ, **environment}, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def _close(self) -> None:
        with handling_signals(signal.SIG_IGN):
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            for process in self._processes:
                process.wait()
            self._processes.clear()
            own = sorted(path.name for path in _NAMESPACES.glob(f"{PREFIX}{self._tag}-*"))
            for name in own:
                _remove(name)
