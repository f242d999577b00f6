"""What the Triton kernels compile to: claims about some of them, and the reading of machine code.

`make gpu-report` holds the claims of all of them. Interpreted functions cannot be compiled, so the kernels are compiled
in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_report.code import Code, read_amdgcn, read_sass
from gpu_report.compiling import TARGETS
from gpu_report.report import broken_claims, write_report
from gpu_report.variants import all_variants
from reporting.records import Record, RecordsError, run_record

BENCH = Path(__file__).parents[2] / "bench"
FINDING = {"kind": "kernel", "label": "encode", "dtype": "fp32", "target": "sm_90", "error": ""}
FINDING |= {"least_loads": 128, "least_stores": 8, "registers": 28, "spills": 0, "loads": 128, "stores": 8, "fused": []}


def test_variants_have_names_of_their_own_and_say_the_least_that_moves() -> None:
    variants = {(variant.label, variant.dtype): variant for variant in all_variants()}
    assert len(variants) == len(all_variants())
    assert variants["vote", "codes"].bytes_per_element == 9 / 8
    # half a byte of codes is loaded as a whole one
    assert variants["vote", "codes"].widths((1 / 8,)) == {128: 1}
    assert variants["vote", "codes"].widths((1 / 4096,)) == {8: 1}


@pytest.mark.parametrize(("target", "first"), [("sm_90", 0), ("gfx942", 5)])
def test_claims_hold_of_some_kernels(target: str, first: int) -> None:
    chosen = all_variants()[first::15]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCH / "gpu_report"), "--json", "--targets", target]
    pairs = {(variant.label, variant.dtype) for variant in chosen}
    command += ["--only", *(f"{label}/{dtype}" for label, dtype in sorted(pairs))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    findings: list[Record] = json.loads(done.stdout)
    assert {(found["label"], found["dtype"]) for found in findings} == pairs
    assert {claim: kernels for claim, kernels in broken_claims(findings).items() if kernels} == {}


def test_broken_claims_name_the_kernel() -> None:
    changes = [{"error": "TypeError: no"}, {"spills": 3}, {"loads": 64}, {"fused": ["FFMA"]}]
    for i, change in enumerate(changes):
        broken = list(broken_claims([{**FINDING, **change}]).values())
        assert [bool(kernels) for kernels in broken] == [number == i for number in range(4)], change
        assert broken[i][0].startswith("encode, fp32, sm_90")
    # what rounds as it likes
    assert not any(broken_claims([FINDING, {**FINDING, "label": "quantize", "fused": ["FFMA"]}]).values())


def test_the_report_has_every_kernel(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("<!-- gpu -->\n<!-- /gpu -->\n")
    findings = [{**FINDING, "target": target} for target in TARGETS]
    write_report([run_record(), *findings], tmp_path, page)
    assert "| encode | 28 | 28 | 28 | 28 | 28 | 128 | 8 |" in page.read_text()
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    with pytest.raises(RecordsError, match="got a part"):
        write_report([run_record(), *findings[1:]], tmp_path, page)


SASS = """
 Function _scale_kernel:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:380 TEXTURE:0 SURFACE:0 SAMPLER:0

        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0020*/                   LDG.E.64 R8, desc[UR4][R10.64] ;          /* 0x0 */
        /*0060*/               @P0 LDG.E.128 R12, [R4.64+0x10] ;             /* 0x0 */
        /*0080*/                   FFMA R3, R3, R13, R4 ;                    /* 0x0 */
        /*00a0*/              @!P1 STL [R1], R3 ;                            /* 0x0 */
        /*00c0*/                   STG.E.U16 desc[UR4][R4.64], R3 ;          /* 0x0 */
        /*00d0*/                   EXIT ;                                    /* 0x0 */
"""
AMDGCN = """
_scale_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\tglobal_load_dwordx4 v[4:7], v1, s[2:3]
\tbuffer_load_ushort v10, v1, s[8:11], 0 offen
\tv_pk_fma_f32 v[4:5], v[4:5], s[4:5]
\tglobal_store_dwordx2 v[4:5], v[6:7], off
    .vgpr_count:     14
    .sgpr_spill_count: 0
    .vgpr_spill_count: 3
"""


def test_machine_code_is_read() -> None:
    assert read_sass(SASS, "add.ftz.f32") == Code(24, 1, 128, 16, ("FFMA", "ftz"))
    assert read_sass(SASS.replace("FFMA", "FMUL").replace("STL", "STS"), "") == Code(24, 0, 128, 16, ())
    assert read_amdgcn(AMDGCN) == Code(14, 3, 128, 64, ("v_pk_fma_f32",))


def test_text_without_code_is_refused() -> None:
    with pytest.raises(ValueError, match="cuobjdump"):
        read_sass("Resource usage:", "")
    with pytest.raises(ValueError, match="no instructions"):
        read_amdgcn("")
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        read_amdgcn("\ts_endpgm\n")
