"""The benchmarks time every op, run, and count the bytes that docs/composing.md states. Nothing is timed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from reporting.records import RecordsError, run_record
from speed import peers, report, streams
from speed.cases import CASES, NOT_OPS, VOTERS, Case, Cell, cells
from speed.data import DTYPES, PACKED, SIZES, Call, Data
from speed.peers import PEERS, Peer
from speed.steps import STEPS, Step, gpt2_shapes, make_step
from speed.timing import Timer, plan_rounds, summary

from lioncub import kernels

N = 4096
# as in the table of docs/composing.md, with fp32 tensors
BYTES_PER_ELEMENT = {
    "pack_signs": 4.125,
    "unpack_signs": 4.125,
    "lion_encode": 8.125,
    "lion_encode_": 12.125,
    "foreach_lion_encode": 8.125,
    "lion_ema": 12,
    "majority_vote:2_voters": 3 / 8,
    "majority_vote:8_voters": 9 / 8,
    "majority_vote:64_voters": 65 / 8,
    "majority_vote:8_voters_counted": 9 / 8,
    "count_votes": (8 + 4) / 8,
    "majority_of_counts": (2 * 4 + 1) / 8,
    "spread_codes": (1 + 4) / 8,
    "majority_of_fields": (4 + 1) / 8,
    "add_codes:1_bit": (8 * 1 + 4) / 8,
    "add_codes:2_bits": (4 * 2 + 8) / 8,
    "ternary_of_fields": (4 + 2) / 8,
    "lion_apply_": 8.125,
    "lion_apply_:momentum": 20.125,
    # 12.125 and 22 beside bf16 parameters and gradients
    "lion_apply_:masters": 16.125,
    "lion_step_:masters": 28,
    "lion_apply_:2_bits": 8 + 2 / 8,
    "lion_apply_:2_bits_momentum": 20 + 2 / 8,
    "foreach_lion_apply_": 20.125,
    "foreach_lion_apply_:2_bits": 20 + 2 / 8,
    "lion_step_": 20,
    "foreach_lion_step_": 20,
    "quantize:2_bits": 4 + 2 / 8,
    "quantize:8_bits": 4 + 8 / 8,
    "quantize:2_bits_own_scale": 8 + 2 / 8,
    "quantize:2_bits_stochastic": 4 + 2 / 8,
    "lion_quantize:2_bits": 8 + 2 / 8,
    "lion_quantize:2_bits_own_scale": 16 + 2 / 8,
    "lion_quantize:2_bits_stochastic": 8 + 2 / 8,
    "foreach_lion_quantize": 8 + 2 / 8,
    "dequantize:2_bits": 4 + 2 / 8,
    "dequantize:8_bits": 4 + 8 / 8,
}


def test_every_op_is_timed() -> None:
    assert {case.op for case in CASES} == set(kernels.__all__) - NOT_OPS
    assert set(kernels.__all__) >= NOT_OPS, "what is no longer there needs no exception"


def test_cases_have_names_of_their_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"\w+(:\w+)?", name) for name in names), "names are joined by slashes"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_is_timed_on_every_implementation_dtype_and_size(case: Case) -> None:
    impls = ["torch"] if case.op == "lion_ema" else ["cpu", "reference", "triton"]
    for impl in ("torch", "cpu", "reference", "triton"):
        found = {(cell.dtype, cell.size) for cell in cells(impl) if cell.case is case}
        assert found == ({(d, s) for d in case.dtypes for s in SIZES} if impl in impls else set())
    narrow = case.way in ("stochastic", "masters")
    assert case.dtypes in [(PACKED,), ("bf16", "fp16") if narrow else tuple(DTYPES)]


def test_sizes_and_voters_are_those_asked_for() -> None:
    assert SIZES == {"64Ki": 65_536, "1Mi": 1_048_576, "16Mi": 16_777_216}
    assert {f"majority_vote:{n}_voters" for n in VOTERS} < {case.name for case in CASES}
    assert VOTERS == (2, 8, 64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_call_moves_the_bytes_that_the_docs_state(case: Case) -> None:
    call = case.make(Data(N), "torch" if case.impls == ("torch",) else "reference")
    if case.name in BYTES_PER_ELEMENT:
        assert call.bytes_moved == N * BYTES_PER_ELEMENT[case.name]
    else:
        assert case.way == "stochastic"
        nearest = next(other for other in CASES if other.name == case.op)
        assert call.bytes_moved == nearest.make(Data(N), "reference").bytes_moved


@pytest.mark.parametrize("dtype", [*DTYPES, PACKED])
def test_calls_run_and_write_what_they_say(dtype: str) -> None:
    for case in CASES:
        if dtype not in case.dtypes:
            continue
        for impl in [impl for impl in case.impls if impl != "triton"]:
            data = Data(N, Cell(case, impl, dtype, "64Ki").data_key()[1])
            call = case.make(data, impl)
            before = [tensor.clone() for tensor in (*call.reads, *call.writes)]
            call.run()
            for old, tensor in zip(before, (*call.reads, *call.writes), strict=True):
                if not any(tensor is written for written in call.writes):
                    assert torch.equal(old, tensor), f"{case.name}, {impl} changed what it is said to read"


@pytest.mark.parametrize("peer", [p for p in PEERS if p.way != "torch.compile"], ids=lambda peer: peer.name)
def test_peers_run_and_move_the_bytes_of_what_they_stand_beside(peer: Peer) -> None:
    call = peer.make(Data(N))
    call.run()
    case = next(case for case in CASES if case.name == peer.of)
    assert call.bytes_moved == case.make(Data(N), "reference").bytes_moved


def test_plain_torch_has_the_kernels_bits() -> None:
    data = Data(N)
    assert peers.torch_encode(data.exp_avg, data.grad).equal(kernels.lion_encode(data.exp_avg, data.grad, beta1=0.9))
    # an odd number has no ties
    votes = data.voters(8)[:7]
    assert peers.torch_vote(votes).equal(kernels.majority_vote(votes))
    assert peers.numpy_vote(votes.numpy()).tolist() == kernels.majority_vote(votes).tolist()
    codes, _ = kernels.quantize(data.grad, bits=2, scale=data.scale)
    assert peers.torch_quantize(data.grad, data.scale).equal(codes)
    param = data.param.clone()
    kernels.lion_apply_(data.param, votes[0], lr=1e-4, weight_decay=0.1)
    peers.torch_apply(param, votes[0])
    # products and sums may be rounded in another order: one unit of fp32 numbers below 8
    assert (param - data.param).abs().max() <= 2**-21


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_steps_run_on_a_small_gpt(step: Step) -> None:
    shapes = [(100, 8), (16, 8), *gpt2_shapes(layers=2, width=8)[2:]]
    call = make_step(step, shapes)
    params = call.writes[: len(shapes)]
    before = [param.clone() for param in params]
    call.run()
    assert all(not torch.equal(old, param) for old, param in zip(before, params, strict=True))


def test_the_layout_is_that_of_gpt2_small() -> None:
    shapes = gpt2_shapes()
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808


def test_the_report_has_every_case_and_step(tmp_path: Path) -> None:
    names = [("kernel", cell.name) for cell in cells("cpu") if cell.size == "16Mi"]
    names += [("peer", peer.name) for peer in PEERS] + [("step", step.name) for step in STEPS]
    found = [{"kind": kind, "name": name, **summary(24, [4.0], 12, [1.0])} for kind, name in names]
    page = tmp_path / "results.md"
    page.write_text("# Title\n\n<!-- speed -->\n<!-- /speed -->\n")
    report.write_report([run_record(), *found], tmp_path, page)
    text = page.read_text()
    for case in CASES:
        title = f"`{case.op}` {case.way.replace('_', ' ')}".strip()
        assert (f"\n| {title} | " in text) == ("cpu" in case.impls), case.name
    assert all(f"\n| {step.optimizer} | {step.layout.replace('_', ' ')} | {step.dtype} | " in text for step in STEPS)
    assert (tmp_path / "speed.png").stat().st_size > 1000
    with pytest.raises(RecordsError, match="whole run"):
        report.write_report([run_record(), *found[:3]], tmp_path, page)


def test_a_ratio_is_the_median_of_those_of_the_rounds() -> None:
    # the second round was disturbed, and its stream with it; bandwidths are 24/call and 12/stream
    found = summary(24, [4.0, 40.0, 5.0], 12, [1.0, 10.0, 1.0])
    assert (found["low"], found["ratio"], found["high"]) == (pytest.approx(0.45), pytest.approx(0.5), 0.5)
    assert (found["gb_per_s"], found["ms"], found["rounds"]) == (pytest.approx(24 / 5 / 1e9), 5000.0, 3)


def test_a_call_is_timed_round_by_round() -> None:
    calls = []
    data = Data(N)
    call = Call(lambda: calls.append(1), (data.grad,), ())
    found = Timer().measure(call, estimate=1e-3, budget=0.02)
    assert len(calls) == found["rounds"] >= 5
    assert 0 < found["low"] <= found["ratio"] <= found["high"]


def test_streams_do_what_their_bytes_say() -> None:
    a, b = torch.zeros(100).numpy(), torch.ones(100).numpy()
    streams.stream(a, b, 0.5, 3)
    assert (a == 1.5).all()
    assert streams.read(torch.arange(4096).numpy()) == 4095


def test_plans_bound_the_time_of_a_benchmark() -> None:
    quick = plan_rounds(2**25, 0.01, 0.006, 0.5)
    assert (quick.rounds, quick.calls, quick.streams, quick.is_cold) == (31, 1, 1, True)
    assert plan_rounds(2**25, 0.4, 0.006, 0.5).rounds == 3
    assert plan_rounds(2**25, 35.0, 0.006, 0.5).rounds == 1
    small = plan_rounds(2**16, 50e-6, 1e-6, 0.5)
    assert (small.calls, small.streams, small.is_cold) == (20, 1000, False)
    assert plan_rounds(2**10, 0.0, 0.0, 0.5).rounds == 201, "a clock may not have moved"
