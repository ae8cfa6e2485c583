"""`truncate` keeps the states of the layers that stay, to the bit, and runs no others."""

import copy

import pytest
import torch
from original_cases import both_forms, double, pair
from transformers import WavLMForXVector, WavLMModel
from wavlm_cases import FORMS, SAMPLES, small_config

from wavlm_fast import accelerate, truncate
from wavlm_fast.sensitive import make_sensitive


def build(form, cls=WavLMModel, **changes):
    return make_sensitive(cls(small_config(form, num_hidden_layers=4, **changes))).eval()


def states_of(model, waveform):
    with torch.inference_mode():
        out = model(waveform, output_hidden_states=True)
    return out.hidden_states, out.last_hidden_state


@pytest.mark.parametrize("fast", [False, True], ids=["transformers", "ours"])
@pytest.mark.parametrize("form", FORMS)
def test_states_stay_what_they_were(form, fast):
    model = accelerate(build(form)) if fast else build(form)
    waveform = torch.randn(2, SAMPLES)
    whole, last = states_of(model, waveform)
    ran = []
    assert truncate(model, 4) is model
    assert torch.equal(states_of(model, waveform)[1], last)
    for layers in (3, 1):
        ran.clear()
        truncate(model, layers)
        hooks = [layer.register_forward_hook(lambda *args: ran.append(1)) for layer in model.encoder.layers]
        states, last = states_of(model, waveform)
        assert len(ran) == layers == model.config.num_hidden_layers
        assert len(states) == layers + 1
        assert all(torch.equal(found, wanted) for found, wanted in zip(states, whole))
        assert torch.equal(last, whole[layers])
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@both_forms
def test_microsofts_layers_stay_what_they_were(form, fast):
    _, model = pair(form)
    model = accelerate(model) if fast else model
    with torch.no_grad():
        wanted, _ = model.extract_features(double(), output_layer=2)
        assert truncate(model, 2) is model and len(model.encoder.layers) == model.cfg.encoder_layers == 2
        assert torch.equal(model.extract_features(double())[0], wanted)


def test_accelerating_after_or_before_is_one():
    waveform = torch.randn(1, SAMPLES)
    before = truncate(accelerate(build("large")), 2)
    after = accelerate(truncate(build("large"), 2))
    after.load_state_dict(before.state_dict())
    assert torch.equal(states_of(before, waveform)[1], states_of(after, waveform)[1])


def test_a_truncated_model_learns():
    model = truncate(build("large"), 2)
    twin = accelerate(copy.deepcopy(model))
    waveform = torch.randn(1, SAMPLES)
    for each in (model, twin):
        each(waveform).last_hidden_state.square().mean().backward()
    for (name, wanted), (_, found) in zip(model.named_parameters(), twin.named_parameters()):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("layers", [0, -1, 5, True, 2.0])
def test_refused_numbers_of_layers(layers):
    with pytest.raises(ValueError, match="truncate wants 1 to 4 layers for this model, got"):
        truncate(build("base"), layers)


def test_a_head_is_refused():
    model = build("base", WavLMForXVector)
    with pytest.raises(TypeError, match=r"got a .*WavLMForXVector, whose head needs all layers: truncate its \.wavlm"):
        truncate(model, 2)
    with pytest.raises(TypeError, match="truncate wants a WavLMModel, got a torch.nn"):
        truncate(torch.nn.Linear(1, 1), 1)
