"""Models that leave eager torch as graphs: traced, exported, taken apart, and run where nobody knows our ops."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from leaving_cases import Main, a_few, both_forms, check, each_class, our_ops, pair, without_us
from torch.fx.experimental.proxy_tensor import make_fx
from wavlm_cases import fast_like, make_sensitive, ours_only, plain_model, ragged_mask, small_config, waveforms

from wavlm_fast import derived
from wavlm_fast.leaving import leaving


class Asking(torch.nn.Module):
    """Notes what `leaving` says to a module that is asked to run."""

    def __init__(self, note):
        super().__init__()
        self.note = note

    def forward(self, x):
        self.note(leaving())
        return x * 2


def said(run):
    sentences = []
    run(Asking(sentences.append))
    return set(sentences)


ONE = torch.ones(3)
GOING = {
    "torch.jit.trace": lambda m: torch.jit.trace(m, (ONE,), check_trace=False),
    "make_fx": lambda m: make_fx(m)(ONE),
    "torch.func": lambda m: torch.vmap(m)(ONE),
    "forward-mode": lambda m: dual(m, ONE),
    "ONNX": lambda m: torch.onnx.export(m, (ONE,), io.BytesIO(), dynamo=False),
}


def dual(model, x):
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize("how", GOING)
def test_who_takes_a_model_away_is_named(how):
    if how == "ONNX":
        pytest.importorskip("onnx", reason="torch.onnx needs onnx")
    (sentence,) = said(GOING[how])
    assert how in sentence
    assert leaving() is None


def test_nothing_else_takes_a_model_away():
    assert said(lambda m: m(ONE)) == {None}
    assert said(lambda m: torch.export.export(m, (ONE,), strict=False)) == {None}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert leaving() is None


def test_a_compiled_function_asks_when_it_is_traced():
    def function(x):
        return x * (2 if leaving() is None else 3)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(ONE)[0] == 2
    assert torch.compile(torch.vmap(function), backend="eager", fullgraph=True)(ONE)[0] == 3
    assert torch.func.grad(lambda x: compiled(x).sum())(ONE)[0] == 3
    assert compiled(ONE)[0] == 2


@each_class
@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_jit_trace(name, form, masked):
    case = pair(name, form)
    inputs = case.inputs[masked]
    with torch.no_grad():
        case.ours(*inputs)  # what is remembered now must not get into the graph
        traced = torch.jit.trace(Main(case.ours), inputs)  # with its own checks
        check(traced(*inputs), case.plain, *inputs)
    assert not our_ops(traced.inlined_graph)


@both_forms
def test_a_trace_follows_the_weights(form):
    case = pair("WavLMModel", form)
    traced, x = None, (waveforms(seed=4),)
    with torch.no_grad():
        for _ in range(2):  # the first one may not leave anything behind for the second
            case.ours(case.x)
            traced = torch.jit.trace(Main(copy.deepcopy(case.ours)), (case.x,), check_trace=False)
            case.ours(case.x)
        other = make_sensitive(copy.deepcopy(case.plain), seed=7)
        traced.load_state_dict(Main(other).state_dict())
        check(traced(*x), other, *x)
        check(traced.to(torch.float64)(x[0].double()).float(), other, *x)


def test_nothing_is_remembered_by_a_trace():
    ours = fast_like(plain_model("WavLMModel", small_config()))
    with torch.no_grad():
        torch.jit.trace(Main(ours), (waveforms(),), check_trace=False)
    assert derived.nbytes(ours.parameters()) == 0
    weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    first = derived.derived("kind", (weight,), weight.clone)
    assert derived.derived("kind", (weight,), weight.clone) is first

    def using(x):
        value = derived.derived("kind", (weight,), weight.clone)
        assert value is not first
        return x + value

    torch.jit.trace(using, (torch.ones(2),), check_trace=False)


@ours_only
def test_a_forward_without_its_decorators_is_not_ours():
    # optimum calls what is below a decorator, as transformers' own cannot be traced.
    case = pair("WavLMForXVector", "base")
    ours = copy.deepcopy(case.ours)
    forward = getattr(ours.forward, "__wrapped__", None)
    forward = ours.forward if forward is None else forward.__get__(ours)
    ours.forward = lambda x: forward(x)["logits"]
    with torch.no_grad():
        traced = torch.jit.trace(ours, (case.x,), check_trace=False)
        check(traced(case.x), case.plain, case.x)
    assert not our_ops(traced.inlined_graph)


@a_few
def test_make_fx(name, form):
    case = pair(name, form)
    with torch.no_grad():
        graph = make_fx(Main(case.ours))(case.x)
        check(graph(case.x), case.plain, case.x)
    assert not our_ops(graph.graph)


@ours_only
@a_few
@pytest.mark.parametrize("masked", [False, True])
def test_a_program_is_fused_until_it_is_decomposed(name, form, masked):
    case = pair(name, form)
    inputs = case.inputs[masked]
    with torch.no_grad():
        program = torch.export.export(Main(case.ours), inputs, strict=False)
        apart = program.run_decompositions()
        check(apart.module()(*inputs), case.plain, *inputs)
    assert "wavlm_fast.encoder_layer.default" in our_ops(program.graph)
    assert our_ops(apart.graph) == set()


@ours_only
def test_a_program_with_dynamic_shapes_comes_apart():
    case = pair("WavLMModel", "large", 1)
    shape = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(Main(case.ours), case.inputs[True], dynamic_shapes=(shape, shape), strict=False)
        apart = program.run_decompositions().module()
        for batch, samples in ((2, 600), (3, 1001)):
            inputs = waveforms(batch, samples), ragged_mask(*[500, samples, 600][:batch], samples=samples)
            check(apart(*inputs), case.plain, *inputs)


@ours_only
def test_a_training_program_comes_apart_with_its_gradients():
    ours = fast_like(plain_model("WavLMForCTC", small_config(num_hidden_layers=1)))
    program = torch.export.export(Main(ours), (waveforms(),), strict=False)  # gradients are on
    assert {"wavlm_fast.gated_attention.default", "wavlm_fast.waveform_conv.default"} <= our_ops(program.graph)
    assert our_ops(program.run_decompositions().graph) == set()


@ours_only
def test_who_decomposes_says_what_stays():
    case = pair("WavLMModel", "base")
    with torch.no_grad():
        program = torch.export.export(Main(case.ours), (case.x,), strict=False)
    assert our_ops(program.run_decompositions({}).graph) == our_ops(program.graph)
    table = torch.export.default_decompositions()
    del table[torch.ops.wavlm_fast.positional_conv.default]
    assert our_ops(program.run_decompositions(table).graph) == {"wavlm_fast.positional_conv.default"}


@ours_only
def test_files_run_where_nobody_knows_us(tmp_path):
    case = pair("WavLMForXVector", "large")
    with torch.no_grad():
        expected = Main(case.plain)(case.x)
        torch.jit.trace(Main(case.ours), (case.x,), check_trace=False).save(str(tmp_path / "traced.pt"))
        program = torch.export.export(Main(case.ours), (case.x,), strict=False).run_decompositions()
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((case.x, expected), tmp_path / "values.pt")
    without_us(
        """
folder = sys.argv[1]
x, expected = torch.load(folder + "/values.pt")
for model in (torch.jit.load(folder + "/traced.pt"), torch.export.load(folder + "/program.pt2").module()):
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
assert not any(name.startswith("wavlm_fast.") for name in sys.modules)
""",
        tmp_path,
    )
