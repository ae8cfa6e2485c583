"""The parity harness: green here, blind nowhere, and a command with an honest exit status."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
import torch

from wavlm_fast import backends, parity
from wavlm_fast.cli import main
from wavlm_fast.errors import UserError
from wavlm_fast.ops import OPS, Operand, Sizes
from wavlm_fast.parity import alone, mutation_check, mutations, rule, run_checkpoint, run_models, run_ops
from wavlm_fast.parity.cases import CASES, case_of, cases_of

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")


def judge(results):
    """Nothing fails; what did not run at all is a skip with its reason."""
    results = list(results)
    for r in results:
        said = r.reason or f"{r.tensor} is off by {r.error:.3e}, allowed is {r.allowed:.3e}"
        assert r.verdict != rule.FAIL, f"{r.quantity}: {said}"
    if all(r.verdict == rule.SKIPPED for r in results):
        pytest.skip(results[0].reason)


def op_parameters():
    for op in OPS:
        for backend in backends.names():
            reason = run_ops.absence(backend, op, CPU)
            if reason is not None:
                yield pytest.param(None, backend, None, id=f"{op}-{backend}", marks=pytest.mark.skip(reason))
                continue
            for case in cases_of(op):
                for dtype in rule.DTYPES:
                    if dtype != "float64" or backend == "reference":
                        yield pytest.param(case, backend, dtype, id=f"{op}-{backend}-{case.name}-{dtype}")


@pytest.mark.parametrize(("case", "backend", "dtype"), list(op_parameters()))
def test_ops(case, backend, dtype):
    judge(run_ops.run_case(case, backend, rule.DTYPES[dtype], CPU))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in CASES if c.quick and c.differentiate], ids=lambda c: f"{c.op}-{c.name}")
def test_gradients_of_what_another_backend_saved(case, dtype):
    if not run_ops.mixes(case.op, CPU):
        pytest.skip("forward and gradient run on one backend")
    judge(run_ops.run_case(case, "auto", rule.DTYPES[dtype], CPU))


def model_parameters():
    for n, case in enumerate(run_models.cases()):
        for backend, dtypes in (("auto", ("float32", "bfloat16")), ("reference", ("float32",))):
            # Every class and input meets float16 too, in one form or the other.
            for dtype in (*dtypes, *(["float16"] if n % 3 == 0 else [])):
                yield pytest.param(case, backend, dtype, id=f"{case.model}-{case.name}-{backend}-{dtype}")


@pytest.mark.parametrize(("case", "backend", "dtype"), list(model_parameters()))
def test_models(case, backend, dtype):
    judge(run_models.run_case(case, backend, rule.DTYPES[dtype], CPU))


@pytest.mark.parametrize("mutation", mutation_check.MUTATIONS, ids=lambda m: f"{m.op}-{m.name}")
def test_mistakes_are_noticed(mutation):
    assert mutation_check.check(mutation).caught


@pytest.mark.parametrize("op", [*OPS, None])
def test_without_a_mistake_nothing_is_noticed(op):
    untouched = mutations.Mutation("nothing", op, contextlib.nullcontext)
    assert not mutation_check.check(untouched).caught


def test_every_op_has_mistakes():
    touched = {m.op for m in mutation_check.MUTATIONS}
    assert touched == {*OPS, None}


def test_every_op_that_takes_packed_frames_has_ragged_cases_and_mistakes():
    packed = {name for name, op in OPS.items() if op.is_packable}
    assert set(alone.PACKED) == packed
    assert set(alone.RESIZED) == {name for name, op in OPS.items() if op.is_resizing}
    assert {c.op for c in CASES if c.ragged and c.quick} == packed
    assert {m.op for m in mutation_check.MUTATIONS if m.ragged} == packed
    for op in packed:
        lengths = [c.leaves()["offsets"].diff() for c in cases_of(op) if c.ragged]
        assert {1, 64} <= {len(n) for n in lengths}
        assert any(len(n) > 1 and (n == n[0]).all() for n in lengths)
        assert any(len(n) > 2 and not (n.diff() >= 0).all() for n in lengths)
        assert max(int(n.max()) for n in lengths) > 1000


@pytest.mark.parametrize("name", OPS)
def test_cases_are_of_the_calls_that_the_op_describes(name, monkeypatch):
    """Another example is another case: one argument is set apart, the others are as they were."""
    op, changed = OPS[name], [a for a, kind in OPS[name].arguments.items() if kind == "Tensor"][-1]
    place = next(iter(op.places(Sizes(samples=800, channels=32, heads=4, inner=8, convs=((8, 10, 5), (8, 3, 2))))))

    def one_row_more(shape):
        return (shape[0] + 1, *shape[1:])

    def example(*sizes, **options):
        arguments = op.example(*sizes, **options)
        return {**arguments, changed: Operand(one_row_more(arguments[changed].shape))}

    def shapes():
        leaves = case_of(name, "any", *place.sizes, **place.options).leaves()
        return {k: tuple(v.shape) for k, v in leaves.items() if torch.is_tensor(v)}

    before = shapes()
    monkeypatch.setitem(OPS, name, dataclasses.replace(op, example=example))
    assert shapes() == {**before, changed: one_row_more(before[changed])}


def test_the_table_is_whole_after_a_mistake():
    table = backends.load("reference").TABLE
    before = dict(table)
    with mutations.replaced("stats_pool", lambda right: lambda *args: None):
        assert table["stats_pool"] != before["stats_pool"]
    assert table == before


def test_a_mutant_that_crashes_proves_nothing():
    def crash(*args):
        raise ZeroDivisionError

    broken = mutations.Mutation("crash", "stats_pool", lambda: mutations.replaced("stats_pool", lambda right: crash))
    assert not mutation_check.check(broken).caught


@pytest.mark.parametrize(
    "fresh",
    [
        lambda x: torch.empty(x.shape, dtype=x.dtype),
        torch.empty_like,
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype),
    ],
)
def test_fresh_memory_is_poisoned(fresh):
    with rule.poisoned():
        assert fresh(torch.ones(3, 4, dtype=torch.bfloat16)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_unwritten_value_is_found_even_where_memory_happens_to_hold_it():
    """The mutant leaves one value to what the memory holds, and outside of poisoned runs that is the right one."""

    def lucky(right):
        def wrong(*args):
            out = right(*args)
            fresh = torch.empty_like(out)
            poisoned = bool(fresh.isnan().all())
            fresh.view(-1)[1:] = out.view(-1)[1:]
            return fresh if poisoned else out

        return wrong

    case = next(c for c in CASES if c.op == "position_gate")
    with mutations.replaced("position_gate", lucky):
        forward, _ = run_ops.run_case(case, "reference", torch.float32, CPU)
    assert forward.verdict == rule.FAIL
    assert forward.error == math.inf


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_the_yardstick_is_no_rubber_stamp(case):
    """In float32 the plain path is right to four digits of what its rounding is measured in, or anything would pass."""
    want = run_ops.expected(case, torch.float32, CPU)
    for name, truth in want.outputs.items():
        assert want.allowed_outputs[name] <= 1e-4 * rule.magnitude(truth) + 1e-6
    if "quiet" not in case.name:  # where a gradient vanishes under the norm
        for name, truth in want.gradients.items():
            scale = max(rule.magnitude(truth), rule.rms(truth), 1.0)
            assert want.allowed_gradients[name] <= 2e-3 * scale, name


def test_cases_cover_what_they_must():
    names = " ".join(c.name for c in cases_of("gated_attention"))
    for wanted in ("D 32", "D 64", "D 80", "D 128", "packed", "lengths", "one frame", "max_distance", "dropout"):
        assert wanted in names
    assert len({(c.op, c.name) for c in CASES}) == len(CASES)


def test_errors_tell_kinds_of_wrong():
    truth = torch.tensor([1.0, math.nan, math.inf], dtype=torch.float64)
    assert rule.error_of(torch.tensor([1.5, math.nan, math.inf]), truth) == 0.5
    nan, inf = math.nan, math.inf
    for wrong in ([1.0, 0.0, inf], [nan, nan, inf], [1.0, nan, -inf], [1.0, nan, 5.0]):
        assert rule.error_of(torch.tensor(wrong), truth) == math.inf
    assert rule.error_of(torch.ones(2), truth) == math.inf


def test_infinite_errors_are_valid_json():
    result = rule.Result("op", "tdnn", "forward", "cpu", "float32", "k5", "out", math.inf, 1.0, rule.FAIL)
    assert json.loads(json.dumps(result.as_dict()))["error"] is None


def arguments(*argv):
    parser = argparse.ArgumentParser()
    parity.add_arguments(parser)
    return parser.parse_args(argv)


def test_command_passes(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert parity.run(arguments("--filter", "stats_pool", "--quick", "--device", "cpu", "--json", str(target))) == 0
    written = json.loads(target.read_text())
    assert {r["name"] for r in written["results"]} == {"stats_pool"}
    assert {r["verdict"] for r in written["results"] if r["backend"] == "reference"} == {"pass"}
    assert written["torch"] == torch.__version__
    first = capsys.readouterr().out
    assert "all within what is allowed" in first
    parity.run(arguments("--filter", "stats_pool", "--quick", "--device", "cpu"))
    assert capsys.readouterr().out == first


def test_command_fails_and_names_the_case(capsys):
    mistake = next(m for m in mutations.MUTATIONS if m.op == "stats_pool")
    with mistake.apply():
        status = parity.run(arguments("--filter", "stats_pool", "--backend", "reference", "--quick", "--device", "cpu"))
    assert status == 1
    shown = capsys.readouterr().out
    assert "FAIL" in shown
    assert "stats_pool forward on reference in float32, case 'all frames': out is off by" in shown


def test_command_reports_a_crashing_kernel(capsys):
    def crash(*args):
        raise ZeroDivisionError("oh")

    with mutations.replaced("stats_pool", lambda right: crash):
        options = ("--filter", "stats_pool", "--backend", "reference", "--dtype", "fp32", "--device", "cpu")
        assert parity.run(arguments(*options)) == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().out


def test_command_that_compares_nothing_does_not_pass(capsys, monkeypatch):
    assert parity.run(arguments("--filter", "no such case", "--device", "cpu")) == 1
    for op in ("stats_pool", "stats_pool_backward"):
        monkeypatch.delitem(backends.load("cpu").TABLE, op, raising=False)
    assert parity.run(arguments("--filter", "stats_pool", "--backend", "cpu", "--device", "cpu")) == 1
    assert "skipped: the cpu backend has no kernel for stats_pool" in capsys.readouterr().out


def test_refusals_are_rows(monkeypatch):
    entry = backends.Implementation(lambda *args: None, lambda *args: "it is Sunday")
    monkeypatch.setitem(backends.load("cpu").TABLE, "stats_pool", entry)
    results = list(run_ops.run_case(cases_of("stats_pool")[0], "cpu", torch.float32, CPU))
    assert results[0].verdict == rule.SKIPPED
    assert results[0].reason == "stats_pool cannot run on the cpu backend: it is Sunday"


def test_a_wrong_layout_fails():
    def turned(right):
        return lambda *args: right(*args).t().contiguous().t()

    with mutations.replaced("stats_pool", turned):
        result = next(run_ops.run_case(cases_of("stats_pool")[0], "reference", torch.float32, CPU))
    assert result.verdict == rule.FAIL
    assert "not contiguous" in result.reason


@pytest.mark.skipif(backends.load("triton").why_not() is None, reason="Triton runs here")
def test_a_backend_asked_for_by_name_must_be_there(capsys):
    with pytest.raises(UserError, match="the triton backend cannot be used here: "):
        parity.run(arguments("--backend", "triton", "--device", "cpu"))
    assert main(["parity", "--backend", "triton", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("wavlm-fast parity: the triton backend cannot be used here: ")


def test_command_self_test(tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.json"
    assert parity.run(arguments("--self-test", "--filter", "stats_pool", "--json", str(target))) == 0
    assert "0 unnoticed" in capsys.readouterr().out
    assert all(v["caught"] for v in json.loads(target.read_text())["mutations"])
    harmless = mutations.Mutation("nothing wrong", "stats_pool", contextlib.nullcontext)
    monkeypatch.setattr(mutation_check, "MUTATIONS", (harmless,))
    assert parity.run(arguments("--self-test")) == 1
    assert "UNNOTICED" in capsys.readouterr().out


def test_checkpoint_on_audio(tmp_path):
    source = run_models._model("WavLMModel", "group norm", torch.float32, CPU, torch.float32, False)
    source.save_pretrained(tmp_path)
    file = tmp_path / "noise.wav"
    soundfile.write(file, np.random.default_rng(0).standard_normal(2000) / 10, 16_000)
    wanted = (str(tmp_path), [str(file)])
    results = list(run_checkpoint.results(*wanted, ["reference", "auto"], [torch.float32], CPU))
    assert [r.tensor for r in results[:5]] == [*(f"hidden_states[{i}]" for i in range(4)), "last_hidden_state"]
    judge(results)
    wrong = next(m for m in mutations.MUTATIONS if m.name == "bias shifted by one frame")
    with wrong.apply():
        results = list(run_checkpoint.results(*wanted, ["reference"], [torch.float32], CPU))
    assert [r.verdict for r in results] == [rule.PASS, *[rule.FAIL] * 4]
