"""What the Triton kernels compile to, read from the machine code without a GPU, and the reading itself.

Interpreted functions cannot be compiled, so the report runs in processes without TRITON_INTERPRET.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_report import amdgcn, sass
from gpu_report.claims import BUSY, EXACT, HELD, HELD_ON, NARROW, claims_of
from gpu_report.code import BRANCH, EXIT, JUMP, LOAD, MAY_EXIT, NEXT, STORE, Instruction, Listing
from gpu_report.findings import Finding
from gpu_report.flow import blocks_of, executed, varying_accesses
from gpu_report.report import document
from gpu_report.rooflines import A100, GPUS, H100, MI300X, issue_seconds, memory_seconds
from gpu_report.variants import Variant, all_variants

BENCH = Path(__file__).parents[1] / "bench"
# like others that are compiled
SKIPPED = {"quantize to nearest", "quantize to 8 bits", "scale of chunks, linf", "vote with counts"}
# without the dtype these differ in their loads alone
SKIPPED_IN_BF16 = {"dequantize", "scale of blocks", "scale of chunks"}
ON_SM_80 = ("encode", "encode a list", "vote", "apply with momentum", "step")
PARTS = [
    ("sm_80", "fp32"),
    ("sm_80", "bf16"),
    ("sm_90", "fp32"),
    ("sm_90", "bf16"),
    ("gfx942", "fp32"),
    ("gfx942", "bf16"),
]


@cache
def found_in(target: str, dtype: str) -> tuple[Finding, ...]:
    """Findings on a target with data of a dtype; what has no dtype comes with fp32."""
    skipped = SKIPPED | (SKIPPED_IN_BF16 if dtype == "bf16" else set())
    dtypes = [dtype, "codes"] if dtype == "fp32" else [dtype]
    labels = {variant.label for variant in all_variants() if variant.dtype in dtypes} - skipped
    chosen = sorted(labels & set(ON_SM_80) if target == "sm_80" else labels)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu_report"), "--json", "--targets", target]
    command += ["--dtypes", *dtypes, "--labels", *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return tuple(Finding(**found) for found in json.loads(done.stdout))


@pytest.mark.parametrize(("target", "dtype"), PARTS)
def test_the_code_is_as_asked(target: str, dtype: str) -> None:
    claims = claims_of(found_in(target, dtype))
    unexpected = {claim.text: [finding.label for finding in claim.unexpected] for claim in claims}
    assert unexpected == {claim.text: [] for claim in claims}


def test_what_is_known_to_miss_a_claim_still_does() -> None:
    findings = [finding for target, dtype in PARTS for finding in found_in(target, dtype)]
    missed = {claim.text: {(f.label, f.dtype) for f in claim.missed} for claim in claims_of(findings)}
    assert set(BUSY) <= set().union(*missed.values())
    assert set(NARROW) <= {label for label, _ in set().union(*missed.values())}
    exchanging = {(f.label, f.dtype) for f in findings if f.exchanges}
    assert exchanging <= {(f.label, f.dtype) for f in findings if f.shared}


def test_the_claims_speak_of_the_kernels_of_a_step() -> None:
    findings = [finding for target, dtype in PARTS for finding in found_in(target, dtype)]
    bounded = {(f.label, f.target) for f in findings if f.label in HELD and f.target in HELD_ON}
    assert {(label, target) for label in ON_SM_80 for target in HELD_ON} <= bounded
    assert all(any(f.label.startswith(name) for f in findings) for name in EXACT)
    # a path that left out what it should do would be too good
    step = next(f for f in findings if (f.label, f.dtype, f.target) == ("step", "fp32", "sm_90"))
    assert (step.loads, step.stores, step.bytes) == ({"128": 3}, {"128": 2}, 20)
    assert step.kinds["fp32"] >= 7


def test_variants_are_unique_and_say_the_least_that_moves() -> None:
    variants = {(variant.label, variant.dtype): variant for variant in all_variants()}
    assert len(variants) == len(all_variants())
    moved = {("encode", "fp32"): 8.125, ("apply with momentum", "bf16"): 10.125, ("step", "mixed"): 14}
    moved |= {("vote", "codes"): 9 / 8, ("spread 1 to 4", "codes"): 5 / 8, ("scale of blocks", "fp32"): 8 + 4 / 64}
    for place, n_bytes in moved.items():
        assert variants[place].bytes_per_element == n_bytes, place
    assert variants["vote", "codes"].loaded_bytes == 8 * 16
    # half a byte of codes is loaded as a whole one
    assert variants["apply", "fp32"].widths((1 / 8, 4)) == {8: 1, 128: 1}


SASS = """
 Function _scale_kernel:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0

        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0010*/                   S2R R2, SR_TID.X ;                        /* 0x0 */
        /*0020*/                   LDG.E.64 R8, desc[UR4][R10.64] ;          /* 0x0 */
        /*0030*/                   ISETP.GE.AND P0, PT, R2, UR6, PT ;        /* 0x0 */
        /*0040*/               @P0 EXIT ;                                    /* 0x0 */
        /*0050*/                   IMAD.WIDE.U32 R4, R2, 0x10, R8 ;          /* 0x0 */
        /*0060*/                   LDG.E.128 R12, [R4.64+0x10] ;             /* 0x0 */
        /*0070*/                   I2F.U32 R3, R12 ;                         /* 0x0 */
        /*0080*/                   FMUL R3, R3, R13 ;                        /* 0x0 */
        /*0090*/              @!P0 BRA 0x60 ;                                /* 0x0 */
        /*00a0*/              @!P1 STL [R1], R3 ;                            /* 0x0 */
        /*00b0*/                   STS.64 [UR7], R2 ;                        /* 0x0 */
        /*00c0*/                   STG.E.U16 desc[UR4][R4.64], R3 ;          /* 0x0 */
        /*00d0*/                   EXIT ;                                    /* 0x0 */
        /*00e0*/                   BRA 0xe0;                                 /* 0x0 */
        /*00f0*/                   NOP;                                      /* 0x0 */
"""


class TestSass:
    def test_names_kinds_and_pipes(self) -> None:
        found = [(i.name, i.kind, i.pipe) for i in sass.parse(SASS).instructions]
        assert found[:4] == [
            ("LDC", "scalar", "issue"),
            ("S2R", "other", "issue"),
            ("LDG.E.64", "global", "lsu"),
            ("ISETP.GE.AND", "integer", "alu"),
        ]
        assert [(kind, pipe) for _, kind, pipe in found[5:13]] == [
            ("integer", "imad"),
            ("global", "lsu"),
            ("conversion", "xu"),
            ("fp32", "fma"),
            ("control", "issue"),
            ("local", "lsu"),
            ("shared", "lsu"),
            ("global", "lsu"),
        ]

    def test_accesses_registers_and_spills(self) -> None:
        listing = sass.parse(SASS)
        accesses = [(i.access, i.bits, i.address) for i in listing.instructions if i.access]
        assert accesses[0][:2] == (LOAD, 64)
        assert {"R10", "R11"} <= set(accesses[0][2])
        assert [access[:2] for access in accesses[1:]] == [(LOAD, 128), (STORE, 16)]
        assert listing.instructions[6].writes == ("R12", "R13", "R14", "R15")
        assert (listing.registers, listing.spills) == (24, 1)

    def test_flow_and_addresses_that_differ_between_threads(self) -> None:
        listing = sass.parse(SASS)
        flows = [(i.flow, i.target) for i in listing.instructions]
        assert [flows[i] for i in (4, 9, 13, 14)] == [(MAY_EXIT, -1), (BRANCH, 6), (EXIT, -1), (JUMP, 14)]
        assert varying_accesses(listing, blocks_of(listing.instructions)) == {6, 12}

    def test_text_without_code_is_refused(self) -> None:
        with pytest.raises(ValueError, match="cuobjdump"):
            sass.parse("Resource usage:")


AMDGCN = """
_scale_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_waitcnt lgkmcnt(0)
\tv_lshlrev_b32_e32 v1, 4, v0
\tv_cmp_gt_u32_e32 vcc, s4, v0
\ts_and_saveexec_b64 s[6:7], vcc
\ts_cbranch_execz .LBB0_2
\tglobal_load_dwordx4 v[4:7], v1, s[2:3]
\tglobal_load_dword v8, v9, s[2:3]        ; the same for all
\tbuffer_load_ushort v10, v1, s[8:11], 0 offen
\tv_pk_mul_f32 v[4:5], v[4:5], s[4:5]
\tv_cvt_f32_u32_e32 v6, v6
\tv_mul_lo_u32 v7, v7, v8
\tv_add_f64 v[12:13], v[4:5], v[6:7]
\tds_write_b64 v1, v[4:5]
\tds_bpermute_b32 v3, v1, v4
\tglobal_store_dwordx2 v[4:5], v[6:7], off
.LBB0_2:
\ts_endpgm
    .vgpr_count:     14
    .sgpr_spill_count: 0
    .vgpr_spill_count: 3
"""


class TestAmdgcn:
    def test_kinds_and_ports(self) -> None:
        found = [(i.kind, i.pipe) for i in amdgcn.parse(AMDGCN).instructions]
        assert found[:4] == [("scalar", "smem"), ("control", "internal"), ("integer", "valu"), ("integer", "valu")]
        assert found[9:15] == [
            ("fp32", "valu"),
            ("conversion", "valu"),
            ("integer", "quarter"),
            ("fp64", "valu"),
            ("shared", "lds"),
            ("exchange", "lds"),
        ]

    def test_accesses_registers_spills_and_flow(self) -> None:
        listing = amdgcn.parse(AMDGCN)
        accesses = {i: (x.access, x.bits) for i, x in enumerate(listing.instructions) if x.access}
        assert accesses == {6: (LOAD, 128), 7: (LOAD, 32), 8: (LOAD, 16), 15: (STORE, 64)}
        assert (listing.registers, listing.spills) == (14, 3)
        assert (listing.instructions[5].flow, listing.instructions[5].target) == (BRANCH, 16)
        assert listing.instructions[12].writes == ("v12", "v13")
        assert varying_accesses(listing, blocks_of(listing.instructions)) == {6, 8, 15}

    def test_text_without_metadata_is_refused(self) -> None:
        with pytest.raises(ValueError, match="vgpr_spill_count"):
            amdgcn.parse("\ts_endpgm\n")


def load(bits: int) -> Instruction:
    return Instruction("load", "global", "lsu", ("t",), ("x",), LOAD, bits, ("t",))


def branch(target: int, flow: str = BRANCH) -> Instruction:
    return Instruction("branch", "control", "issue", flow=flow, target=target)


OP, STOP = Instruction("op", "integer", "alu"), Instruction("exit", "control", "issue", flow=EXIT)
STORED = dataclasses.replace(load(128), name="store", access=STORE, writes=())


def times_of(instructions: list[Instruction], loaded: int, stored: int = 0) -> dict[int, int]:
    """How often each instruction is executed, by its number."""
    # equal instructions are told apart by their names
    named = tuple(dataclasses.replace(each, name=f"{i}") for i, each in enumerate(instructions))
    path = executed(Listing(named, 1, 0, frozenset({"t"})), loaded, stored)
    return {int(instruction.name): times for instruction, times in path}


class TestPath:
    def test_first_loop_takes_what_it_can(self) -> None:
        # four rows per trip, then one; a bypass for each
        code = [branch(7), OP, load(128), load(128), load(128), load(128), branch(1), branch(11), OP, load(128)]
        code += [branch(8), STOP]
        assert times_of(code, 8 * 16) == {0: 1, **dict.fromkeys(range(1, 7), 2), 7: 1, 11: 1}
        assert times_of(code, 9 * 16) == {
            0: 1,
            **dict.fromkeys(range(1, 7), 2),
            7: 1,
            **dict.fromkeys(range(8, 11), 1),
            11: 1,
        }

    def test_wide_path_is_taken(self) -> None:
        narrow = [load(32)] * 4
        code = [branch(4), load(128), OP, branch(8, JUMP), *narrow, STORED, STOP]
        assert set(times_of(code, 16, 16)) == {0, 1, 2, 3, 8, 9}

    def test_rare_detours_do_not_count_but_masked_loads_do(self) -> None:
        # a slow path that comes back, and a load that a branch may jump over
        code = [branch(3), OP, OP, branch(5), load(128), STOP]
        assert set(times_of(code, 16)) == {0, 3, 4, 5}

    def test_loop_whose_loads_do_not_come_out_is_refused(self) -> None:
        with pytest.raises(ValueError, match="loads 24 bytes"):
            times_of([load(128), branch(0), STOP], 24)

    def test_flow_ends_where_the_kernel_does(self) -> None:
        may_exit = dataclasses.replace(STOP, flow=MAY_EXIT)
        blocks = blocks_of([OP, may_exit, OP, STOP, branch(4, JUMP)])
        assert [(block.first, block.last, block.following, block.ends) for block in blocks] == [
            (0, 1, (1,), True),
            (2, 3, (), True),
            (4, 4, (2,), False),
        ]
        assert OP.flow == NEXT


class TestRooflines:
    def test_memory(self) -> None:
        assert memory_seconds(H100, 3.35) == pytest.approx(1e-12, rel=1e-12)

    def test_slowest_port_decides(self) -> None:
        clock = A100.processors * A100.clock
        assert issue_seconds(A100, {"alu": 4, "fma": 4, "issue": 2}) == (10 / 128 / clock, "issue")
        assert issue_seconds(A100, {"alu": 6, "fma": 2}) == (6 / 64 / clock, "alu")
        # on H100 multiply-adds have twice the lanes, but those of integers do not
        assert issue_seconds(H100, {"fma": 4, "imad": 4})[1] == "imad"
        assert issue_seconds(A100, {"xu": 2, "fma": 4})[1] == "xu"

    def test_vector_ports_of_amd_work_beside_the_scalar_ones(self) -> None:
        seconds, port = issue_seconds(MI300X, {"valu": 4, "quarter": 1, "salu": 7, "internal": 99})
        assert port == "valu+quarter"
        assert seconds == (4 / 64 + 1 / 16) / (MI300X.processors * MI300X.clock)

    def test_peaks_of_the_data_sheets(self) -> None:
        fp32 = {"sm_80": 19.5, "sm_90": 67, "sm_100": 75}
        for target, peak in fp32.items():
            gpu = GPUS[target]
            lanes = next(port["fma"] for port in gpu.ports if "fma" in port)
            assert 2 * lanes * gpu.processors * gpu.clock == pytest.approx(1e12 * peak, rel=0.01)


def test_the_report_has_every_kernel_and_says_what_missed() -> None:
    found = found_in("sm_90", "fp32")
    narrow = dataclasses.replace(found[0], loads={"32": 16})
    text = document([narrow, *found[1:]], [])
    assert all(f"| {finding.label} | {finding.dtype} |" in text for finding in found)
    assert "**missed by" in text


def test_a_variant_is_easy_to_derive() -> None:
    variant = next(v for v in all_variants() if (v.label, v.dtype) == ("encode", "bf16"))
    halved = dataclasses.replace(variant, elements=variant.elements // 2)
    assert isinstance(halved, Variant)
    assert halved.widths(halved.reads) == {64: 2}
