"""The network lab without a network: what it would run, when, and what it makes of the findings."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_workers import results_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from demo.gpt import GPT, parameter_count
from netlab import lab as lab_module
from netlab.check import LinkSpeed, judge, parse_iperf
from netlab.cli import choice_of, main
from netlab.clocks import HookClock
from netlab.lab import (
    DEVICE,
    Counters,
    LabError,
    address_of,
    build_commands,
    is_stale,
    launch_command,
    owner_tag,
    pinning_command,
    rate_commands,
    require_abilities,
    worker_environment,
)
from netlab.matrix import (
    MAX_STEPS,
    MODELS,
    Choice,
    Session,
    rotated,
    sessions_of,
    step_seconds,
    total_seconds,
    turn_of,
    turns_of,
    wire_bytes,
    wire_seconds,
)
from netlab.methods import BETAS, LR, WEIGHT_DECAY, Int8Vote, bf16_hook
from netlab.names import ALGORITHM_OF, BASELINE, COMPARED, FLOOR, TWO_LEVEL
from netlab.progress import Pace, clock_text
from netlab.rates import parse_rate, rate_name, shape_of
from netlab.records import Journal, merged, read_journal
from netlab.report import write_report
from netlab.summary import headline, log_interval, paired_ratio, repetition_of, spread_of, table_of
from netlab.targets import targets_of

from lioncub.collectives import ALGORITHMS

RATES = (10**8, 10**9, 10**10)


# --- rates and commands


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
    shape = shape_of(rate)
    assert shape.rate == rate
    assert shape.burst_bytes >= 10 * 1514
    # a burst is sent faster than the rate: it must stay small beside the messages that are timed
    assert shape.burst_bytes <= max(rate // 8 // 500, 2 * 64 * 1024)
    assert shape.queue_bytes >= rate // 8 // 10


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


def test_counters_are_subtracted() -> None:
    assert Counters(10, 20, 3, 4) - Counters(1, 2, 1, 1) == Counters(9, 18, 2, 3)


# --- refusals


def test_only_namespaces_of_dead_labs_are_stale() -> None:
    own = owner_tag(os.getpid())
    assert own is not None
    assert not is_stale(f"lioncub-{own}-h0")
    assert not is_stale("somebody-1.1-h0")
    assert not is_stale("lioncub-notes")
    # the same process id, but of a process that started at another time
    assert is_stale(f"lioncub-{os.getpid()}.1-h0")
    assert is_stale(f"lioncub-{2**22 + 1}.1-bridge")


@pytest.mark.parametrize("command", [["lab", "--", "true"], ["matrix", "--quick"], ["clean"]])
def test_it_needs_root_and_says_so(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(command) == 1
    assert capsys.readouterr().err == "netlab: the network lab makes network namespaces: run it as root\n"


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_module.shutil, "which", lambda tool: None if tool in ("tc", "iperf3") else f"/bin/{tool}")
    with pytest.raises(LabError, match=r"not found: tc, iperf3; .*apt-get install iperf3 iproute2"):
        require_abilities("iperf3")
    # which a lab itself does not need
    with pytest.raises(LabError, match=r"not found: tc; .*apt-get install iproute2$"):
        require_abilities()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["lab", "--rate", "slow", "--", "true"],
            "rate: expected 1mbit to 100gbit, such as 100mbit or 1gbit, got 'slow'",
        ),
        (["lab", "--hosts", "0", "--", "true"], "hosts: expected 1 to 200, got 0"),
        (["lab", "--per-host", "0", "--", "true"], "per_host: expected at least 1, got 0"),
        (["matrix", "--models", "10M", "1B"], "models: expected some of 10M, 25M, got 1B"),
        (["matrix", "--methods", "magic"], "methods: expected some of no_communication, .*, got magic"),
        (["matrix", "--workers", "1"], r"workers: expected numbers from 2 to 64, got \(1,\)"),
        (["matrix", "--repetitions", "0"], "repetitions: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("netlab: ")
    assert re.search(words, error), error


def test_a_report_without_findings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["matrix", "--report", "--runs", str(tmp_path)]) == 1
    assert "records.jsonl" in capsys.readouterr().err
    with pytest.raises(ValueError, match="records: expected at least one finished turn, got none"):
        write_report([], tmp_path)


@pytest.mark.parametrize("share", [0.5, 0.89, 1.03])
def test_a_link_that_is_not_as_fast_as_asked_is_refused(share: float) -> None:
    with pytest.raises(LabError, match=r"link from host 0 to host 1: expected 0.9 to 1.02 of 100 Mb/s, got"):
        judge(LinkSpeed(0, 1, 10**8, share * 10**8))


def test_a_fast_link_gives_what_the_machine_can() -> None:
    judge(LinkSpeed(0, 1, 10**8, 0.95 * 10**8))
    judge(LinkSpeed(0, 1, 10**10, 0.4 * 10**10))
    with pytest.raises(LabError, match=r"1\.100 by iperf3"):
        judge(LinkSpeed(0, 1, 10**10, 1.1 * 10**10))


def test_iperf_answers_are_read() -> None:
    assert parse_iperf('{"end": {"sum_received": {"bits_per_second": 95.5e6}}}') == 95.5e6
    with pytest.raises(LabError, match="iperf3: unable to connect"):
        parse_iperf('{"error": "unable to connect"}')
    with pytest.raises(LabError, match="iperf3: expected JSON, got 'No such file'"):
        parse_iperf("No such file")


# --- the matrix


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_stated_parameters(name: str) -> None:
    model = MODELS[name]
    with torch.device("meta"):
        built = GPT(layers=model.layers, heads=model.heads, width=model.width, context=64)
    assert parameter_count(built) == model.parameters
    assert abs(model.parameters / (1e6 * int(name.removesuffix("M"))) - 1) < 0.03


def test_the_matrix_has_every_cell_and_the_deciding_ones_first() -> None:
    choice = Choice()
    sessions = sessions_of(choice)
    flat = [session for session in sessions if session.per_host == 1]
    assert {(s.hosts, s.model) for s in flat} == {(hosts, model) for hosts in (2, 4, 8) for model in MODELS}
    assert sessions[:2] == [Session(4, 1, "10M"), Session(4, 1, "25M")]
    assert [session for session in sessions if session.per_host > 1] == [Session(2, 4, "10M")]
    for session in flat:
        turns = list(turns_of(choice, session))
        repetitions = 5 if session.workers == 4 else 2
        assert {(t.rate, t.repetition, t.method) for t in turns} == {
            (rate, r, method) for rate in RATES for r in range(repetitions) for method in COMPARED
        }
        assert len(turns) == len({(t.rate, t.repetition, t.method) for t in turns})


def test_methods_take_turns_and_every_repetition_starts_with_another() -> None:
    turns = list(turns_of(Choice(rates=(10**9,)), Session(4, 1, "10M")))
    n = len(COMPARED)
    rounds = [[turn.method for turn in turns[i : i + n]] for i in range(0, len(turns), n)]
    assert all(sorted(one) == sorted(COMPARED) for one in rounds)
    assert len({one[0] for one in rounds}) == len(rounds)
    assert rotated("abc", 1) == ["b", "c", "a"]


def test_methods_cover_every_algorithm_with_and_without_overlap() -> None:
    assert {algorithm for name, algorithm in ALGORITHM_OF.items() if name.endswith("_overlap")} == {*ALGORITHMS, "auto"}
    assert len(ALGORITHM_OF) == 2 * len(ALGORITHMS) + 2
    assert BASELINE in COMPARED
    assert FLOOR in COMPARED
    assert "lioncub_hierarchical" not in COMPARED
    assert "lioncub_reduce_scatter" in TWO_LEVEL


def test_a_two_level_session_compares_algorithms() -> None:
    turns = list(turns_of(Choice(repetitions=1), Session(2, 4, "10M")))
    assert {turn.method for turn in turns} == set(TWO_LEVEL)
    assert {turn.rate for turn in turns} == {10**8, 10**9}


def test_wire_bytes_are_those_of_a_ring() -> None:
    session, n = Session(4, 1, "10M"), MODELS["10M"].parameters
    assert wire_bytes(FLOOR, session) == 0
    assert wire_bytes("ddp_fp32", session) == 6 * n
    assert wire_bytes("ddp_bf16", session) == 3 * n
    assert wire_bytes("int8_vote", session) == 1.5 * n
    for method, bits in (("reduce_scatter", 1.5), ("auto", 1.5), ("all_gather", 3), ("all_reduce", 6)):
        assert wire_bytes(f"lioncub_{method}", session) == pytest.approx(bits * n / 8, rel=1e-3)
    # eight workers of two hosts share two links
    assert wire_seconds("ddp_fp32", Session(2, 4, "10M"), 10**9) == pytest.approx(4 * 8 * 7 * n / 1e9)


def test_slow_steps_are_few_and_fast_ones_many() -> None:
    session = Session(4, 1, "25M")
    slow, fast = turn_of(session, 10**8, 0, BASELINE), turn_of(session, 10**10, 0, "lioncub_reduce_scatter")
    assert slow.steps == 1
    assert 1 < fast.steps <= MAX_STEPS
    assert slow.seconds > step_seconds(BASELINE, session, 10**8) > 12
    assert fast.alone > 0
    assert turn_of(session, 10**9, 0, "lioncub_auto_overlap").alone == 0


def test_the_whole_matrix_is_estimated_within_its_hour() -> None:
    assert 0 < total_seconds(Choice(workers=(4,), models=("10M",), two_level=False)) < total_seconds(Choice()) < 3600


def _options(*flags: str) -> Any:
    from netlab.cli import _parser

    return _parser().parse_args(["matrix", *flags])


def test_flags_choose_a_part() -> None:
    assert choice_of(_options()) == Choice()
    quick = choice_of(_options("--quick", "--rates", "100mbit"))
    assert (quick.workers, quick.models, quick.rates, quick.repetitions, quick.two_level) == (
        (2,),
        ("10M",),
        (10**8,),
        2,
        False,
    )
    part = choice_of(_options("--methods", "ddp_fp32", "lioncub_auto", "--repetitions", "7", "--two-level"))
    assert part.methods == ("ddp_fp32", "lioncub_auto")
    assert part.repetitions_of(Session(8, 1, "10M")) == 7
    assert part.two_level


def test_remaining_time_follows_how_estimates_fared() -> None:
    pace = Pace(100.0)
    assert pace.remaining(0.0) == 100
    pace.done = 50.0
    assert pace.remaining(100.0) == 100
    pace.done = 120.0
    assert pace.remaining(200.0) == 0
    assert clock_text(75.4) == "1:15"


# --- figures


def test_spreads_ratios_and_intervals() -> None:
    assert spread_of([3.0, 1.0, 2.0]) == spread_of([1.0, 2.0, 3.0])
    low, high = log_interval([2.0, 2.0, 2.0, 2.0, 2.0])
    assert low == pytest.approx(2)
    assert high == pytest.approx(2)
    assert log_interval([2.0]) == (0.0, math.inf)
    # by hand: logs 0 and log 4, mean log 2, standard deviation log(4)/sqrt(2), t = 12.706 for one degree of freedom
    low, high = log_interval([1.0, 4.0])
    half = 12.706 * math.log(4) / 2
    assert (math.log(low), math.log(high)) == pytest.approx((math.log(2) - half, math.log(2) + half))


def _turn(method: str, repetition: int, step: float, **fields: Any) -> dict[str, Any]:
    place = {"hosts": 4, "per_host": 1, "model": "10M", "rate": 10**8, **fields.pop("place", {})}
    # the second worker is slower by half
    workers = [
        {
            "steps": [[f * step, 0.2 * f * step, 0.3 * f * step, 0.4 * f * step, 0.1 * f * step, 0.5 * f * step]],
            "sent": 1000.0 * f,
            "received": 900.0,
            **fields,
        }
        for f in (1.0, 1.5)
    ]
    return {"kind": "turn", **place, "repetition": repetition, "method": method, "workers": workers}


def test_a_repetition_is_as_slow_as_its_slowest_worker() -> None:
    fields = {"alone": [0.05, 0.04, 0.9], "alone_bytes": 490, "alone_in_step": [0.1, 0.2, 0.3], "predicted": 0.06}
    got = repetition_of(_turn("lioncub_auto", 3, 0.2, bytes_sent=500, **fields))
    assert got.index == 3
    assert got.step == pytest.approx(0.3)
    assert got.forward == pytest.approx(0.05)
    assert (got.sent, got.received, got.bytes_sent) == (1500, 900, 500)
    assert (got.alone, got.alone_bytes, got.alone_in_step, got.predicted) == (0.05, 490, 0.2, 0.06)


def test_ratios_are_paired_by_repetition() -> None:
    above = [repetition_of(_turn(BASELINE, i, seconds)) for i, seconds in enumerate((1.0, 2.0, 4.0))]
    below = [repetition_of(_turn(FLOOR, i, seconds)) for i, seconds in ((2, 1.0), (0, 0.5))]
    ratio = paired_ratio(above, below)
    assert ratio.median == pytest.approx(3)
    assert not ratio.resolved
    with pytest.raises(ValueError, match="repetitions: expected some that both methods have, got none"):
        paired_ratio(above[1:2], below)


def _findings() -> Iterator[dict[str, Any]]:
    environment = {"date": "2030-01-02T03:04:05", "cpu": "a processor", "cores": 2, "memory_bytes": 2**34}
    versions = {"torch": "2.13.0", "numba": "0.68.1"}
    yield {
        "kind": "environment",
        **environment,
        "kernel": "6",
        "python": "3.11",
        "versions": versions,
        "iperf3": "3.12",
    }
    link = {"hosts": 4, "per_host": 1, "sender": 0, "receiver": 1, "rate": 10**8, "bits_per_second": 0.95e8}
    yield {"kind": "link", **link}
    yield {"kind": "session", "hosts": 4, "per_host": 1, "model": "10M", "parameters": 9_938_240}
    exchange = {"alone": [0.16], "alone_bytes": 1_900_000, "alone_in_step": [0.2], "predicted": 0.15}
    exchange |= {"bytes_sent": 1_900_100, "routes": ["reduce_scatter", "reduce_scatter"]}
    for i in range(5):
        noise = 1 + 0.01 * i
        yield _turn(BASELINE, i, 6.4 * noise)
        yield _turn("ddp_fp32", i, 6.2)
        yield _turn(FLOOR, i, 0.2)
        for name in ("lioncub_all_gather", "lioncub_reduce_scatter", "lioncub_auto"):
            yield _turn(name, i, 0.5 if name == "lioncub_all_gather" else 0.32, **exchange)
        # by then its exchange costs less than the 5% that auto may lose
        yield _turn("lioncub_auto_overlap", i, 0.25, bytes_sent=1_900_000, routes=["reduce_scatter"])
        yield _turn("lioncub_all_gather_overlap", i, 0.2 * noise, bytes_sent=3_800_000, routes=["all_gather"])
    for name, sent in (("lioncub_reduce_scatter", 1.0), ("lioncub_hierarchical", 0.5)):
        turn = _turn(name, 0, 0.3 * sent, place={"hosts": 2, "per_host": 4})
        for worker in turn["workers"]:
            worker["sent"] *= sent
        yield turn
        yield {"kind": "digest", "hosts": 2, "per_host": 4, "model": "10M", "method": name, "digests": ["abc"] * 8}
    yield {"kind": "memory", "hosts": 4, "per_host": 1, "model": "10M", "peak_bytes": [2**30] * 4}


def test_the_headline_is_the_faster_of_the_automatic_ones() -> None:
    for without, name in ((0.32, "lioncub_auto_overlap"), (0.2, "lioncub_auto")):
        turns = [_turn("lioncub_auto", 0, without), _turn("lioncub_auto_overlap", 0, 0.25)]
        (methods,) = table_of([*turns, _turn("lioncub_reduce_scatter", 0, 0.1)]).values()
        assert headline(methods) == name


def test_a_later_run_replaces_the_cells_that_it_measured() -> None:
    place = {"hosts": 2, "per_host": 1}
    first = [_turn(FLOOR, i, 0.2) for i in range(3)] + [_turn(FLOOR, 0, 0.3, place=place), {"kind": "end"}]
    second = [_turn(FLOOR, 0, 0.1), {"kind": "end"}]
    table = table_of(merged([first, second]))
    assert {cell.hosts: len(methods[FLOOR]) for cell, methods in table.items()} == {2: 1, 4: 1}
    (again,) = next(methods for cell, methods in table.items() if cell.hosts == 4)[FLOOR]
    assert again.step == repetition_of(second[0]).step != repetition_of(first[0]).step
    assert [record["kind"] for record in merged([first, second])].count("end") == 2
    assert not [record for record in merged([first, second[:1]]) if record["kind"] == "end"]


def test_targets_are_judged_from_findings() -> None:
    records = list(_findings())
    got = {target.name: target for target in targets_of(table_of(records), records)}
    speedup = got["speedup over DDP fp32, lion-pytorch (10M, 100 Mb/s)"]
    assert speedup.got == pytest.approx(6.4 * 1.02 / 0.25)
    assert speedup.met
    alone = got["exchange alone against the wire limit (10M, 100 Mb/s)"]
    assert alone.got == pytest.approx(8 * 1.9e6 / 1e8 / 0.16)
    assert alone.met
    # floor: forward 0.05, backward 0.075, optimizer 0.025, and 0.152 s on the wire
    overlap = got["step with overlap over forward + max(backward, wire) + apply (10M, 100 Mb/s)"]
    assert overlap.got == pytest.approx(1.5 * 0.25 / (0.05 + 0.152 + 0.025))
    assert not overlap.met
    auto = got["LionCub auto, overlap over LionCub all_gather, overlap (4 workers, 10M, 100 Mb/s)"]
    assert auto.got == pytest.approx(0.25 / 0.2 / 1.02)
    assert not auto.met
    # equal times are not resolved, so nothing is asked of them
    assert not any(name.startswith("LionCub auto over") for name in got)
    assert got["cells predicted within 20%"].got == 1
    assert got["bytes over the slow link, hierarchical over reduce_scatter (100 Mb/s)"].got == pytest.approx(0.5)
    assert got["different parameters after the same steps by different algorithms, two levels"].met


def test_replicas_that_differ_are_seen() -> None:
    records = list(_findings())
    next(record for record in records if record["kind"] == "digest")["digests"][3] = "other"
    (target,) = [t for t in targets_of(table_of(records), records) if t.name.startswith("different parameters")]
    assert target.got == 1
    assert not target.met


def test_a_report_is_written_from_findings(tmp_path: Path) -> None:
    targets = write_report(list(_findings()), tmp_path)
    text = (tmp_path / "netlab.md").read_text()
    assert "The run was interrupted" in text
    assert "10M = 9,938,240 parameters" in text
    assert text.count("**missed**") == sum(not target.met for target in targets)
    # 9,600 ms is the slowest worker's median
    assert "| DDP fp32, lion-pytorch | 9,792 (9,600-9,984) |" in text
    assert "| 4 | 10M | 100 Mb/s | LionCub reduce_scatter | 152.0 | 160.0 | 200.0 | 0.95 (0.95-0.95) |" in text
    assert "Memory: 4.0 GiB at most" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "netlab.json").read_text())
    assert stored["complete"] is False
    assert len(stored["targets"]) == len(targets)
    (floor,) = [r for r in stored["results"] if r["method"] == FLOOR]
    assert floor["step"] == pytest.approx([0.3, 0.3, 0.3])
    assert floor["repetitions"] == 5


def test_a_finished_run_is_not_called_interrupted(tmp_path: Path) -> None:
    write_report([*_findings(), {"kind": "end", "date": "later"}], tmp_path)
    assert "interrupted" not in (tmp_path / "netlab.md").read_text()


def test_findings_survive_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.jsonl"
    journal = Journal(path)
    journal.write("turn", method="a")
    journal.write("turn", method="b")
    assert [record["method"] for record in read_journal(path)] == ["a", "b"]
    journal.close()
    path.write_text(path.read_text() + '{"kind": "tu')
    assert len(read_journal(path)) == 2
    path.write_text('{"kind": "tu\n{"kind": "end"}\n')
    with pytest.raises(ValueError, match="expected JSON in line 1"):
        read_journal(path)


# --- methods, over real workers


def int8_majority(rank: int, world_size: int) -> list[list[float]]:
    model = nn.Linear(3, 2, bias=False)
    start = torch.tensor([[0.5, -0.5, 1.0], [0.0, 2.0, -2.0]])
    with torch.no_grad():
        model.weight.copy_(start)
    # both positive, both negative, a tie, one zero, both zero, and a momentum that outweighs its gradient
    grads = ([1.0, -1.0, 1.0, 3.0, 0.0, 0.1], [2.0, -2.0, -1.0, 0.0, 0.0, 0.1])[rank]
    momentum = torch.zeros(2, 3)
    momentum[1, 2] = -1.0
    model.weight.grad = torch.tensor(grads).view(2, 3)
    before = momentum.clone()
    seconds = Int8Vote(model, [momentum]).vote()
    assert seconds > 0
    assert torch.allclose(momentum, before * BETAS[1] + model.weight.grad * (1 - BETAS[1]))
    directions = ((start * (1 - LR * WEIGHT_DECAY) - model.weight.detach()) / LR).round()
    return directions.tolist()


def test_the_int8_vote_moves_by_the_sign_of_the_sum() -> None:
    for directions in results_of(int8_majority, 2):
        assert directions == [[1, -1, 0], [1, 0, -1]]


def bf16_gradients(rank: int, world_size: int) -> tuple[list[float], float, float]:
    model = nn.Linear(4, 1, bias=False)
    ddp = DistributedDataParallel(model, init_sync=False)
    clock = HookClock()
    ddp.register_comm_hook(None, clock.timed(bf16_hook, None))
    # 1 + 2^-9 is no bf16 number: it is rounded to 1 before it travels
    values = torch.tensor([[1.0, 1 + 2**-9, 3.0 * (1 + rank), -2.0 * rank]])
    ddp(values).sum().backward()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.float32
    return model.weight.grad[0].tolist(), clock.busy_seconds(), clock.exposed_seconds()


def test_the_bf16_hook_averages_on_gloo() -> None:
    for gradients, busy, exposed in results_of(bf16_gradients, 2):
        assert gradients == [1.0, 1.0, 4.5, -1.0]
        assert busy >= exposed > 0


def bf16_sum(rank: int, world_size: int) -> list[float]:
    total = torch.tensor([256.0 if rank == 0 else 1.0] * 8, dtype=torch.bfloat16)
    dist.all_reduce(total)
    return total.tolist()


def test_gloo_rounds_bf16_sums_at_every_addition() -> None:
    # numbers from 256 on are even in bf16: rounded once at the end, every sum would be 260; 256 + 1 is 256 again, and
    # where that comes first depends on the part of the ring
    for sums in results_of(bf16_sum, 4):
        assert 256.0 in sums
        assert set(sums) <= {256.0, 258.0, 260.0}
