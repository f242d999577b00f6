"""The network lab without a network: what it would run, what workers do, and what it makes of the findings."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from gloo_workers import results_of
from netlab import lab as lab_module
from netlab.cells import Session, Turns, table_of
from netlab.cli import main
from netlab.crew import Crew, WorkerFailedError
from netlab.lab import (
    DEVICE,
    LabError,
    address_of,
    build_commands,
    is_stale,
    launch_command,
    owner_tag,
    parse_rate,
    pinning_command,
    rate_commands,
    rate_name,
    require_abilities,
    shape_of,
    worker_environment,
)
from netlab.report import write_report, write_shards_report
from netlab.worker import ADAMW, ALGORITHMS, MEMORY, OTHERS, SHARDED, Worker, parse_method
from reporting.records import RecordsError, run_record

RATES = (10**8, 10**9, 10**10)


@pytest.mark.parametrize(("text", "rate"), [("100mbit", 10**8), ("1gbit", 10**9), ("2.5gbit", 25 * 10**8)])
def test_rates_are_parsed(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "100", "100 mbit", "fast", "1kbit", "-1gbit", "1000gbit"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="rate: expected 1mbit to 100gbit"):
        parse_rate(text)


def test_rates_have_names() -> None:
    assert [rate_name(rate) for rate in (*RATES, 2_500_000_000)] == ["100 Mb/s", "1 Gb/s", "10 Gb/s", "2.5 Gb/s"]


@pytest.mark.parametrize("rate", RATES)
def test_a_shape_passes_a_frame_and_queues_a_tenth_of_a_second(rate: int) -> None:
    burst, queue = shape_of(rate)
    assert burst >= 10 * 1514
    # a burst is sent faster than the rate: it must stay small beside the messages that are timed
    assert burst <= max(rate // 8 // 500, 2 * 64 * 1024)
    assert queue >= rate // 8 // 10


def test_a_lab_is_built_in_namespaces_of_its_own() -> None:
    commands = build_commands("7.99", 2, 10**8)
    namespaces = [command[3] for command in commands if command[:3] == ["ip", "netns", "add"]]
    assert namespaces == ["lioncub-7.99-bridge", "lioncub-7.99-h0", "lioncub-7.99-h1"]
    for command in commands:
        named = [part for part in command if part in namespaces]
        assert named, f"{command} touches the machine's own network"
    pairs = [command for command in commands if "veth" in command]
    assert [pair[5] for pair in pairs] == namespaces[1:]
    assert {pair[-1] for pair in pairs} == {namespaces[0]}


def test_both_directions_of_every_link_are_shaped() -> None:
    commands = rate_commands("7.99", 2, 10**9, "change")
    ends = [(command[2], command[6]) for command in commands]
    assert ends == [
        ("lioncub-7.99-h0", DEVICE),
        ("lioncub-7.99-bridge", "port0"),
        ("lioncub-7.99-h1", DEVICE),
        ("lioncub-7.99-bridge", "port1"),
    ]
    for command in commands:
        assert command[3:5] == ["qdisc", "change"]
        assert command[command.index("rate") + 1] == "1000000000bit"
    assert build_commands("7.99", 2, 10**9)[-4:] == rate_commands("7.99", 2, 10**9, "add")


def test_a_command_runs_under_its_own_host_name_and_dies_with_its_starter() -> None:
    command = launch_command("lioncub-7.99-h1", "host1", ["python", "a b.py"])
    assert command[:4] == ["ip", "netns", "exec", "lioncub-7.99-h1"]
    assert command[4:9] == ["unshare", "--uts", "setpriv", "--pdeathsig", "KILL"]
    assert command[-3:] == ["host1", "python", "a b.py"]


def test_workers_take_the_cores_by_turns() -> None:
    assert [pinning_command(rank, [3, 5])[-1] for rank in range(5)] == ["3", "5", "3", "5", "3"]
    assert pinning_command(0, [3])[:2] == ["taskset", "--cpu-list"]


def test_workers_find_their_place() -> None:
    assert worker_environment(5, hosts=2, per_host=4) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
        "MASTER_ADDR": address_of(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def test_only_namespaces_of_dead_labs_are_stale() -> None:
    own = owner_tag(os.getpid())
    assert own is not None
    assert not is_stale(f"lioncub-{own}-h0")
    assert not is_stale("somebody-1.1-h0")
    assert not is_stale("lioncub-notes")
    # the same process id, but of a process that started at another time
    assert is_stale(f"lioncub-{os.getpid()}.1-h0")
    assert is_stale(f"lioncub-{2**22 + 1}.1-bridge")


@pytest.mark.parametrize("command", [["matrix"], ["cells"], ["shards"]])
def test_it_needs_root_and_says_so(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(command) == 1
    assert capsys.readouterr().err == "netlab: the network lab makes network namespaces: run it as root\n"


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module.shutil, "which", lambda tool: None if tool == "tc" else f"/bin/{tool}")
    with pytest.raises(LabError, match=r"not found: tc; .*apt-get install iproute2$"):
        require_abilities()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cells", "--rates", "slow"], "rate: expected 1mbit to 100gbit, such as 100mbit or 1gbit"),
        (["cells", "--workers", "1"], "workers: expected 2 or more, on hosts of 1, got 1"),
        (["cells", "--workers", "6", "--per-host", "4"], "workers: expected 2 or more, on hosts of 4, got 6"),
        (["cells", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["matrix", "--report", "--out", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("netlab: ")
    assert re.search(words, error), error


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("lioncub", ("auto", None, False, False, False)),
        ("lioncub_overlap_signs", ("auto", None, True, False, True)),
        ("lioncub_reduce_scatter_overlap:0.25", ("reduce_scatter", 0.25, True, False, False)),
        ("lioncub_overlap_synced", ("auto", None, True, True, False)),
        *((f"lioncub_{name}", (name, None, False, False, False)) for name in ALGORITHMS),
        ("fsdp_lioncub_overlap", ("auto", None, True, False, False)),
        *((name, None) for name in (*OTHERS, *ADAMW, *SHARDED)),
    ],
)
def test_methods_have_names(name: str, parsed: object) -> None:
    assert parse_method(name) == parsed


@pytest.mark.parametrize("name", ["", "magic", "lioncub_magic", "ddp_fp32_overlap", "hsdp_lioncub"])
def test_methods_that_do_not_exist_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"method: expected no_communication, .* or \[fsdp_\]lioncub"):
        parse_method(name)


def test_plain_ddp_takes_few_untimed_steps_and_what_settles_many() -> None:
    turns = Turns(untimed=3)
    expected = {"ddp_powersgd": 3, "lioncub_all_gather": 3, "lioncub_all_gather_overlap:1": 3}
    expected |= dict.fromkeys(("ddp_fp32", "hsdp_bf16"), 2)
    expected |= dict.fromkeys(("lioncub", "lioncub_overlap:1", "lioncub_all_gather_overlap", "fsdp_lioncub"), 45)
    assert {name: turns.untimed_of(name) for name in expected} == expected
    with pytest.raises(ValueError, match="2 or more"):
        Session(1)


def measured_methods(rank: int, world_size: int) -> list[dict[str, Any]]:
    import torch.distributed as dist
    from netlab import worker

    # the group is there already, and so is no interface of the lab's
    dist.init_process_group = lambda *arguments, **options: None  # type: ignore[assignment]
    worker._sent_bytes = lambda: 7  # type: ignore[assignment]
    found = Worker("tiny")
    assert found.carry(1000)["seconds"] > 0
    methods = ["no_communication", "ddp_fp32_lion_pytorch", "ddp_bf16", "ddp_powersgd", "lioncub", "lioncub_overlap"]
    return [found.facts(), *(found.measure(name, untimed=2, steps=3, seconds=60.0) for name in methods)]


def test_workers_measure_every_method() -> None:
    for facts, *answers in results_of(measured_methods, 2):
        assert facts["parameters"] == (256 + 64 + 1) * 64 + 12 * 64**2 + 2 * 64
        assert all(len(answer["seconds"]) == 3 and min(answer["seconds"]) > 0 for answer in answers)
        assert all(answer["sent"] == 0 for answer in answers)


def measured_shards(rank: int, world_size: int) -> list[dict[str, Any]]:
    import torch.distributed as dist
    from netlab import worker

    dist.init_process_group = lambda *arguments, **options: None  # type: ignore[assignment]
    worker._sent_bytes = lambda: 7  # type: ignore[assignment]
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found, methods = Worker("tiny"), [*SHARDED, "fsdp_lioncub", "fsdp_lioncub_overlap"]
    return [found.measure(name, untimed=2, steps=2, seconds=60.0) for name in methods]


def test_workers_measure_sharded_methods_and_their_memory() -> None:
    numel = ((256 + 64 + 1) * 64 + 12 * 64**2 + 2 * 64) // 2
    for answers in results_of(measured_shards, 4):
        assert ["stated" in answer for answer in answers] == [False] * 4 + [True] * 2
        for answer in answers:
            sizes = [answer["memory"][kind] for kind in ("numel", *MEMORY)]
            assert sizes[:3] == [numel, 4 * numel, 4 * numel]
        plain, _, _, adamw, *ours = [[answer["memory"][kind] for kind in MEMORY[2:]] for answer in answers]
        # alignment of the loss and of counters
        assert plain[0] == 4 * numel
        assert plain[1] < 100
        assert 8 * numel < adamw[0] < 8 * numel + 100
        # every code once, in a message at least once
        assert all(numel / 8 <= sum(sizes) - 4 * numel < numel / 2 for sizes in ours)


class Processes:
    """A lab of one worker that runs a script instead."""

    workers = 1

    def __init__(self, script: str) -> None:
        self.script = script

    def start_worker(self, rank: int, command: list[str], environment: object, **options: Any) -> Any:
        import subprocess

        return subprocess.Popen([sys.executable, "-c", self.script, command[3]], **options)


ANSWER = "import os, sys; from multiprocessing import connection as m; c = m.Connection(int(sys.argv[1])); c.recv(); "


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise RuntimeError('no')", r"(?s)worker 0 ended with exit code 1; the end of .*RuntimeError: no"),
        ("os.kill(os.getpid(), 9)", r"worker 0 was killed by SIGKILL \(out of memory\?\)"),
    ],
)
def test_a_worker_that_ends_is_an_error(
    tmp_path: Path, script: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("netlab.crew.SETTLE_SECONDS", 0.1)
    lab: Any = Processes(ANSWER + script)
    with Crew(lab, "10M", tmp_path / "log", {}) as crew, pytest.raises(WorkerFailedError, match=words):
        crew.ask("facts")


def test_answers_come_by_rank(tmp_path: Path) -> None:
    lab: Any = Processes(ANSWER + "c.send({'x': 2})")
    with Crew(lab, "10M", tmp_path / "log", {}) as crew:
        assert crew.ask("facts") == [{"x": 2}]


def turn(method: str, seconds: float, code: str = "new", rate: int = 10**8) -> dict[str, Any]:
    cell = {"kind": "turn", "workers": 4, "per_host": 1, "model": "10M", "rate": rate}
    return {**cell, "method": method, "code": code, "seconds": [seconds, seconds, 9.0], "sent": 2e6}


def test_old_and_new_are_compared_turn_by_turn() -> None:
    turns = [turn("lioncub", seconds, code) for seconds, code in ((1, "old"), (2, "new"), (6, "old"), (2, "new"))]
    assert table_of(turns, "x").splitlines()[2] == (
        "| lioncub | 2000.0 | 3500.0 | 2.000 | 2.000 | 1.750 | 0.50 to 3.00 |"
    )


def test_a_report_is_written_from_turns(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("<!-- network -->\n<!-- /network -->\n")
    times = {"no_communication": 0.2, "ddp_fp32_lion_pytorch": 5.0, "lioncub": 0.5, "lioncub_overlap": 0.25}
    turns = [turn(method, seconds) for method, seconds in times.items()]
    write_report([run_record(), *turns], tmp_path, page)
    text = page.read_text()
    assert "| LionCub, overlap | 250 | 2.00 |" in text
    assert "| 4 | 10M | 100 Mb/s |  | 10.00 | 20.00 | 25.00 |" in text
    assert (tmp_path / "network.png").stat().st_size > 1000
    with pytest.raises(RecordsError, match="expected turns of 4 workers"):
        write_report([run_record(), *turns[2:]], tmp_path, page)


def test_a_report_of_sharded_methods(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("<!-- network shards -->\n<!-- /network shards -->\n")
    memory = {"numel": 10, "parameters": 40, "gradients": 40, "state": 40, "rest": 3}
    turns = [turn("hsdp_fp32", 4.0), turn("fsdp_lioncub", 0.5)]
    turns = [found | {"memory": memory, "per_host": 2} for found in turns]
    turns[1] |= {"sent": 1e5, "stated": 45_000}
    write_shards_report([run_record(), *turns], tmp_path, page)
    text = page.read_text()
    assert "| 10M | HSDP fp32, Lion | 4,000 | 1.00 | 2.000 |  | 1.0 | 4.00 + 4.00 + 4.00 + 0.30 |" in text
    assert "| 10M | FSDP2, LionCub | 500 | 8.00 | 0.100 | 0.090 | 20.0 | 4.00 + 4.00 + 4.00 + 0.30 |" in text
    assert (tmp_path / "network_shards.jsonl").exists()
    with pytest.raises(RecordsError, match="expected turns with hsdp_fp32"):
        write_shards_report([run_record(), turns[1]], tmp_path, page)
