"""Reading machine code: kinds, widths, products and loops; how many programs fit; which unit is busy longest."""

import pytest

pytest.importorskip("triton")

from collections import Counter

from wavlm_fast.benchmarks.gpu.architectures import ARCHITECTURES
from wavlm_fast.benchmarks.gpu.bound import bound, clocks
from wavlm_fast.benchmarks.gpu.code import Instruction, Mix, innermost, loops, mix, parse_amd, parse_nvidia
from wavlm_fast.benchmarks.gpu.compile import Built, Product

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 BRA 0x90 ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   LDGDEPBAR ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R6 ;
        /*0070*/              @!P4 BRA 0xb0 ;
        /*0080*/               @P0 BRA 0x20 ;
        /*0090*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R6 ;
        /*00c0*/              @!P4 BRA 0xb0 ;
        /*00d0*/                   BRA 0x80 ;
        /*00e0*/                   BRA 0xe0;
"""


def names(code):
    return [i.name for i in code]


def test_a_wait_at_the_end_is_part_of_the_loop_that_jumps_to_it():
    found = loops(parse_nvidia(SASS))
    (inner,) = innermost(found)
    assert {hex(i.place) for i in inner} == {hex(p) for p in (*range(0x20, 0x90, 16), 0xB0, 0xC0, 0xD0)}
    assert len(found) == 2  # the wait is a loop too, and does nothing


def test_a_loop_in_a_loop_is_the_inner_one():
    code = parse_amd("""
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Loop
	v_add_f32_e32 v0, v1, v2
.LBB0_2:
	v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
	s_cbranch_scc1 .LBB0_2
	ds_read2st64_b64 v[2:5], v6 offset1:4
	s_cbranch_vccnz .LBB0_1
	s_branch .LBB0_4
.LBB0_3:
	s_nop 0
	s_branch .LBB0_2
.LBB0_4:
	s_endpgm
""")
    found = loops(code)
    assert sorted(map(len, found)) == [2, 5]
    assert names(innermost(found)[0]) == ["v_mfma_f32_32x32x8_bf16", "s_cbranch_scc1"]


@pytest.mark.parametrize(
    ("text", "kind", "width"),
    [
        ("LDGSTS.E.BYPASS.128 [R93], desc[UR16][R12.64]", "load", 16),
        ("LDG.E.U16 R3, desc[UR4][R2.64]", "load", 2),
        ("LDSM.16.MT88.4 R4, [R2]", "shared", 16),
        ("LDS.64 R4, [R2]", "shared", 8),
        ("STS [R2], R4", "shared", 4),
        ("LDL R4, [R1]", "local", 0),
        ("LDGDEPBAR", "control", 0),
        ("MUFU.EX2 R4, R5", "exp", 0),
        ("FFMA.FTZ R4, R5, R6, R7", "fp32", 0),
        ("DFMA R4, R6, R8, R10", "fp64", 0),
        ("ISETP.GE.AND P0, PT, R4, R5, PT", "integer", 0),
        ("global_load_dwordx4 v[0:3], v4, s[0:1]", "load", 16),
        ("ds_write_b128 v0, v[1:4]", "shared", 16),
        ("ds_read2_b64 v[0:3], v4", "shared", 16),
        ("scratch_store_dword off, v0, s0", "local", 0),
        ("v_exp_f32_e32 v0, v1", "exp", 0),
        ("v_fma_f64 v[0:1], v[2:3], v[4:5], v[6:7]", "fp64", 0),
        ("v_fma_f32 v0, v1, v2, v3", "fp32", 0),
        ("v_lshl_add_u64 v[0:1], v[2:3], 1, v[4:5]", "integer", 0),
        ("s_waitcnt vmcnt(0)", "control", 0),
    ],
)
def test_kinds_and_widths(text, kind, width):
    found = Instruction(0, text)
    assert (found.kind, found.width) == (kind, width)


@pytest.mark.parametrize(
    ("text", "type_", "operations"),
    [
        ("HMMA.16816.F32.BF16 R8, R4, R6, R8", "half", 4096),
        ("HMMA.16816.F32 R8, R4, R6, R8", "half", 4096),
        ("HMMA.1688.F32.TF32 R8, R4, R6, R8", "tf32", 2048),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20].tnspB, R24", "half", 65536),
        ("HGMMA.64x64x8.F32.TF32 R24, R4, gdesc[UR8], R24", "tf32", 16384),
        ("v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]", "half", 16384),
        ("v_mfma_f32_32x32x8f16 a[0:15], v[16:17], v[18:19], a[0:15]", "half", 16384),
        ("v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]", "fp32", 2048),
        ("v_mfma_f32_16x16x8_xf32 v[0:3], v[4:5], v[6:7], v[0:3]", "tf32", 4096),
        ("FFMA R4, R5, R6, R7", "", 0),
    ],
)
def test_products(text, type_, operations):
    assert Instruction(0, text).product() == (type_, operations)


def test_what_a_warp_moves():
    found = mix(parse_nvidia(SASS), 32)
    assert found.counts == {"integer": 2, "control": 10, "load": 1, "matrix": 1, "store": 1}
    assert (found.loaded_bytes, found.shared_bytes) == (512, 0)
    both = mix([Instruction(0, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20].tnspB, R24")], 32)
    rows_in_registers = mix([Instruction(0, "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24")], 32)
    assert (both.shared_bytes, rows_in_registers.shared_bytes) == ((128 + 64) * 32 // 4, 128 * 32 // 4)


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared", "programs"),
    [
        ("sm_80", 8, 128, 0, 2),  # registers
        ("sm_80", 8, 129, 0, 1),  # come in eights
        ("sm_80", 4, 32, 40 * 1024, 4),  # shared memory
        ("sm_80", 4, 32, 164 * 1024, 0),  # more than a program may have
        ("sm_86", 4, 32, 0, 12),  # threads
        ("sm_86", 1, 16, 0, 16),  # programs
        ("gfx942", 4, 128, 0, 4),
        ("gfx942", 4, 512, 0, 1),
        ("gfx942", 4, 64, 32 * 1024, 2),
    ],
)
def test_resident_programs(architecture, warps, registers, shared, programs):
    assert ARCHITECTURES[architecture].resident(warps, registers, shared) == programs


def test_clocks_and_bound():
    loop = Mix(Counter(matrix=2, fp32=10, exp=16, integer=6), Counter(half=131072), shared_bytes=640, loaded_bytes=256,
               integer_names=Counter({"IADD3": 4, "UIADD3": 2}))  # fmt: skip
    built = Built(registers=128, spilled=0, shared=0, warps=8, resident=1, products=[Product(128, 64, 64, "half")])
    found = clocks(loop, built, ARCHITECTURES["sm_90"])
    assert found == {
        "matrix": 256, "issue": 68, "fp32": 20, "fp64": 0, "integer": 16, "exp": 256, "shared": 40, "load": 32,
    }  # fmt: skip
    loop.counts["exp"] = 32
    assert str(bound(loop, built, ARCHITECTURES["sm_90"])) == "exp, 50 % of matrix peak"
    built.products.clear()
    assert str(bound(loop, built, ARCHITECTURES["sm_90"])) == "exp"
