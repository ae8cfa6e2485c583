"""Single ops: everything is there, what is counted is what torch counts, and nothing is timed that is wrong."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SIZES
from torch.utils.flop_counter import FlopCounterMode

import wavlm_fast.ops
from wavlm_fast import measure
from wavlm_fast.benchmarks.ops import cases as ops
from wavlm_fast.benchmarks.ops import providers as op_providers
from wavlm_fast.benchmarks.run import cases, flops, peaks
from wavlm_fast.parity import plain

LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
ROOT = Path(__file__).parents[2]
PEAKS = peaks.Peaks(2e11, None, "made up")
ROW = {
    "case", "group", "model", "cls", "batch", "length", "provider", "family", "dtype", "ours", "audio", "gflop",
    "error", "allowed", "problem", "wrong", "note", "seconds", "factor", "gflops", "peak_gflops", "share",
    "ours_faster",
}  # fmt: skip


@pytest.fixture(autouse=True)
def models(monkeypatch):
    """The sizes of published models are too large for tests, and the memory of tiny ones need not be given back."""
    monkeypatch.setattr(ops.memory, "give_back_freed", lambda: None)
    monkeypatch.setitem(cases.MODELS, "base", cases.Spec(options=SIZES))
    monkeypatch.setitem(cases.MODELS, "large", cases.Spec(options={**SIZES, **LARGE}))


def case_of(what, training=False, model="base", batch=2, length=0.3):
    (found,) = (c for c in ops.op_cases(model, batch, length) if c.what == what and c.training == training)
    return found


def quick(dtype=torch.float32):
    """What needs no compiler."""
    compiled = ("torch + compile", "FlexAttention")
    found, _ = op_providers.op_providers("cpu")
    return {n: p for n, p in found.items() if p.family not in compiled and p.dtype == dtype}


def by_provider(rows):
    return {row["provider"]: row for row in rows}


def test_every_op_has_cases():
    """An op that is added wants a case here."""
    assert {c.op for c in ops.op_cases("base", 2, 0.3)} == set(wavlm_fast.ops.references)


def test_every_op_with_a_gradient_is_trained():
    trained = {c.op for c in ops.op_cases("base", 2, 0.3) if c.training}
    with_gradient = {name.removesuffix("_backward") for name in wavlm_fast.ops.schemas if name.endswith("_backward")}
    assert trained == with_gradient == set(wavlm_fast.ops.references) - op_providers.WHOLE


@pytest.mark.parametrize("batch", [1, 2])
def test_names(batch):
    found = [c.name for model in ("base", "large") for c in ops.op_cases(model, batch, 0.3)]
    assert len(set(found)) == len(found)
    assert f"op gated_attention {batch}x0.3" in found
    assert f"op gated_attention training large {batch}x0.3" in found
    assert (f"op gated_attention ragged {batch}x0.3" in found) == (batch > 1)


def test_no_case_of_less_than_a_frame():
    with pytest.raises(ValueError, match=r"0\.01 s of audio are shorter than one frame"):
        ops.op_cases("base", 1, 0.01)


@pytest.mark.parametrize("model", ["base", "large"])
def test_shapes(model):
    """Of what flows through a model, on the way that it takes."""
    config, length = cases.MODELS[model].config, 0.3
    C, H, T = config.hidden_size, config.num_attention_heads, 14
    shapes = {}
    for case in ops.op_cases(model, 1, length):
        if not case.training and case.op != "feature_encoder":
            first = case.inputs.arrange(case.build(torch.float32, "cpu"))[0]
            shapes[case.what] = tuple(first.shape)
    samples = int(length * 16_000)
    assert shapes["waveform_conv"] == (1, samples)
    assert shapes["strided_conv k3"] == (1, (samples - 10) // 5 + 1, config.conv_dim[0])
    assert shapes["gated_attention"] == (1, T, H, C // H)
    for what in ("positional_conv", "linear_act qkv", "add_layer_norm", "position_gate", "encoder_layer"):
        assert shapes[what] == (1, T, C), what
    assert shapes["linear_act feed-forward out"] == (1, T, config.intermediate_size)
    assert shapes["tdnn k5 d1"] == (1, T, config.tdnn_dim[0])
    assert shapes["tdnn k3 d2"] == (1, T - 4, config.tdnn_dim[0])
    assert shapes["stats_pool"] == (1, T, config.tdnn_dim[-1])


@pytest.mark.parametrize("model", ["base", "large"])
@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_what_torch_counts(model, batch):
    # Not all that transformers 4 runs is counted: its attention is one op of torch's.
    provider = dataclasses.replace(
        quick()["torch fp32"], make=lambda op, training: op_providers.Way(plain.TABLE[op])
    )
    for case in ops.op_cases(model, batch, 0.3):
        call = ops.BoundOp(case, provider, case.build(torch.float32, "cpu"))
        with FlopCounterMode(display=False) as counter:
            call()
        counted = counter.get_total_flops()
        if case.op == "positional_conv" and case.training:
            # torch counts the weight's gradient as if every channel met every other.
            counted -= (cases.MODELS[model].config.num_conv_pos_embedding_groups - 1) * case.operations / 3
        assert case.operations == counted, case.name


def test_calls_and_operations_are_those_that_the_ops_describe(monkeypatch):
    for name, op in wavlm_fast.ops.OPS.items():
        with_eps = {"eps": 0.5} if "eps" in op.arguments and name != "encoder_layer" else {}

        def example(*sizes, op=op, more=with_eps, **options):
            return {**op.example(*sizes, **options), **more}

        changed = dataclasses.replace(op, example=example, flops=lambda **arguments: 7)
        monkeypatch.setitem(wavlm_fast.ops.OPS, name, changed)
    seen = set()
    for case in ops.op_cases("base", 2, 0.3):
        gradients = 1 if case.op == "waveform_conv" else 2
        assert case.operations == 7 * (1 + gradients * case.training)
        seen |= {v for v in case.inputs.arrange(case.build(torch.float32, "cpu")) if isinstance(v, float)}
    assert 0.5 in seen
    assert 1e-5 not in seen
    config = cases.MODELS["base"].config
    stages = {"waveform conv": 1, "feature encoder": len(config.conv_dim) - 1, "projection": 1, "positional conv": 1}
    stages |= dict.fromkeys(("qkv", "gate", "attention", "out proj", "feed-forward in", "feed-forward out"),
                            config.num_hidden_layers)  # fmt: skip
    found = flops.forward(config, 1, 16_000)
    assert {stage: count / 7 for stage, count in found.items() if stage in stages} == stages


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["base", "large"])
def test_everybody_is_right(model, dtype):
    for case in ops.op_cases(model, 2, 0.3):
        for row in ops.run_op(case, quick(dtype), 1):
            assert row["problem"] is None, row
            assert not row["wrong"]
            assert 0 < row["error"] <= row["allowed"], row
            assert row["seconds"]["rounds"] == 1


def test_rows():
    found, _ = op_providers.op_providers("cpu")
    found = {n: p for n, p in found.items() if p.everywhere}
    case = case_of("gated_attention")
    rows = by_provider(ops.run_op(case, found, 5, lambda: PEAKS))
    assert list(rows) == list(found)
    for name, row in rows.items():
        assert set(row) == ROW
        assert (row["case"], row["group"], row["model"], row["cls"]) == (case.name, "op", "base", "gated_attention")
        assert (row["batch"], row["length"], row["audio"], row["factor"]) == (2, 0.3, None, None)
        assert name.startswith(row["family"])
        assert name.endswith(row["dtype"])
        seconds = row["seconds"]
        assert seconds["rounds"] == 5
        assert 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]
        assert row["gflop"] == case.operations / 1e9
        assert row["gflops"] == pytest.approx(row["gflop"] / seconds["median"])
        single = row["dtype"] == "fp32"
        assert row["peak_gflops"] == (200 if single else None)
        assert row["share"] == (pytest.approx(row["gflops"] / 200) if single else None)
        assert row["ours"] == (row["family"] == "wavlm_fast")
        assert bool(row["ours_faster"]) == (not row["ours"])
    json.dumps(list(rows.values()), allow_nan=False)
    nothing_counted = by_provider(ops.run_op(case_of("add_layer_norm"), quick(), 1, lambda: PEAKS))["torch fp32"]
    assert nothing_counted["seconds"]
    assert nothing_counted["gflops"] is nothing_counted["share"] is None


def test_ours_is_the_fastest_backend(monkeypatch):
    """Whose times they are is seen from made-up ones."""
    times = {"torch fp32": 6.0, "wavlm_fast reference fp32": 3.0, "wavlm_fast cpu fp32": 2.0}
    monkeypatch.setattr(measure, "interleave", lambda calls, *rest: {n: [times[n]] * 3 for n in calls if n in times})
    rows = by_provider(ops.run_op(case_of("position_gate"), quick(), 3))
    assert rows["torch fp32"]["ours_faster"]["median"] == 3.0


def off_by(amount, which):
    """A provider whose result number `which` is off by a share."""

    def make(op, training):
        way = op_providers._torch(op, training)

        def function(*args):
            outputs = way.function(*args)
            listed = list(outputs) if isinstance(outputs, tuple) else [outputs]
            listed[which] = listed[which] * (1 + amount)
            return tuple(listed)

        return dataclasses.replace(way, function=function)

    return make


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def wrong_gradient(op, training):
    way = op_providers._torch(op, training)
    return dataclasses.replace(way, function=lambda x, *rest: way.function(WrongGradient.apply(x), *rest))


def sabotaged(make):
    found = quick()
    found["sabotaged fp32"] = dataclasses.replace(found["torch fp32"], family="another", make=make)
    return found


@pytest.mark.parametrize("what", ["gated_attention", "strided_conv k3", "feature_encoder", "encoder_layer"])
def test_a_wrong_provider_gets_no_time(what):
    rows = by_provider(ops.run_op(case_of(what), sabotaged(off_by(1e-4, 0)), 1))
    row = rows["sabotaged fp32"]
    assert row["wrong"]
    assert row["problem"].startswith("wrong: the output out is off by ")
    assert row["error"] > row["allowed"]
    assert row["seconds"] is row["gflops"] is row["ours_faster"] is None
    assert rows["torch fp32"]["seconds"]


def test_every_output_is_looked_at():
    case = case_of("add_layer_norm", model="large")
    rows = by_provider(ops.run_op(case, sabotaged(off_by(1e-4, 1)), 1))
    assert rows["sabotaged fp32"]["problem"].startswith("wrong: the output normed is off by ")


@pytest.mark.parametrize("what", ["gated_attention", "linear_act qkv", "tdnn k5 d1"])
def test_a_wrong_gradient_gets_no_time(what):
    name = "qkv" if what == "gated_attention" else "x"
    row = by_provider(ops.run_op(case_of(what, training=True), sabotaged(wrong_gradient), 1))["sabotaged fp32"]
    assert row["wrong"]
    assert row["problem"].startswith(f"wrong: the gradient of {name} is off by ")
    assert row["seconds"] is None
    right = by_provider(ops.run_op(case_of(what), sabotaged(wrong_gradient), 1))["sabotaged fp32"]
    assert right["seconds"]


def test_a_gradient_that_is_missing_is_wrong():
    def make(op, training):
        way = op_providers._torch(op, training)
        return dataclasses.replace(way, function=lambda x, weight, *rest: way.function(x, weight.detach(), *rest))

    row = by_provider(ops.run_op(case_of("linear_act qkv", training=True), sabotaged(make), 1))["sabotaged fp32"]
    assert row["problem"].startswith("wrong: the gradient of weight is off by ")


def test_a_result_that_is_not_finite_is_wrong_and_null():
    row = by_provider(ops.run_op(case_of("linear_act qkv"), sabotaged(off_by(float("nan"), 0)), 1))["sabotaged fp32"]
    assert row["wrong"]
    assert row["error"] is None
    assert row["seconds"] is None


def test_a_provider_that_fails_says_why():
    def make(op, training):
        def rains(*args):
            raise RuntimeError("it rains\nin Spain")

        return op_providers.Way(rains)

    row = by_provider(ops.run_op(case_of("linear_act qkv"), sabotaged(make), 1))["sabotaged fp32"]
    assert row["problem"] == "does not run this case: it rains"
    assert row["seconds"] is row["error"] is None
    assert not row["wrong"]


def test_who_refuses_says_why():
    found, absent = op_providers.op_providers("cpu")
    case = case_of("gated_attention", training=True)
    flex = {"FlexAttention fp32": found["FlexAttention fp32"]}
    (row,) = ops.run_op(case, flex, 1)
    assert row["problem"] == "does not run this case: FlexAttention computes no gradients on CPUs"
    assert not row["wrong"]
    assert absent["wavlm_fast triton fp32"]
    assert not any(name.endswith("fp16") for name in found)


def test_a_backend_without_a_kernel_refuses(monkeypatch):
    from wavlm_fast.backends import cpu

    monkeypatch.delitem(cpu.TABLE, "position_gate")
    row = by_provider(ops.run_op(case_of("position_gate"), quick(), 1))["wavlm_fast cpu fp32"]
    assert row["problem"] == "does not run this case: the cpu backend has no kernel for position_gate"
    assert row["seconds"] is None
    assert not row["wrong"]


def test_what_runs_in_parts_or_on_two_backends_says_so(monkeypatch):
    from wavlm_fast.backends import cpu

    monkeypatch.delitem(cpu.TABLE, "encoder_layer")
    monkeypatch.delitem(cpu.TABLE, "position_gate_backward", raising=False)
    whole = by_provider(ops.run_op(case_of("encoder_layer"), quick(), 1))["wavlm_fast cpu fp32"]
    assert whole["seconds"]
    assert whole["note"] == "it runs as the ops that it is made of"
    mixed = by_provider(ops.run_op(case_of("position_gate", training=True), quick(), 1))["wavlm_fast cpu fp32"]
    assert mixed["note"] == "its gradient runs on the reference backend"


def test_the_backend_asked_for_is_the_one_that_runs(monkeypatch):
    from wavlm_fast import backends

    chosen, choose = [], backends.choose

    def noted(op, args):
        choice = choose(op, args)
        chosen.append(choice.backend)
        return choice

    monkeypatch.setattr(backends, "choose", noted)
    for training in (False, True):
        for name, provider in quick().items():
            if provider.ours:
                chosen.clear()
                case = case_of("linear_act qkv", training)
                ops.BoundOp(case, provider, case.build(torch.float32, "cpu"))()
                assert set(chosen) == {provider.backend}, name


def test_what_torch_trains_faster_is_left_to_it_unless_a_backend_is_asked_for(monkeypatch):
    from wavlm_fast.backends import cpu

    monkeypatch.setattr(cpu, "why_torch_trains", lambda op, x, weight: f"torch trains {op}")
    rows = by_provider(ops.run_op(case_of("linear_act qkv", training=True), quick(), 1))
    assert rows["wavlm_fast cpu fp32"]["note"] == "torch trains linear_act"
    assert not rows["wavlm_fast reference fp32"]["note"]
    assert all(row["problem"] is None for row in rows.values())
    rows = by_provider(ops.run_op(case_of("linear_act qkv"), quick(), 1))
    assert not rows["wavlm_fast cpu fp32"]["note"]


def pytest_benchmarks(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in [n for n in environment if n.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_micro_benchmarks_run():
    chosen = "position_gate and fp32 and not training"
    ended = pytest_benchmarks("benchmarks/test_ops.py", "--seconds", "0.1", "--benchmark-disable", "-k", chosen)
    backends = sum(name.endswith("fp32") for name, p in quick().items() if p.ours)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{1 + backends} passed" in ended.stdout


def test_micro_benchmarks_are_no_part_of_the_tests(request):
    assert request.config.getini("testpaths") == ["tests"]
