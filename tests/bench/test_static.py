"""Static analysis: the machine code parser, the gates and the committed table."""

import os
from pathlib import Path

import pytest

pytest.importorskip("triton")

from bench import ROOT, static
from bench.compiler.aot import Pool, feature_figures, triton_version
from bench.compiler.device_model import DEVICES, Clocks, product_fma
from bench.compiler.machine_code import Instruction, Listing

LOOP = """
.text.forward_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], [R6.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0040*/                   MUFU.EX2 R3, R3 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/                   MUFU.EX2 R4, R4 ;
        {body}
        /*0080*/              @!P0 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def sass(body: str = "NOP") -> Listing:
    return Listing.sass(LOOP.replace("{body}", f"/*0070*/  {body} ;"))


def test_a_loop_is_found_and_read():
    listing = sass()
    (loop,) = listing.product_loops
    assert len(loop.body) == 7 and loop.products == 1 and loop.exponentials == 2
    assert loop.hidden == 0.5, "one exponential runs beside the product, one after the wait"
    assert listing.local == 1 and listing.local_in_loops == 0, "a spill before the loop costs once"


@pytest.mark.parametrize("spill", ["STL.64 [R1+0x8], R2", "LDL.LU R2, [R1]"])
def test_a_spill_inside_a_loop_is_flagged(spill):
    assert sass(spill).local_in_loops == 1


def test_a_jump_back_from_code_out_of_line_is_no_loop():
    """A spin on a barrier that ptxas placed after the end jumps back into the loop, and a spill beside it counts."""
    listing = Listing.sass("""
.L_x_1:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0010*/               @P1 BRA `(.L_x_3) ;
.L_x_2:
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/                   STL [R1], R2 ;
        /*0040*/                   EXIT ;
.L_x_3:
        /*0050*/                   STL [R1], R3 ;
        /*0060*/                   BRA `(.L_x_2) ;
""")
    (loop,) = listing.loops
    assert [x.op for x in loop.body] == ["HMMA.16816.F32.BF16", "BRA", "BRA", "STL", "BRA"]
    assert listing.local == 2 and listing.local_in_loops == 1


def test_the_full_sweep_is_innermost_and_shortest():
    listing = Listing.sass("""
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   FSEL R4, R4, R5, P2 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/               @P0 BRA `(.L_x_3) ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
""")
    assert len(listing.loops) == 3 and len(listing.product_loops) == 2
    assert [len(x.body) for x in listing.full_sweeps()] == [2]


def test_gcn_loops_and_scratch():
    listing = Listing.gcn("""
\ts_load_dwordx4 s[4:7], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header
\tbuffer_load_dwordx4 v[0:3], v8, s[4:7], 0 offen
\tglobal_load_ushort v4, v[6:7], off
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[2:3], v[4:5], v[0:15]
\tscratch_store_dword off, v1, s33
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
""")
    (loop,) = listing.product_loops
    assert [x.load_bytes for x in loop.body if x.load_bytes] == [16, 2]
    assert listing.local_in_loops == 1


@pytest.mark.parametrize(
    ("op", "width"),
    [
        ("LDG.E.128", 16), ("LDGSTS.E.BYPASS.LTC128B.128", 16), ("LDG.E.64.CONSTANT", 8), ("LDG.E", 4),
        ("LDGSTS.E", 4), ("LDG.E.U16", 2), ("LDG.E.U8", 1), ("LDGDEPBAR", 0), ("LDS.128", 0), ("LDSM.16.M88.4", 0),
        ("global_load_dwordx2", 8), ("buffer_load_ubyte", 1),
    ],
)  # fmt: skip
def test_load_width(op, width):
    assert Instruction(op).load_bytes == width


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 255, 0, 8, 1),
        ("sm_90", 128, 0, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 32, 100 * 1024, 4, 2),
        ("sm_90", 32, 228 * 1024, 4, 0),
        ("sm_80", 255, 82 * 1024, 4, 1),
        ("sm_89", 64, 0, 8, 4),
        ("gfx942", 128, 0, 4, 4),
        ("gfx942", 256, 0, 8, 1),
    ],
)
def test_occupancy(arch, registers, shared, warps, programs):
    assert DEVICES[arch].occupancy(registers, shared, warps) == programs


def test_occupancy_of_tensor_memory():
    assert DEVICES["sm_100"].occupancy(32, 0, 4, tensor_columns=200) == 2


def test_clocks():
    assert product_fma("HGMMA.64x128x16.F32.BF16") == 64 * 128 * 16 // 4
    assert product_fma("HMMA.16816.F32.BF16") == 16 * 8 * 16
    trip = Clocks(tensor=1000, mufu=500, issue=700)
    assert trip.trip(hidden=0.0, programs=1) == 1700
    assert trip.trip(hidden=1.0, programs=1) == trip.trip(hidden=0.0, programs=2) == 1000


# Gates

GOOD = {
    "kernel": "forward", "target": "sm_90", "dtype": "bf16", "d": 128, "feature": "plain", "config": "128x64 w8 s2",
    "shared": 100_000, "local_in_loops": 0, "sweeps": 2, "wide_loads": 16, "bulk_loads": 0, "wgmma": 24,
    "serialised": "", "hidden": 1.0, "programs": 1,
}  # fmt: skip


def test_a_good_row_passes():
    assert static.gates(GOOD) == []
    assert static.gates(GOOD | {"hidden": 0.2, "programs": 2}) == []
    assert static.gates(GOOD | {"d": 64, "hidden": 0.85, "wide_loads": 8}) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shared": 227 * 1024 + 1}, "shared memory"),
        ({"target": "sm_120", "shared": 99 * 1024 + 1}, "shared memory"),
        ({"target": "gfx942", "shared": 64 * 1024 + 1}, "shared memory"),
        ({"local_in_loops": 1}, "local memory"),
        ({"target": "sm_80", "local_in_loops": 1}, "local memory"),
        ({"wgmma": 0}, "wgmma"),
        ({"serialised": "C7511"}, "serialises"),
        ({"hidden": 0.94}, "exponentials"),
        ({"d": 64, "hidden": 0.84}, "exponentials"),
        ({"wide_loads": 15}, "16 bytes"),
        ({"d": 72, "wide_loads": 0}, "16 bytes"),
        ({"feature": "additive", "feature_share": 0.79}, "special functions are 79%"),
        ({"feature": "additive", "kernel": "additive_backward", "feature_share": 0.29}, "30% needed"),
    ],
)
def test_each_gate_can_fail(change, word):
    (problem,) = static.gates(GOOD | change)
    assert word in problem


def test_single_precision_and_large_heads_are_listed_without_a_gate():
    bad = GOOD | {"local_in_loops": 9}
    assert static.gates(bad) and not static.gates(bad | {"dtype": "fp32"}) and not static.gates(bad | {"d": 512})


def test_two_launches_of_a_kernel_are_one_row_with_the_worse_of_each():
    dk = GOOD | {"local_in_loops": 0, "hidden": 0.9, "issue_clocks": 100.0, "serialised": ""}
    dv = GOOD | {"local_in_loops": 2, "hidden": 1.0, "issue_clocks": 50.0, "serialised": "C7511"}
    row = static.worst(dk, dv)
    assert (row["local_in_loops"], row["hidden"], row["issue_clocks"], row["serialised"]) == (2, 0.9, 150.0, "C7511")


# Freshness


def test_a_changed_kernel_makes_its_rows_stale_and_a_changed_comment_does_not(tmp_path, monkeypatch):
    for path in static.KERNELS.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(static, "KERNELS", tmp_path)
    before = static.source_hash.__wrapped__(("forward",))
    softmax = tmp_path / "softmax.py"
    softmax.write_text("# a comment\n" + softmax.read_text())
    assert static.source_hash.__wrapped__(("forward",)) == before
    backward = tmp_path / "backward.py"
    backward.write_text(backward.read_text() + "\nunrelated = 1\n")
    assert static.source_hash.__wrapped__(("forward",)) == before
    softmax.write_text(softmax.read_text().replace("tl.exp2(", "tl.exp(", 1))
    assert static.source_hash.__wrapped__(("forward",)) != before


def test_a_kernel_of_several_forms_is_all_of_its_files():
    files = static.kernel_files("hopper_backward")
    assert files == ("hopper_backward", "hopper_backward_wide")
    assert static.source_hash(files) != static.source_hash(files[:1])


def test_a_changed_configuration_makes_a_row_stale():
    (request,) = static.requests("sm_90/forward/bf16/128/plain")
    (row,) = request["rows"].values()
    table = {static.name(row): row}
    assert static.stale([request], table) == []
    case = request["case"]
    other = static.row_hash("forward", "sm_90", case, row["config"] + "x", row["triton"])
    assert static.stale([request], {static.name(row): row | {"hash": other}}) == [request]


def test_the_committed_table_is_fresh_and_passes_every_gate():
    problems = static.check()
    assert not problems, "run `make static`:\n" + "\n".join(problems[:40])


# Compilation


def older_triton() -> Path | None:
    """A folder that holds the table's triton; None where this process's triton is already that one."""
    if triton_version() == static.TRITON:
        return None
    path = Path(os.environ.get("FUSED_ATTN_TRITON36") or ROOT / ".venv" / "triton36")
    if not (path / "triton").is_dir():
        pytest.skip(f"triton {static.TRITON} is not in {path}; set FUSED_ATTN_TRITON36, or let `make test` install it")
    assert triton_version(path) == static.TRITON
    return path


def sample(count: int) -> list[dict]:
    """Rows spread evenly over the table, one to a request."""
    single = [
        request | {"rows": {kernel: row}} for request in static.requests() for kernel, row in request["rows"].items()
    ]
    single.sort(key=lambda x: next(iter(x["rows"].values()))["hash"])
    return single[:count]


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("count", (6, pytest.param(60, marks=pytest.mark.nightly)))
def test_a_sample_of_the_table_compiles_to_the_committed_figures(count):
    path, table = older_triton(), static.read()
    with Pool(2, path) as pool:
        rows = list(static.compile_rows(sample(count), pool))
    assert len(rows) == count
    for row in rows:
        assert "error" not in row, f"{static.name(row)}: {row['error']}"
        committed = table[static.name(row)]
        assert {x: "" if row.get(x) is None else str(row[x]) for x in static.COLUMNS} == committed, static.name(row)


@pytest.mark.aot
@pytest.mark.slow
def test_a_few_rows_pass_the_gates_under_this_triton():
    names = ("sm_90/forward/bf16/128/plain", "sm_80/dq/bf16/72/plain", "sm_90/decode/bf16/128/modified")
    wanted = [request for name in names for request in static.requests(name)]
    with Pool(2) as pool:
        rows = list(static.compile_rows(wanted, pool))
    for row in rows:
        assert "error" not in row, row["error"]
        assert not static.gates(row), static.name(row)


@pytest.mark.aot
@pytest.mark.nightly
def test_a_forced_spill_fails_the_gate():
    """256 x 128 scores in four warps cannot stay in registers."""
    (request,) = static.requests("sm_80/forward/bf16/128/plain")
    config = {"BLOCK_M": 256, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1, "overlap": False}
    request["configs"] = {"forward": config}
    request["rows"]["forward"]["config"] = "256x128 w4 s1"
    with Pool(1) as pool:
        (row,) = static.compile_rows([request], pool)
    assert row["local_in_loops"] > 0
    assert any("local memory" in problem for problem in static.gates(row))


@pytest.mark.aot
def test_compile_errors_are_reported():
    (request,) = static.requests("sm_80/forward/bf16/64/plain")
    request["configs"] = {"forward": {"BLOCK_M": 24, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}}
    with Pool(1) as pool:
        (row,) = static.compile_rows([request], pool)
    assert "BLOCK_M" in row["error"]


def test_loops_over_features_are_found_and_read():
    """One that adds up scores, of two reciprocals for four tanh; one that stores; a loop of products is neither."""

    def loop(label: int, *ops: str) -> str:
        lines = [f"        /*{i:04x}*/  {op} ;" for i, op in enumerate((*ops, f"@!P0 BRA `(.L_x_{label})"), 16 * label)]
        return "\n".join([f".L_x_{label}:", *lines])

    text = "\n".join([
        loop(1, "FFMA R1, R2, R3, R4", "MUFU.RCP R5, R1", "MUFU.RCP R6, R1"),
        loop(2, "MUFU.RCP R5, R1", "STG.E [R2], R5"),
        loop(3, "HMMA.16816.F32.BF16 R4, R8, R12, R4", "MUFU.RCP R5, R1"),
        loop(4, "MUFU.EX2 R5, R1", "MUFU.RCP R5, R1"),
    ])  # fmt: skip
    listing = Listing.sass(text)
    assert [len(x.body) for x in listing.feature_loops(True)] == [4, 3]
    assert [len(x.body) for x in listing.feature_loops(False)] == [3]
    found = feature_figures(listing, DEVICES["sm_90"], 4, True)
    assert (found["feature_special"], found["feature_issue"]) == (0.5 + 0.5, 4 / 4 + 3 / 2)
