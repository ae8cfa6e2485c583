"""torch.compile, torch.export and torch.jit.trace of the models."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from leaving_cases import our_ops
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from wavlm_cases import (
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    fast_like,
    gradients,
    main_output,
    make_sensitive,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
    with_labels,
)

both_forms = pytest.mark.parametrize("form", ["base", "large"])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_forms
@pytest.mark.parametrize("masked", [False, True])
def test_compile_traces_the_whole_model(form, masked):
    plain = plain_model("WavLMModel", small_config(form, num_hidden_layers=2))
    ours = fast_like(plain)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    kwargs = {"attention_mask": ragged_mask(SAMPLES, 400)} if masked else {}
    with torch.no_grad():
        got, expected = compiled(waveforms(), **kwargs), plain(waveforms(), **kwargs)
        assert_close_to_truth(got, expected, truth_of(plain)(waveforms().double(), **kwargs))


@ours_only
@both_forms
def test_compiled_graphs_hold_our_ops_whole(form):
    """What a compiler gets after autograd, functionalization and inductor's own decompositions."""
    ours, graphs = fast_like(plain_model("WavLMModel", small_config(form, num_hidden_layers=1))), []

    def compiler(module, inputs):
        graphs.append(module.graph)
        return module.forward

    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    with torch.no_grad():
        torch.compile(ours, backend=backend, fullgraph=True)(waveforms())
    assert {"wavlm_fast.feature_encoder.default", "wavlm_fast.encoder_layer.default"} <= our_ops(graphs[0])


@pytest.mark.parametrize("name", ["WavLMForCTC", "WavLMForSequenceClassification"])
def test_compile_a_head_and_train_it(name):
    plain = plain_model(name, small_config(num_hidden_layers=1))
    ours, exact = fast_like(plain), truth_of(plain)
    labels = with_labels(name, plain.config)
    compiled = torch.compile(ours, backend="aot_eager")
    got = gradients(ours.train(), lambda m: compiled(waveforms(), **labels).loss)
    expected = gradients(plain.train(), lambda m: m(waveforms(), **labels).loss)
    truth = gradients(exact.train(), lambda m: m(waveforms().double(), **labels).loss)
    assert_gradients_close(got, expected, truth, plain)


def test_compiled_model_sees_new_weights_and_new_lengths():
    plain = plain_model("WavLMModel", small_config(num_hidden_layers=1))
    ours = fast_like(plain)
    compiled = torch.compile(ours, backend="aot_eager")
    for seed, samples in ((0, SAMPLES), (1, SAMPLES), (2, 777)):
        make_sensitive(plain, seed)
        make_sensitive(ours, seed)
        with torch.no_grad():
            got, expected = compiled(waveforms(2, samples)), plain(waveforms(2, samples))
            assert_close_to_truth(got, expected, truth_of(plain)(waveforms(2, samples).double()))


@pytest.mark.slow
def test_compile_by_inductor():
    config = small_config("large", num_hidden_layers=1, conv_dim=[16, 16], conv_stride=[5, 4], conv_kernel=[10, 3])
    plain = plain_model("WavLMModel", config)
    compiled = torch.compile(fast_like(plain), fullgraph=True)
    with torch.no_grad():
        got, expected = compiled(waveforms()), plain(waveforms())
        truth = truth_of(plain)(waveforms().double())
    # Inductor rounds in an order of its own: an allowance for that, and no more.
    for a, b, c in zip(got.values(), expected.values(), truth.values()):
        assert (a - c).abs().max() <= 4 * (b - c).abs().max() + 1e-5 * c.abs().max()


@both_forms
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_base_model(form, strict):
    plain = plain_model("WavLMModel", small_config(form, num_hidden_layers=2))
    ours = fast_like(plain)
    program = torch.export.export(ours, (waveforms(),), strict=strict)
    with torch.no_grad():
        got, expected = program.module()(waveforms(seed=4)), plain(waveforms(seed=4))
        assert_close_to_truth(got, expected, truth_of(plain)(waveforms(seed=4).double()))


def test_export_with_a_mask():
    plain = plain_model("WavLMModel", small_config(num_hidden_layers=2))
    example, mask = waveforms(), ragged_mask(SAMPLES, 400)
    program = torch.export.export(fast_like(plain), (example, mask), strict=False)
    other = ragged_mask(300, SAMPLES)
    with torch.no_grad():
        got, expected = program.module()(waveforms(), other), plain(waveforms(), other)
        assert_close_to_truth(got, expected, truth_of(plain)(waveforms().double(), other))


@both_forms
def test_export_with_dynamic_batch_and_length(form):
    plain = plain_model("WavLMModel", small_config(form, num_hidden_layers=2))
    shapes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(fast_like(plain), (waveforms(),), dynamic_shapes=shapes, strict=False)
    for batch, samples in ((2, SAMPLES), (3, 1001)):
        x = waveforms(batch, samples)
        with torch.no_grad():
            assert_close_to_truth(program.module()(x), plain(x), truth_of(plain)(x.double()))


def test_export_saved_and_loaded(tmp_path):
    plain = plain_model("WavLMModel", small_config(num_hidden_layers=2))
    ours = fast_like(plain)
    with torch.no_grad():
        program = torch.export.export(ours, (waveforms(),), strict=False)
        torch.export.save(program, tmp_path / "wavlm.pt2")
        got = main_output(torch.export.load(tmp_path / "wavlm.pt2").module()(waveforms()))
        torch.testing.assert_close(got, main_output(ours(waveforms())), rtol=1e-4, atol=1e-3)


def test_an_exported_program_has_the_parameters_of_the_model():
    ours = fast_like(plain_model("WavLMModel", small_config(num_hidden_layers=2)))
    program = torch.export.export(ours, (waveforms(),), strict=False)
    assert set(program.state_dict) == set(ours.state_dict())


@pytest.mark.parametrize("name", ["WavLMModel", "WavLMForXVector", "WavLMForCTC"])
def test_jit_trace(name):
    plain = plain_model(name, small_config(num_hidden_layers=2))
    ours = fast_like(plain)
    with torch.no_grad():
        traced = torch.jit.trace(ours, (waveforms(),), strict=False, check_trace=False)
        got, expected = traced(waveforms(seed=5)), plain(waveforms(seed=5))
        key = "logits" if "logits" in got else "last_hidden_state"
        assert_close_to_truth(got[key], expected[key], truth_of(plain)(waveforms(seed=5).double())[key])


@ours_only
@pytest.mark.parametrize("path", ["models.py", "padding.py", "losses.py", "inputs.py", "leaving.py", "modules"])
def test_what_is_traced_zips_nothing_of_unequal_lengths(path):
    # torch.compile before torch 2.11 takes `strict=False` for True.
    found = Path(subject.__file__).parent.joinpath(path)
    for file in [found] if found.is_file() else sorted(found.glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "zip":
                assert [k.value.value for k in call.keywords if k.arg == "strict"] == [True], f"{file}:{call.lineno}"


@ours_only
@pytest.mark.parametrize("name", ["WavLMForCTC", "WavLMForSequenceClassification", "WavLMForXVector"])
def test_more_positional_arguments_than_there_are_names(name):
    ours = subject.accelerate(plain_model(name, small_config(num_hidden_layers=1)))
    with pytest.raises(TypeError, match="positional arguments"):
        ours(waveforms(), *[None] * 20)
