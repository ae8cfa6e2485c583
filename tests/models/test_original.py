"""`wavlm_fast.original` gives what transformers' WavLM gives, in the form in which Microsoft's class gives it."""

from __future__ import annotations

import pytest
import torch
from original_cases import (
    PADDED,
    SAME_FRAMES,
    VALID,
    assert_equal_but_rounding,
    both_forms,
    double,
    every_form,
    gradients,
    original_config,
    original_like,
    original_name,
    pair,
)
from wavlm_cases import FRAMES, assert_tensor_close, plain_model, small_config, truth_of, waveforms

from wavlm_fast import restore
from wavlm_fast.original import Fp32GroupNorm, Fp32LayerNorm, GLU_Linear, WavLM


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@every_form
def test_every_hidden_state_is_that_of_transformers(form, padded):
    plain, ours = pair(form)
    with torch.no_grad():
        expected = plain(double(), attention_mask=SAME_FRAMES if padded else None, output_hidden_states=True)
        mask = PADDED if padded else None
        states = [ours.extract_features(double(), mask, output_layer=n)[0] for n in range(1, len(ours.encoder.layers))]
        last, _ = ours.extract_features(double(), mask)
    for got, state in zip(states, expected.hidden_states[1:-1], strict=True):
        assert_equal_but_rounding(got, state)
    assert_equal_but_rounding(last, expected.last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both_forms
def test_is_as_close_to_the_truth_as_transformers(form, dtype):
    plain, ours = pair(form, dtype)
    x = waveforms(dtype=dtype)
    with torch.no_grad():
        got, _ = ours.extract_features(x)
        expected, truth = plain(x).last_hidden_state, truth_of(plain)(x.double()).last_hidden_state
    assert got.dtype == dtype
    assert_tensor_close("x", got, expected, truth)


@pytest.mark.parametrize("norm", [Fp32LayerNorm(24), Fp32GroupNorm(24, 24)], ids=["layer", "group"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precisions_are_rounded_once(norm, dtype):
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm.to(dtype)
    x = (30 * torch.randn(2, 24, 24)).to(dtype)
    expected = norm.float()(x.float()).to(dtype)
    assert torch.equal(norm.to(dtype)(x), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "tanh", "linear"])
def test_activations(activation):
    plain = plain_model("WavLMModel", small_config(hidden_act=activation)).double()
    with torch.no_grad():
        got, _ = original_like(plain).extract_features(double())
        assert_equal_but_rounding(got, plain(double()).last_hidden_state)


def test_gelu_fast_is_the_old_name_of_gelu_accurate():
    _, accurate = pair(activation_fn="gelu_accurate")
    _, fast = pair(activation_fn="gelu_fast")
    assert torch.equal(accurate.extract_features(double())[0], fast.extract_features(double())[0])


def test_glu_gates_its_first_half_by_its_second():
    layer = restore(WavLM(original_config(small_config(), activation_fn="glu"))).encoder.layers[0].eval()
    assert isinstance(layer.fc1, GLU_Linear) and layer.fc1.linear.weight.shape == (96, 32)
    x = torch.randn(4, 2, 32)
    attended = layer.self_attn_layer_norm(x + layer.self_attn(x, x, x)[0])
    values, gates = layer.fc1.linear(attended).split(48, dim=-1)
    expected = attended + layer.fc2(values * gates * torch.sigmoid(gates))
    torch.testing.assert_close(layer(x)[0], layer.final_layer_norm(expected))


@both_forms
def test_gradients_are_those_of_transformers(form):
    plain, ours = pair(form)
    x = double().requires_grad_()
    got = gradients(ours, x)
    y = double().requires_grad_()
    plain(y).last_hidden_state.square().mean().backward()
    named = {original_name(n, form == "large"): p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert set(got) == set(named)
    for name, gradient in got.items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: rounding noise around 0
            assert (gradient - named[name]).abs().max() <= 1e-10 * named[name].abs().max(), name
    assert (x.grad - y.grad).abs().max() <= 1e-10 * y.grad.abs().max()


@both_forms
def test_output_layer_stops_there_and_leaves_the_final_norm_out(form):
    _, ours = pair(form)
    called = []
    for i, layer in enumerate(ours.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: called.append(i))
    (x, results), _ = ours.extract_features(double(), output_layer=2, ret_layer_results=True)
    assert called == [0, 1]
    assert len(results) == 3 and all(weights is None for _, weights in results)
    assert [tuple(state.shape) for state, _ in results] == [(FRAMES, 2, 32)] * 3  # [T, B, C]
    assert torch.equal(x, results[2][0].transpose(0, 1))
    (x, results), _ = ours.extract_features(double(), output_layer=3, ret_layer_results=True)
    assert len(results) == 4 and torch.equal(x, results[-1][0].transpose(0, 1))
    whole, _ = ours.extract_features(double())
    assert torch.equal(whole, ours.encoder.layer_norm(x) if form == "large" else x)


def test_layer_results_start_with_the_transformers_input():
    plain, ours = pair()
    with torch.no_grad():
        (_, results), _ = ours.extract_features(double(), PADDED, output_layer=1, ret_layer_results=True)
        expected = plain(double(), attention_mask=SAME_FRAMES, output_hidden_states=True).hidden_states
    for (state, _), other in zip(results, expected[:2], strict=True):
        assert_equal_but_rounding(state.transpose(0, 1), other)


def test_without_an_output_layer_there_are_no_layer_results():
    _, ours = pair()
    (x, results), mask = ours.extract_features(double(), ret_layer_results=True)
    assert x.shape == (2, FRAMES, 32) and results == [] and mask is None


def test_an_output_layer_that_there_is_not_runs_them_all_without_the_final_norm():
    _, ours = pair("large")
    expected, _ = ours.extract_features(double(), output_layer=3)
    for layer in (0, 9):
        assert torch.equal(ours.extract_features(double(), output_layer=layer)[0], expected)


def test_ret_conv_gives_the_projected_features_with_zeros_where_padded():
    plain, ours = pair()
    with torch.no_grad():
        features, mask = ours.extract_features(double(), PADDED, ret_conv=True)
        expected, _ = plain.feature_projection(plain.feature_extractor(double()).transpose(1, 2))
    assert torch.equal(mask, torch.arange(FRAMES) >= torch.tensor([[FRAMES], [VALID]]))
    assert_equal_but_rounding(features, expected.masked_fill(mask[..., None], 0))
    assert not features[mask].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_a_padding_mask_of_numbers(dtype):
    _, ours = pair()
    expected, mask = ours.extract_features(double(), PADDED)
    got, frames = ours.extract_features(double(), PADDED.to(dtype))
    assert torch.equal(got, expected) and torch.equal(frames, mask)


@both_forms
def test_a_layer_speaks_as_the_originals(form):
    _, ours = pair(form)
    seen = {}
    ours.encoder.layers[1].register_forward_hook(
        lambda module, args, kwargs, output: seen.update(args=args, kwargs=kwargs, output=output), with_kwargs=True
    )
    _, mask = ours.extract_features(double(), PADDED)
    assert [tuple(x.shape) for x in seen["args"]] == [(FRAMES, 2, 32)]
    assert set(seen["kwargs"]) == {"self_attn_padding_mask", "need_weights", "self_attn_mask", "pos_bias"}
    assert torch.equal(seen["kwargs"]["self_attn_padding_mask"], mask)
    x, weights, pos_bias = seen["output"]
    assert x.shape == (FRAMES, 2, 32) and weights is None
    assert pos_bias.shape == (4, FRAMES, FRAMES) and torch.equal(pos_bias, seen["kwargs"]["pos_bias"])


def test_attention_weights_are_the_mean_over_heads():
    plain, ours = pair()
    with torch.no_grad():
        expected = plain(double(), output_hidden_states=True, output_attentions=True)
        x = expected.hidden_states[0].transpose(0, 1)
        _, weights, _ = ours.encoder.layers[0](x, need_weights=True)
    assert_equal_but_rounding(weights, expected.attentions[0].mean(1))


def test_projections_are_called():
    _, ours = pair()
    before, _ = ours.extract_features(double())
    ours.encoder.layers[1].self_attn.v_proj.register_forward_hook(lambda module, args, output: 2 * output)
    assert not torch.allclose(ours.extract_features(double())[0], before)
