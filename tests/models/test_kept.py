"""A layer decides once how it runs; whatever that depends on, the next forward follows a change of it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.wavlm import modeling_wavlm as hf
from wavlm_cases import fast_like, ours_only, plain_model, waveforms

from wavlm_fast.modules import _kept

pytestmark = ours_only


class Louder(nn.Module):
    """Somebody's own in the place of a module, or of what makes a weight."""

    def __init__(self, inner=None):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 1.5 * (x if self.inner is None else self.inner(x))


def louder(*args):
    """A hook, before or after."""
    return 1.5 * args[2] if len(args) == 3 else tuple(1.5 * x for x in args[1])


def _own_forward(module):
    inner = module.forward
    module.forward = lambda *args: 1.5 * inner(*args)


def _new_data(parameter):
    parameter.data = 1.5 * parameter.data


def _written(parameter):
    with torch.no_grad():
        parameter.mul_(1.5)


# Of a layer: each is what a fused layer must not pass by.
CHANGES = {
    "hook": lambda layer: layer.attention.out_proj.register_forward_hook(louder),
    "hook before": lambda layer: layer.feed_forward.output_dense.register_forward_pre_hook(louder),
    "hook of a dropout": lambda layer: layer.dropout.register_forward_hook(louder),
    "hook of the feed-forward": lambda layer: layer.feed_forward.register_forward_hook(louder),
    "module replaced": lambda layer: setattr(layer.attention, "q_proj", Louder(layer.attention.q_proj)),
    "norm replaced": lambda layer: setattr(layer, "layer_norm", Louder(layer.layer_norm)),
    "activation replaced": lambda layer: setattr(layer.feed_forward, "intermediate_act_fn", nn.ReLU()),
    "own forward": lambda layer: _own_forward(layer.feed_forward.intermediate_dense),
    "parametrized": lambda layer: parametrize.register_parametrization(layer.attention.v_proj, "weight", Louder()),
    "parameter replaced": lambda layer: setattr(
        layer.attention.k_proj, "weight", nn.Parameter(layer.attention.k_proj.weight.detach() * 1.5)
    ),
    "parameter gone": lambda layer: setattr(layer.attention.out_proj, "bias", None),
    "new data": lambda layer: _new_data(layer.feed_forward.output_dense.weight),
    "gate's const with new data": lambda layer: _new_data(layer.attention.gru_rel_pos_const),
    "written to": lambda layer: _written(layer.attention.gru_rel_pos_linear.weight),
    "eps": lambda layer: setattr(layer.final_layer_norm, "eps", 0.5),
    "scale": lambda layer: setattr(layer.attention, "scaling", 0.5),
}


@pytest.fixture(scope="module")
def plain():
    return plain_model("WavLMModel").eval()


def run(model, x):
    with torch.no_grad():
        return model(x).last_hidden_state


@pytest.mark.parametrize("change", CHANGES)
def test_the_next_forward_follows_a_change_inside_of_a_layer(plain, change):
    model, x = fast_like(plain), waveforms()
    before = run(model, x), run(model, x)
    assert model.encoder.layers[1] in _kept._kept
    assert torch.equal(*before)
    CHANGES[change](model.encoder.layers[1])
    after = run(model, x)
    assert not torch.allclose(after, before[0], rtol=1e-3, atol=1e-3)
    changed_at_first = fast_like(plain)
    CHANGES[change](changed_at_first.encoder.layers[1])
    assert torch.equal(after, run(changed_at_first, x))


@pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm, nn.Dropout, hf.WavLMAttention, hf.WavLMFeedForward])
def test_the_next_forward_follows_a_change_of_a_class(plain, cls, monkeypatch):
    model, x = fast_like(plain), waveforms()
    run(model, x), run(model, x)
    calls, inner = [], cls.forward
    monkeypatch.setattr(cls, "forward", lambda *a, **k: calls.append(a[0]) or inner(*a, **k))
    run(model, x)
    inside = set(map(id, model.encoder.layers[1].modules()))
    assert any(id(module) in inside for module in calls)


def test_the_next_forward_follows_a_hook_of_all_modules(plain):
    model, x, called = fast_like(plain), waveforms(), []
    run(model, x), run(model, x)
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *rest: called.append(module)):
        run(model, x)
    assert any(module is model.encoder.layers[1].attention.q_proj for module in called)


def test_the_next_forward_follows_a_wish_for_gradients_and_dropout(plain):
    model, x = fast_like(plain).requires_grad_(False), waveforms()
    model(x), model(x)
    model.encoder.layers[1].attention.q_proj.weight.requires_grad_(True)
    model(x).last_hidden_state.sum().backward()
    assert model.encoder.layers[1].attention.q_proj.weight.grad.abs().max() > 0
    before = run(model, x)
    model.encoder.layers[1].dropout.p = 0.5
    model.encoder.layers[1].dropout.train()
    assert not torch.allclose(run(model, x), before, rtol=1e-3, atol=1e-3)


def test_what_was_decided_dies_with_the_layer(plain):
    model = fast_like(plain)
    run(model, waveforms())
    layers = [weakref.ref(layer) for layer in model.encoder.layers]
    assert all(layer() in _kept._kept for layer in layers)
    del model
    gc.collect()
    assert not any(layer() for layer in layers)


def test_refusals_are_not_kept(plain):
    model = fast_like(plain)
    layer = model.encoder.layers[1]
    run(model, waveforms())
    handle = layer.attention.q_proj.register_forward_hook(louder)
    run(model, waveforms())
    assert layer not in _kept._kept
    handle.remove()
    run(model, waveforms())
    assert layer in _kept._kept
