"""iperf3 on every link in both directions, before anything is measured on it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from netlab.lab import Lab, LabError, address_of
from netlab.rates import rate_name

PORT = 5201
SECONDS = 1
# below this rate, every machine must deliver it; above, it gives what it can
GUARANTEED_RATE = 10**9
LOWEST, HIGHEST = 0.9, 1.02
ATTEMPTS = 3


@dataclass(frozen=True)
class LinkSpeed:
    """What iperf3 carried from one host to the next: payload, in bits per second."""

    sender: int
    receiver: int
    rate: int
    bits_per_second: float

    @property
    def share(self) -> float:
        """Of the link's rate; frames of 1500 bytes leave 0.957 for payload."""
        return self.bits_per_second / self.rate


def check_links(lab: Lab) -> list[LinkSpeed]:
    """Send from every host to the next: that is every link's outward and inward direction, each once.

    Raises LabError where a link of up to 1 Gb/s gives less than 0.9 or more than 1.02 of its rate, or one above that
    gives more than 1.02.
    """
    speeds = []
    for sender in range(lab.hosts):
        receiver = (sender + 1) % lab.hosts
        if receiver != sender:
            speeds.append(_best_of(lab, sender, receiver))
            judge(speeds[-1])
    return speeds


def _best_of(lab: Lab, sender: int, receiver: int) -> LinkSpeed:
    """The first good measurement of a link, or the fastest: something else may be busy for a moment, no link is."""
    speeds: list[LinkSpeed] = []
    while len(speeds) < ATTEMPTS and not any(is_good(speed) for speed in speeds):
        speeds.append(LinkSpeed(sender, receiver, lab.rate, _measure(lab, sender, receiver)))
    return max(speeds, key=lambda speed: (is_good(speed), speed.share))


def is_good(speed: LinkSpeed) -> bool:
    """Whether a link does what was asked for."""
    return (LOWEST if speed.rate <= GUARANTEED_RATE else 0) <= speed.share <= HIGHEST


def judge(speed: LinkSpeed) -> None:
    """Raise LabError where a link's speed is not what was asked for."""
    if not is_good(speed):
        raise LabError(
            f"link from host {speed.sender} to host {speed.receiver}: expected {LOWEST} to {HIGHEST} of "
            f"{rate_name(speed.rate)}, got {speed.share:.3f} by iperf3; is the machine busy with something else?"
        )


def parse_iperf(text: str) -> float:
    """Bits per second that arrived, from iperf3's JSON. Raises LabError with iperf3's own words where it failed."""
    try:
        answer: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise LabError(f"iperf3: expected JSON, got {text[:200]!r}") from error
    if "error" in answer:
        raise LabError(f"iperf3: {answer['error']}")
    return float(answer["end"]["sum_received"]["bits_per_second"])


def _measure(lab: Lab, sender: int, receiver: int) -> float:
    serve = ["iperf3", "--server", "--one-off", "--port", str(PORT), "--forceflush"]
    server = lab.start(receiver, serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    # it says so once it listens
    words = []
    for line in server.stdout:
        words.append(line.strip())
        if "listening" in line:
            break
    else:
        raise LabError(f"iperf3 server on host {receiver}: {' '.join(words)}")
    # the first second, in which TCP finds the rate, is left out
    ask = ["iperf3", "--client", address_of(receiver), "--port", str(PORT), "--time", str(SECONDS), "--omit", "1"]
    client = lab.start(sender, [*ask, "--json"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    answer, _ = client.communicate(timeout=60)
    server.communicate(timeout=60)
    return parse_iperf(answer)
