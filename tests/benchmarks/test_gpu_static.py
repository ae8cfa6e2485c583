"""The compile gate: no kernel has a fault on these architectures, and every kind of fault is found."""

import json
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain

import pytest
import torch

pytest.importorskip("triton")
if sys.platform != "linux":
    pytest.skip("Triton compiles on Linux alone", allow_module_level=True)

from wavlm_fast import ops
from wavlm_fast.benchmarks.gpu import static as gpu_static
from wavlm_fast.benchmarks.gpu.architectures import ARCHITECTURES
from wavlm_fast.benchmarks.gpu.bound import matrix_operations
from wavlm_fast.benchmarks.gpu.cases import DTYPES, cases, packed, packed_stages, wide_heads
from wavlm_fast.benchmarks.gpu.code import Mix
from wavlm_fast.benchmarks.gpu.compile import Built, Product, build, record
from wavlm_fast.benchmarks.gpu.static import BOUNDS, QUICK, Task, faults, judge, main, per_score, tasks
from wavlm_fast.kernels._target import pretend
from wavlm_fast.kernels.add_layer_norm import add_layer_norm
from wavlm_fast.kernels.gated_attention import gated_attention

OPS = sorted({case.op for case in cases("base", torch.bfloat16)})
ATTENTION = "gated_attention_fwd_kernel"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_case_is_a_valid_call(dtype):
    """The fake kernels check shapes and dtypes, of backward ops too."""
    many = (cases("base", dtype), cases("large", dtype), wide_heads(dtype), packed(dtype))
    for case in chain(*many, packed_stages("base", dtype), packed_stages("large", dtype)):
        getattr(torch.ops.wavlm_fast, case.op)(*case.args)


def test_cases_are_of_the_calls_that_the_ops_describe(monkeypatch):
    op = ops.OPS["add_layer_norm"]
    described = replace(op, example=lambda *shape, **options: {**op.example(*shape, **options), "eps": 0.5})
    monkeypatch.setitem(ops.OPS, "add_layer_norm", described)
    found = [case.args for case in cases("base", torch.bfloat16) if case.op.startswith("add_layer_norm")]
    assert [[a for a in args if isinstance(a, float)] for args in found] == [[0.5], [0.5]]


@pytest.mark.parametrize("architecture", QUICK)
@pytest.mark.parametrize("op", OPS)
def test_no_kernel_has_a_fault(op, architecture):
    rows = [judge(task) for task in tasks([architecture], ["bf16"], op, [0]) if task.op == op]
    assert [f"{row.kernel} {row.constants}: {fault}" for row in rows for fault in row.faults] == []


def test_every_op_is_compiled():
    """Only what linear_act's backward launches is launched by others as well, and compiled for them."""
    assert {task.op for task in tasks(["sm_90"], ["bf16"], "", [0])} == {*OPS} - {"linear_act_backward"}


def test_tf32_is_compiled_where_it_exists():
    found = {name: tasks([name], ["tf32"], "", [0]) for name in ("sm_80", "gfx942", "gfx90a")}
    assert {task.op for task in found["sm_80"]} >= {"gated_attention", "gated_attention_backward", "strided_conv"}
    assert {task.op for task in found["gfx942"]} == {"gated_attention", "gated_attention_backward"}
    assert {t.launch.arguments["PRECISION"] for t in found["sm_80"] + found["gfx942"]} == {"tf32"}
    assert not found["gfx90a"]
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(("architecture", "convolutions"), [("sm_80", "bf16x6"), ("sm_86", "ieee")])
def test_without_tf32_nothing_is_compiled_for_it(architecture, convolutions):
    """Convolutions are made of bf16 pieces where those pay."""
    by_op = {}
    for task in tasks([architecture], ["fp32"], "", [0]):
        by_op.setdefault(task.op, set()).add(task.launch.arguments.get("PRECISION", "ieee"))
    assert by_op["gated_attention"] == by_op["gated_attention_backward"] == {"ieee"}
    assert by_op["tdnn"] == {convolutions}
    assert set().union(*by_op.values()) == {"ieee", convolutions}


def test_attention_is_compiled_with_wide_heads_and_for_packed_frames():
    found = tasks(["sm_80"], ["bf16"], "gated_attention", [0])
    launches = [(t.launch.name, t.launch.arguments) for t in found if "D" in t.launch.arguments]
    heads = Counter((name, arguments["D"], arguments["PACKED"]) for name, arguments in launches)
    assert set(heads.values()) == {1}
    assert set(heads) == {
        (f"gated_attention_{kernel}_kernel", D, packed) for kernel in ("fwd", "bwd_dq", "bwd_dkv", "bwd_dbias")
        for D in (64, 80, 128) for packed in (False, True)
    }  # fmt: skip


def first(op, kernel, architecture="sm_90", dtype="bf16"):
    return next(t for t in tasks([architecture], [dtype], op, [0]) if t.launch.name == kernel)


def sound(**changes):
    """A kernel in which nothing is wrong."""
    loop = Mix(Counter(matrix=8, fp32=100))
    made = Built(registers=128, spilled=0, shared=65536, warps=8, resident=2, loops=[loop], whole=loop,
                 products=[Product(128, 64, 64, "half")])  # fmt: skip
    return replace(made, **changes)


def test_nothing_wrong_is_no_fault():
    assert faults(first("gated_attention", ATTENTION), sound()) == ()


def test_a_spill_is_a_fault_of_the_default_alone():
    task = first("gated_attention", ATTENTION)
    assert "spills 8 bytes" in faults(task, sound(spilled=8))[0]
    assert faults(replace(task, default=False), sound(spilled=8)) == ()


@pytest.mark.parametrize("place", gpu_static.SPILLS, ids=" ".join)
def test_a_known_spill_is_there(place):
    """Outside its loops, and no more bytes than are written down: what is mended leaves the table."""
    (kernel, architecture, dtype), (size, _) = place, gpu_static.SPILLS[place]
    found = [t for t in tasks([architecture], [dtype], "", [0]) if t.launch.name == kernel]
    task = next(t for t in found if gpu_static.known_spill(t, sound()))
    row = judge(task)
    assert 0 < row.spilled <= row.known == size and row.faults == ()
    made, elsewhere = sound(spilled=size, products=[]), replace(task, architecture=ARCHITECTURES["sm_89"])
    fault = (f"spills {size} bytes per thread",)
    assert faults(task, made) == ()
    assert faults(task, replace(made, spilled=size + 1)) == (f"spills {size + 1} bytes per thread",)
    assert faults(task, replace(made, loops=[Mix(Counter(matrix=8, local=1))])) == fault
    assert faults(elsewhere, made) == fault


def test_too_much_shared_memory_is_a_fault_of_every_configuration():
    task = first("gated_attention", ATTENTION)
    assert faults(task, sound(shared=227 * 1024)) == ()
    assert "shared memory" in faults(replace(task, default=False), sound(shared=227 * 1024 + 1))[0]


def test_too_many_registers_are_a_fault():
    assert faults(first("gated_attention", ATTENTION), sound(resident=0)) == ("does not fit a multiprocessor",)


def test_half_precision_without_the_matrix_unit_is_a_fault():
    task, slow = first("tdnn", "frames_product_kernel"), Mix(Counter(fp32=100))
    assert "tensor cores" in faults(task, sound(loops=[slow], whole=slow))[0]
    full_precision = [Product(128, 64, 64, "fp32")]
    assert faults(task, sound(loops=[slow], whole=slow, products=full_precision)) == ()


@pytest.mark.parametrize("default", [True, False])
def test_more_instructions_per_score_than_the_bound_are_a_fault(default):
    task = replace(first("gated_attention", ATTENTION, "sm_80"), default=default)
    a = task.launch.arguments
    scores = a["BLOCK_M"] * a["BLOCK_N"] / 256
    limit = BOUNDS[ATTENTION, "sm_80"][0 if default else 1]
    few, many = (Mix(Counter(matrix=8, fp32=int(limit * scores) + more)) for more in (0, 1))
    assert per_score(task.launch, sound(loops=[many]), task.architecture) == pytest.approx(limit, abs=1.5 / scores)
    assert faults(task, sound(loops=[few])) == ()
    assert "instructions per score" in faults(task, sound(loops=[many]))[0]


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
def test_a_tile_that_is_too_large_spills(architecture):
    x = torch.empty(8, 16384, device="meta")
    (launch,) = record(add_layer_norm, x, x, x[0], x[0], 1e-5, True)
    task = Task("add_layer_norm", launch, "fp32", ARCHITECTURES[architecture])
    assert judge(task).faults == ()
    row = judge(replace(task, launch=replace(launch, options={"num_warps": 1})))
    assert row.spilled > 0
    assert row.faults == (f"spills {row.spilled} bytes per thread",)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_loop_multiplies_what_the_kernel_says(architecture, dtype):
    """Instructions, and the shapes in their names, against the tile that Triton was given."""
    task = first("positional_conv", "frames_product_kernel", architecture, dtype)
    built = build(task.launch, task.architecture)
    operations = matrix_operations(built.loop, built)
    (product,) = built.products
    pieces = dtype == "fp32" and architecture in ("sm_80", "sm_90")
    assert product.times == (6 if pieces else 1)
    if dtype == "fp32" and not pieces and architecture != "gfx942":
        assert not operations
        lanes = built.warps * 32
        each = 4 if architecture == "sm_100" else 2  # FFMA2 does two multiply-adds
        assert built.loop.counts["fp32"] * lanes >= product.operations / each
    else:
        assert operations == {"fp32" if dtype == "fp32" and not pieces else "half": product.operations}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_attention_on_hopper_takes_less_than_eight_instructions_per_score(dtype, packed):
    """The default with the models' heads, and nothing is spilled."""
    found = [t for t in tasks(["sm_90"], [dtype], "gated_attention", [0]) if t.launch.name == ATTENTION]
    wanted = {"D": 64, "PACKED": packed}
    (task,) = (t for t in found if wanted.items() <= t.launch.arguments.items())
    row = judge(task)
    assert row.per_score < 8 and row.spilled == 0 and row.faults == ()


@pytest.mark.parametrize(("chip", "architecture"), [("hopper", "sm_90"), ("blackwell", "sm_100")])
def test_attention_with_dropout_spills_nothing(chip, architecture):
    """No case has it; its hashes take registers."""
    (case,) = (case for case in cases("base", torch.bfloat16, backward=False) if case.op == "gated_attention")
    *operands, _, _, scale = case.args
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    with pretend(chip):
        launches = record(gated_attention, *operands, 0.1, seed, scale)
    (launch,) = (launch for launch in launches if launch.name == ATTENTION)
    assert launch.arguments["DROPOUT"]
    assert build(launch, ARCHITECTURES[architecture]).spilled == 0


def test_what_a_score_takes_is_told_by_name():
    row = judge(first("gated_attention", ATTENTION))
    assert sum(row.names.values()) == pytest.approx(row.per_score)
    assert "exp MUFU.EX2" in row.names and not any(name.startswith("matrix") for name in row.names)
    said = gpu_static.instructions(row).split("\n")
    assert float(said[0].split()[0]) == max(float(text.split()[0]) for text in said[:-1])
    assert sum(float(text.split()[0]) for text in said) == pytest.approx(row.per_score, abs=0.1)


def test_the_command(capsys, tmp_path):
    path = tmp_path / "rows.json"
    chosen = ["--arch", "sm_80", "gfx90a", "--dtype", "fp16", "--op", "position_gate", "--defaults"]
    assert main([*chosen, "--jobs", "2", "--json", str(path)]) == 0
    said = capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(r["architecture"], r["kernel"]) for r in rows] == [
        (architecture, f"position_gate_{way}_kernel") for architecture in ("sm_80", "gfx90a") for way in ("fwd", "bwd")
    ]
    assert said.count("position_gate_fwd") == 2
    assert "No fault found in 4 kernels." in said


def test_the_command_names_known_spills(capsys, monkeypatch):
    def made(launch, architecture):
        a = launch.arguments
        known = launch.name == ATTENTION and a["D"] == 64 and a["PACKED"]
        return sound(spilled=12 if known else 0, products=[])

    monkeypatch.setattr(gpu_static, "build", made)
    assert main(["--arch", "sm_80", "--dtype", "tf32", "--op", "gated_attention", "--defaults", "--jobs", "1"]) == 0
    *_, known, verdict = capsys.readouterr().out.splitlines()
    assert known == f"{ATTENTION} sm_80 tf32: spills 12 bytes per thread, 16 are known"
    assert verdict.startswith("No fault found in ")


def test_the_command_fails_on_a_fault(capsys, monkeypatch):
    monkeypatch.setattr(gpu_static, "build", lambda launch, architecture: sound(spilled=4))
    assert main(["--arch", "sm_80", "--dtype", "fp16", "--op", "position_gate", "--jobs", "1"]) == 1
    assert "position_gate_fwd_kernel sm_80 fp16: spills 4 bytes per thread" in capsys.readouterr().out
