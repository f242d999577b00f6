"""Claims about compiled kernels, and the reading of machine code; tests/test_triton_compile.py compiles them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gpu_report.code import Code, read_amdgcn, read_sass
from gpu_report.compiling import REPORTED, TARGETS, kinds_of, widest_share
from gpu_report.report import broken_claims, write_report
from reporting.records import RecordsError, run_record
from speed.cases import CASES
from speed.data import DTYPES

FINDING = {"kind": "kernel", "label": "encode", "dtype": "fp32", "target": "sm_90", "error": ""}
FINDING |= {"least_loads": 128, "least_stores": 8, "registers": 28, "spills": 0, "loads": 128, "stores": 8, "fused": []}


def test_a_thread_s_share_of_a_row_decides_what_is_wide() -> None:
    codes, floats = torch.empty(8, 512, dtype=torch.uint8), torch.empty(4096)
    assert [widest_share([codes, floats], threads) for threads in (512, 1024, 2048)] == [128, 128, 64]
    # half a byte of codes is loaded as a whole one
    assert (widest_share([codes], threads=1024), widest_share([], threads=1)) == (8, 0)


def test_what_is_reported_has_every_op_and_kind() -> None:
    assert {case.op for case in REPORTED.values()} == {case.op for case in CASES} - {"lion_ema"}
    assert kinds_of(REPORTED["foreach_lion_step_"]) == ["fp32", "bf16", "fp16", "mixed"]
    assert (kinds_of(REPORTED["pack_signs"]), kinds_of(REPORTED["spread_codes"])) == (list(DTYPES), ["packed"])


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
