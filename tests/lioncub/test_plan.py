"""``lioncub plan``: units, figures computed by hand, table, files and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from profiles import profile_of

from lioncub.cli import bandwidth, main, parameters
from lioncub.collectives.cost import EFFICIENCY, Link
from lioncub.collectives.groups import Topology
from lioncub.plan import BASELINE, Cluster, Row, amount, forecast, milliseconds, notes, over_worlds

CLUSTER = ["--nodes", "64", "--gpus-per-node", "8", "--inter", "10gbit", "--intra", "400gbit"]
FLAGS = ["plan", "--params", "1.3e9", *CLUSTER]


def by_method(rows: tuple[Row, ...]) -> dict[str, Row]:
    return {row.method: row for row in rows}


@pytest.mark.parametrize(
    ("text", "count"),
    [("1.3e9", 1_300_000_000), ("25M", 25_000_000), ("1.3B", 1_300_000_000), ("7", 7), ("2.5k", 2500), ("1T", 10**12)],
)
def test_parameters(text: str, count: int) -> None:
    assert parameters(text) == count


@pytest.mark.parametrize("text", ["", "x", "25x", "-5", "1.5", "0", "1e999", "nan", "2.5 M 3", "25MB"])
def test_no_parameters(text: str) -> None:
    with pytest.raises(ValueError, match="expected a whole number of parameters such as 25M") as caught:
        parameters(text)
    assert str(caught.value).endswith(f"got {text!r}")


@pytest.mark.parametrize(
    ("text", "speed"), [("100mbit", 12.5e6), ("10gbit", 1.25e9), ("2.5Gbit", 312.5e6), ("1e3kbit", 125e3)]
)
def test_bandwidth(text: str, speed: float) -> None:
    assert bandwidth(text) == speed


@pytest.mark.parametrize("text", ["", "10", "10G", "10gb/s", "0gbit", "-1mbit", "gbit", "10 000mbit"])
def test_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match="expected a bandwidth such as 100mbit or 10gbit") as caught:
        bandwidth(text)
    assert str(caught.value).endswith(f"got {text!r}")


def test_a_flat_cluster_by_hand() -> None:
    # 10 Mb/s, no latency; 800,000 parameters are 100,000 bytes of votes and 3.2 MB of fp32
    cluster = Cluster(800_000, 4, 1, Link(0, 1.25e6), Link(), compute_s=0.9)
    rows = by_method(forecast(cluster))
    wire = {
        "fp32 all-reduce": (2 * 3 * 3_200_000 // 4, "sum"),
        "bf16 all-reduce": (2 * 3 * 1_600_000 // 4, "sum"),
        "all_gather": (3 * 100_000, "ring"),
    }
    for name, (sent, pattern) in wire.items():
        assert rows[name].seconds == pytest.approx(sent / 1.25e6 / EFFICIENCY[pattern]), name
        assert rows[name].node_bytes == sent, name
    # chunks of 25,000 bytes are padded to 16
    there, back = 3 * 25_008, 3 * (16 + 25_008)
    votes = there / 1.25e6 / EFFICIENCY["exchange"] + back / 1.25e6 / EFFICIENCY["ring"]
    row, slow = rows["reduce_scatter"], rows[BASELINE]
    assert row.seconds == pytest.approx(votes)
    assert row.node_bytes == there + back
    assert row.is_chosen
    assert [name for name, row in rows.items() if row.is_chosen] == ["reduce_scatter"]
    # the backward pass is two thirds of 0.9 s; the votes hide behind it, fp32 does not
    assert (row.step_s, row.overlapped_s) == (pytest.approx(0.9 + votes), pytest.approx(0.9))
    assert (slow.step_s, slow.overlapped_s) == (pytest.approx(0.9 + slow.seconds), pytest.approx(0.3 + slow.seconds))
    assert row.speedup == pytest.approx((0.9 + slow.seconds) / (0.9 + votes))
    assert row.overlapped_speedup == pytest.approx((0.3 + slow.seconds) / 0.9)
    assert (slow.speedup, slow.overlapped_speedup) == (1, 1)
    assert set(rows) == {*wire, "reduce_scatter", "all_reduce"}


def test_dense_all_reduce_takes_the_better_way() -> None:
    # without latency a ring crosses the slow link as often and saves the way inside; with latency it has more steps
    fast = by_method(forecast(Cluster(1_000_000, 2, 8, Link(0, 1e6), Link(0, 1e7))))
    assert fast[BASELINE].detail == "2 levels"
    assert fast[BASELINE].node_bytes == 8 * (4_000_000 // 8)
    slow_inside = by_method(forecast(Cluster(1_000_000, 2, 8, Link(0, 1e6), Link(0, 1e6))))
    assert slow_inside[BASELINE].detail == "ring"
    assert slow_inside[BASELINE].node_bytes == 2 * 15 * 4_000_000 // 16
    far = by_method(forecast(Cluster(1_000, 2, 8, Link(1.0, 1e9), Link(0, 1e9))))
    assert far[BASELINE].seconds == pytest.approx(2, rel=1e-3)


def test_hierarchical_wins_on_the_documented_cluster() -> None:
    rows = by_method(forecast(Cluster(1_300_000_000, 64, 8, Link(50e-6, 1.25e9), Link(10e-6, 50e9), 0.9)))
    assert [name for name, row in rows.items() if row.is_chosen] == ["hierarchical"]
    # 162.5 MB of votes in 10 buckets, 4 planes of counts and the result between 64 nodes
    assert rows["hierarchical"].detail == "10 buckets"
    assert rows["hierarchical"].node_bytes == pytest.approx(8 * 63 * 5 * 162.5e6 / 512, rel=0.01)
    assert rows["hierarchical"].node_bytes < 0.8 * rows["reduce_scatter"].node_bytes


def test_worlds_of_2_to_4096() -> None:
    cluster = Cluster(25_000_000, 4, 8, Link(50e-6, 1.25e9), Link(10e-6, 50e9))
    worlds = over_worlds(cluster)
    assert [n for n, _ in worlds] == [2**i for i in range(1, 13)]
    assert dict(worlds)[32] == forecast(cluster)
    assert all(0 < row.seconds < math.inf for _, rows in worlds for row in rows)
    six = over_worlds(Cluster(1000, 4, 6, Link(), Link()))
    assert [n for n, _ in six][:6] == [2, 4, 6, 12, 30, 60]


def test_the_links_of_a_profile_predict_as_the_profile_does() -> None:
    shape = Topology.even(2, 4)
    profile = profile_of(shape)
    same = Cluster(8_000_000, 2, 4, profile.inter, profile.intra, origin="of a profile")
    assert same.costs.seconds("hierarchical", 1 << 20) == profile.costs(shape, "gloo").seconds("hierarchical", 1 << 20)
    assert notes(same)[1].startswith("Based on links of a profile: ")


@pytest.mark.parametrize(
    ("nodes", "local", "compute"), [(1, 1, 0.0), (0, 8, 0.0), (8, -1, 0.0), (2, 1, -1.0), (2, 1, math.nan)]
)
def test_impossible_clusters(nodes: int, local: int, compute: float) -> None:
    with pytest.raises(ValueError, match=r"--nodes, --gpus-per-node: expected|--compute-ms: expected"):
        Cluster(1000, nodes, local, Link(), Link(), compute)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--plot", str(tmp_path / "plan.png"), "--json", str(tmp_path / "plan.json")]
    assert main([*FLAGS, "--compute-ms", "900", *files]) == 0
    shown = capsys.readouterr().out
    assert "1,300,000,000 parameters, 64 x 8 workers, 900 ms of computation" in shown
    rows = forecast(Cluster(1_300_000_000, 64, 8, Link(50e-6, 1.25e9), Link(10e-6, 50e9), 0.9))
    for row in rows:
        (line,) = [line for line in shown.splitlines() if line.split(",")[0].strip().startswith(row.method)]
        assert milliseconds(row.seconds) in line
        assert amount(row.node_bytes) in line
        assert f"{row.overlapped_speedup:.2f}x" in line
        assert ("*" in line) == row.is_chosen
    # figures are whole: nothing was cut off
    assert "…" not in shown
    assert "Error of the model: " in shown
    assert "Based on links as given: 10 Gb/s, 50 us per message from node to node; 400 Gb/s" in shown
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert [method["seconds"] for method in stored["methods"]] == [row.seconds for row in rows]
    assert [world["workers"] for world in stored["worlds"]] == [2**i for i in range(1, 13)]

    assert main([*FLAGS, *files]) == 1
    assert capsys.readouterr().err == (
        f"lioncub plan: --plot {tmp_path / 'plan.png'}: expected a new file, got one that exists; "
        "replace it with --overwrite\n"
    )
    assert main([*FLAGS, *files, "--overwrite"]) == 0
    assert "speedups are of communication alone" in capsys.readouterr().out


def test_command_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    path.write_text(profile_of(Topology.even(2, 4)).to_json())
    base = ["plan", "--params", "25M", "--gpus-per-node", "4", "--profile", str(path)]
    assert main([*base, "--nodes", "2"]) == 0
    assert "Based on links fitted to a profile of 2 nodes of 4 workers over gloo" in capsys.readouterr().out
    assert main([*base, "--nodes", "16"]) == 0
    assert "Based on links fitted to a profile of 2 nodes of 4 workers over gloo" in capsys.readouterr().out
    assert main([*base, "--nodes", "2", "--inter", "1gbit", "--intra", "10gbit", "--latency-us", "7"]) == 0
    assert "Based on links as given: 1 Gb/s, 7 us per message" in capsys.readouterr().out


BAD = {
    "--params 25x --nodes 2": "argument --params: expected a whole number of parameters",
    "--params 25M --nodes 2 --inter 10": "argument --inter: expected a bandwidth such as 100mbit",
    "--params 25M --nodes 2": "lioncub plan: --inter: expected a bandwidth such as 10gbit, or a --profile",
    "--params 25M --nodes 2 --inter 1gbit --gpus-per-node 2": "lioncub plan: --intra: expected",
    "--params 25M --nodes 1 --inter 1gbit": "with at least 2 workers in all, got 1 and 1",
    "--params 25M --nodes 2 --inter 1gbit --latency-us -1": "plan: --latency-us: expected a number >= 0, got -1",
    "--params 25M --nodes 2 --inter 1gbit --compute-ms nan": "--compute-ms: expected a finite",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_arguments(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *flags.split()])
    assert ended.value.code == 2
    assert BAD[flags] in capsys.readouterr().err


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--profile", str(tmp_path / "none.json")]) == 1
    expected = f"lioncub plan: profile {tmp_path / 'none.json'}: cannot be read: No such file or directory\n"
    assert capsys.readouterr().err == expected
    assert main([*FLAGS, "--json", str(tmp_path / "none" / "plan.json")]) == 1
    assert "expected a file in a folder that exists" in capsys.readouterr().err
    # a disk that is full
    for flag in ("--json", "--plot"):
        assert main([*FLAGS, flag, "/dev/full", "--overwrite"]) == 1
        said = capsys.readouterr().err
        assert said == "lioncub plan: /dev/full: cannot be written: No space left on device\n"


def test_amounts() -> None:
    amounts = {
        0: "0 B",
        999: "999 B",
        1500: "1.5 kB",
        802_000_000: "802 MB",
        83 * 10**9: "83 GB",
        2 * 10**12: "2,000 GB",
    }
    assert {n_bytes: amount(n_bytes) for n_bytes in amounts} == amounts
