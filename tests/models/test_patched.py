"""Methods that people put in the place of transformers' own run, whoever would have done their work."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf
from wavlm_cases import (
    SAMPLES,
    assert_close_to_truth,
    assert_gradients_close,
    gradients,
    ours_only,
    plain_model,
    ragged_mask,
    small_config,
    subject,
    truth_of,
    waveforms,
)

from wavlm_fast.modules._originals import own_methods
from wavlm_fast.modules._plain import _ARITHMETIC
from wavlm_fast.swap import FAST_CLASSES

pytestmark = ours_only

# Not a part of any forward.
_FREEZING = {"freeze_feature_encoder", "freeze_feature_extractor", "freeze_base_model", "_freeze_parameters"}
_ASIDE = {*_FREEZING, "tie_weights"}
METHODS = [
    (cls, name)
    for cls in (*FAST_CLASSES, hf.WavLMPreTrainedModel)
    for name, _ in own_methods(cls)
    if name not in _ASIDE
]
METHODS.remove((hf.WavLMPreTrainedModel, "_init_weights"))
OWN = [(cls, name) for cls, name in METHODS if cls in FAST_CLASSES]
LAYERS = [cls for cls in _ARITHMETIC if cls in (nn.Linear, nn.Conv1d, nn.LayerNorm, nn.GroupNorm, nn.Embedding,
                                                nn.Dropout, hf.WavLMSamePadLayer)]  # fmt: skip


def changed(value):
    """Something else of the same structure: louder above zero (norms hide a factor), half as long, with holes."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return torch.where(value > 0, value * 1.5, value)
        if value.dtype == torch.bool:
            return value & (torch.arange(value.shape[-1], device=value.device) % 3 != 1)
        return torch.div(value, 2, rounding_mode="floor")
    if isinstance(value, dict):
        return type(value)(**{k: changed(v) for k, v in value.items()})
    if isinstance(value, tuple):
        return tuple(map(changed, value))
    return value


def louder(method):
    @functools.wraps(method)
    def replaced(*args, **kwargs):
        return changed(method(*args, **kwargs))

    return replaced


def model_with(cls: type) -> nn.Module:
    """A model in which the class has work to do."""
    name = cls.__name__ if issubclass(cls, hf.WavLMPreTrainedModel) else "WavLMForXVector"
    name = "WavLMForSequenceClassification" if cls is hf.WavLMPreTrainedModel else name
    for form in ("base", "large"):
        model = plain_model(name, small_config(form))
        if any(isinstance(m, cls) for m in model.modules()):
            return model
    raise AssertionError(f"no model has a {cls}")


def run(model):
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(waveforms(dtype=dtype), attention_mask=ragged_mask(SAMPLES, 400))


def assert_patched(plain, before, *ours):
    expected, truth = run(plain), run(truth_of(plain))
    for model in ours:
        got = run(model)
        assert_close_to_truth(got, expected, truth)
        assert not torch.equal(got[0], before[0])


@pytest.mark.parametrize(("cls", "name"), METHODS, ids=lambda x: getattr(x, "__name__", x))
def test_a_method_of_transformers_class(cls, name, monkeypatch):
    plain = model_with(cls)
    ours, later = subject.accelerate(copy.deepcopy(plain)), copy.deepcopy(plain)
    before = run(ours)
    monkeypatch.setattr(cls, name, louder(getattr(cls, name)))
    assert_patched(plain, before, ours, subject.accelerate(later))
    if cls in FAST_CLASSES:
        assert f"{cls.__name__}.{name} was replaced" in str(subject.report(ours))
    monkeypatch.undo()
    assert torch.equal(run(ours)[0], before[0])
    assert "replaced" not in str(subject.report(ours))


@pytest.mark.parametrize(("cls", "name"), METHODS, ids=lambda x: getattr(x, "__name__", x))
def test_a_method_of_one_module(cls, name):
    """Of the last of its class, and set after it was made fast."""
    plain = model_with(cls)
    ours = subject.accelerate(copy.deepcopy(plain))
    before = run(ours)
    for model in (plain, ours):
        if name in ("compute_bias", "_relative_positions_bucket"):
            module = model.wavlm.encoder.layers[0].attention  # who else has a bias of its own
        else:
            module = [m for m in model.modules() if isinstance(m, cls)][-1]
        setattr(module, name, louder(getattr(module, name)))
    got, expected = run(ours), run(plain)
    # In float64 transformers' own, patched the same way: a copy would keep the float32 module in its closure.
    assert torch.allclose(got[0], expected[0], rtol=1e-3, atol=1e-4 * expected[0].abs().max().item())
    assert not torch.allclose(got[0], before[0], rtol=1e-2)


@pytest.mark.parametrize(("cls", "name"), OWN, ids=lambda x: getattr(x, "__name__", x))
def test_a_method_of_our_class(cls, name, monkeypatch):
    """Who looks for modules by name and patches their type finds ours."""
    plain = model_with(cls)
    ours = subject.accelerate(copy.deepcopy(plain))
    before = run(ours)
    kind = type(next(m for m in ours.modules() if isinstance(m, cls)))
    monkeypatch.setattr(kind, name, louder(getattr(kind, name)))
    got = run(ours)
    monkeypatch.setattr(cls, name, louder(getattr(cls, name)))
    expected = run(plain)
    assert torch.allclose(got[0], expected[0], rtol=1e-3, atol=1e-4 * expected[0].abs().max().item())
    assert not torch.allclose(got[0], before[0], rtol=1e-2)


@pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)
def test_the_arithmetic_of_a_layer_inside(cls, monkeypatch):
    plain = model_with(cls)
    ours = subject.accelerate(copy.deepcopy(plain))
    before, forward = run(ours), cls.forward

    def replaced(self, *args):
        # Of the attention's projections transformers reads the weights, whatever becomes of their forward.
        own = not isinstance(self, nn.Linear) or self.out_features == plain.config.intermediate_size
        return louder(forward)(self, *args) if own else forward(self, *args)

    monkeypatch.setattr(cls, "forward", replaced)
    assert_patched(plain, before, ours)


def test_an_activation(monkeypatch):
    plain = model_with(hf.WavLMFeedForward)
    ours = subject.accelerate(copy.deepcopy(plain))
    before, cls = run(ours), type(plain.wavlm.encoder.layers[0].feed_forward.intermediate_act_fn)
    monkeypatch.setattr(cls, "forward", louder(cls.forward))
    assert_patched(plain, before, ours)


def test_a_streaming_mask_in_the_bias(monkeypatch):
    """A layer that writes into the bias, which it expects for every pair of frames."""
    plain = model_with(hf.WavLMEncoderLayer)
    ours = subject.accelerate(copy.deepcopy(plain))
    before, forward = run(ours), hf.WavLMEncoderLayer.forward

    def causal(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        if position_bias is None:
            batch, frames = hidden_states.shape[:2]
            position_bias = self.attention.compute_bias(frames, frames).repeat(batch, 1, 1)
        frames = hidden_states.shape[1]
        late = torch.ones(frames, frames, dtype=torch.bool).triu(5)
        return forward(self, hidden_states, attention_mask, position_bias.masked_fill(late, -1e4), **kwargs)

    monkeypatch.setattr(hf.WavLMEncoderLayer, "forward", causal)
    assert_patched(plain, before, ours)


def test_one_replaced_before_our_import_is_none_of_transformers():
    class Theirs:
        def forward(self): ...

    Theirs.compute_bias = louder(lambda self: None)
    Theirs.compute_bias.__module__ = "somebody.else"
    assert dict(own_methods(Theirs)) == {"forward": Theirs.forward, "compute_bias": None}


def test_training_with_a_patch(monkeypatch):
    """Gradients too are those of the patched model."""
    plain = model_with(hf.WavLMAttention).train()
    ours = subject.accelerate(copy.deepcopy(plain))
    cls = hf.WavLMAttention
    monkeypatch.setattr(cls, "torch_multi_head_self_attention", louder(cls.torch_multi_head_self_attention))
    found = [
        gradients(model, lambda m: m(waveforms(dtype=next(m.parameters()).dtype)).logits.square().sum())
        for model in (ours, plain, truth_of(plain))
    ]
    assert_gradients_close(*found, plain)


def test_a_subclass_that_calls_our_forward_gets_ours():
    """Its checks, and for x-vectors its pooling."""

    class Probe(subject.WavLMForXVector):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Probe(small_config()).eval()
    assert "replaced" not in str(subject.report(model))
    with pytest.raises(ValueError, match="labels must lie in 0..4"):
        model(waveforms(), labels=torch.tensor([0, 7]))
