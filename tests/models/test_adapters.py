"""LoRA through PEFT, and linears quantized by torch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from wavlm_cases import (
    SAMPLES,
    assert_close_to_truth,
    fast_like,
    fast_model,
    main_output,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
    with_labels,
)

peft = pytest.importorskip("peft")
both_forms = pytest.mark.parametrize("form", ["base", "large"])


def with_lora(model, targets=("q_proj", "v_proj"), init=False):
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=list(targets), r=4, lora_alpha=8, init_lora_weights=init)
    return peft.get_peft_model(model, config).eval()


@ours_only  # transformers reads the base weights of the projections and drops LoRA on them
@both_forms
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj",), ("out_proj",)])
def test_lora_changes_the_output_as_its_merged_weights_do(form, targets):
    plain = plain_model("WavLMModel", small_config(form))
    ours = with_lora(fast_like(plain), targets)
    with torch.no_grad():
        adapted = ours(waveforms()).last_hidden_state
        with ours.disable_adapter():
            base = ours(waveforms()).last_hidden_state
    assert not torch.allclose(adapted, base, rtol=1e-3, atol=1e-3)
    merged = with_lora(plain, targets).merge_and_unload()
    with torch.no_grad():
        expected = merged(waveforms()).last_hidden_state
        truth = truth_of(merged)(waveforms().double()).last_hidden_state
        assert_close_to_truth(adapted, expected, truth)
        ours = ours.merge_and_unload()
        assert_close_to_truth(ours(waveforms()).last_hidden_state, expected, truth)


@both_forms
def test_lora_on_the_feed_forward_is_what_it_is_in_transformers(form):
    targets = ("intermediate_dense", "output_dense", "feature_projection.projection", "gru_rel_pos_linear")
    plain = plain_model("WavLMModel", small_config(form))
    ours, exact = with_lora(fast_like(plain), targets), with_lora(truth_of(plain), targets).double()
    plain = with_lora(plain, targets)
    exact.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert_close_to_truth(ours(waveforms()), plain(waveforms()), exact(waveforms().double()))


@ours_only
@both_forms
def test_lora_trains(form):
    model = with_lora(fast_model("WavLMForCTC", small_config(form)), init=True).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n for n in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(6):
        loss = model(waveforms(), **with_labels("WavLMForCTC", model.config)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n
        else:
            assert not torch.equal(p, trained[n]), f"{n} was never trained"


@ours_only
def test_a_second_adapter_is_switched_on_and_off_between_calls():
    model = with_lora(fast_model("WavLMModel"))
    torch.manual_seed(4)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False))
    outputs = {}
    with torch.no_grad():
        for adapter in ("default", "other", "default"):
            model.set_adapter(adapter)
            out = model(waveforms()).last_hidden_state
            assert adapter not in outputs or torch.equal(outputs[adapter], out)
            outputs[adapter] = out
        model.merge_adapter()
        torch.testing.assert_close(model(waveforms()).last_hidden_state, out, rtol=1e-3, atol=1e-2)
        model.unmerge_adapter()
        torch.testing.assert_close(model(waveforms()).last_hidden_state, out, rtol=1e-3, atol=1e-2)


@ours_only
def test_accelerate_finds_the_model_inside_peft():
    wrapped = with_lora(plain_model("WavLMModel"))
    with torch.no_grad():
        before = wrapped(waveforms()).last_hidden_state
    assert subject.accelerate(wrapped) is wrapped
    inner = wrapped.get_base_model()
    assert isinstance(inner, subject.WavLMModel)
    with torch.no_grad():
        after = wrapped(waveforms()).last_hidden_state
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3), "LoRA on q_proj and v_proj still has no effect"
    assert subject.restore(wrapped) is wrapped
    with torch.no_grad():
        assert torch.equal(wrapped(waveforms()).last_hidden_state, before)


@ours_only
@both_forms
def test_every_linear_quantized(form):
    plain = plain_model("WavLMForSequenceClassification", small_config(form))
    ours = fast_like(plain)
    quantized = torch.ao.quantization.quantize_dynamic(ours, {nn.Linear}, dtype=torch.qint8)
    replaced = [n for n, m in quantized.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert any("q_proj" in n for n in replaced) and any("intermediate_dense" in n for n in replaced)
    # The same roundings of the weights in a plain model; those of the activations remain as a difference.
    dequantized = copy.deepcopy(plain)
    with torch.no_grad():
        for path in replaced:
            dequantized.get_submodule(path).weight.copy_(quantized.get_submodule(path).weight().dequantize())
        mask = ragged_mask(SAMPLES, 400)
        got = main_output(quantized(waveforms(), attention_mask=mask))
        expected = main_output(dequantized(waveforms(), attention_mask=mask))
        float_output = main_output(ours(waveforms(), attention_mask=mask))
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 0.15 * scale
    assert not torch.equal(got, float_output)


@both_forms
def test_the_linears_that_transformers_can_quantize(form):
    plain = plain_model("WavLMModel", small_config(form))
    ours = fast_like(plain)
    names = {n for n, m in plain.named_modules() if n.endswith(("_dense", "gru_rel_pos_linear", ".projection"))}
    qconfig = dict.fromkeys(names, torch.ao.quantization.default_dynamic_qconfig)
    with torch.no_grad():
        got, expected = (
            torch.ao.quantization.quantize_dynamic(m, qconfig)(waveforms()).last_hidden_state for m in (ours, plain)
        )
        unquantized = plain(waveforms()).last_hidden_state
    # One rounding of an activation may fall to the other side: compare against the whole quantization error.
    assert (got - expected).abs().max() <= 0.5 * (unquantized - expected).abs().max()


@ours_only
def test_a_single_quantized_projection():
    plain = plain_model("WavLMModel")
    ours = fast_like(plain)
    name = "encoder.layers.1.attention.v_proj"
    quantized = torch.ao.quantization.quantize_dynamic(ours, {name: torch.ao.quantization.default_dynamic_qconfig})
    assert not isinstance(quantized.get_submodule(name), nn.Linear) or not isinstance(
        quantized.get_submodule(name).weight, torch.Tensor
    )
    with torch.no_grad():
        got, expected = quantized(waveforms()).last_hidden_state, plain(waveforms()).last_hidden_state
    assert 0 < (got - expected).abs().max() < 0.15 * expected.abs().max()
