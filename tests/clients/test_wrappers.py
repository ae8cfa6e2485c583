"""Wrappers that change the list of layers: by layers of their own, with adapters in them, or by fewer."""

from __future__ import annotations

import pytest
import torch
from held_to_truth import assert_their_gradients, assert_theirs, heard, three
from houses import LAYERS, config, microsoft_model, torchaudio_model
from torch import nn
from transformers.models.wavlm import modeling_wavlm as hf
from wavlm_cases import is_one_of, plain_model

import wavlm_fast

both_forms = pytest.mark.parametrize("form", ["base", "large"])
PADDED = torch.arange(600) >= torch.tensor([[600], [400]])


class LowRank(nn.Linear):
    """A linear map and what is learned beside it: loralib's, by which a layer is trained in place."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.down = nn.Parameter(torch.randn(2, sizes[0]) * 0.1)
        self.up = nn.Parameter(torch.randn(sizes[1], 2) * 0.1)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def with_low_rank(feed_forward, conf):
    feed_forward.intermediate_dense = LowRank(conf.hidden_size, conf.intermediate_size)
    feed_forward.output_dense = LowRank(conf.intermediate_size, conf.hidden_size)


class Scaled:
    """Somebody's own layer, in front of one of transformers'."""

    def __init__(self, conf, has_relative_position_bias=True):
        super().__init__(conf, has_relative_position_bias)
        with_low_rank(self.feed_forward, conf)
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, *arguments, **named):
        states, *others = super().forward(*arguments, **named)
        return (self.scale * states, *others)


class OwnPostNorm(Scaled, hf.WavLMEncoderLayer):
    pass


class OwnStable(Scaled, hf.WavLMEncoderLayerStableLayerNorm):
    pass


class OwnFromParts(nn.Module):
    """A layer written anew around transformers' attention and feed-forward, as vox-profile's are."""

    def __init__(self, conf, has_relative_position_bias=True):
        super().__init__()
        self.attention = hf.WavLMAttention(
            conf.hidden_size, conf.num_attention_heads, 0.0, conf.num_buckets, conf.max_bucket_distance,
            has_relative_position_bias,
        )  # fmt: skip
        self.layer_norm, self.final_layer_norm = (nn.LayerNorm(conf.hidden_size) for _ in range(2))
        self.feed_forward = hf.WavLMFeedForward(conf)
        with_low_rank(self.feed_forward, conf)
        self.stable = conf.do_stable_layer_norm

    def forward(self, x, attention_mask=None, position_bias=None, output_attentions=False, **others):
        read = self.layer_norm(x) if self.stable else x
        branch, weights, position_bias = self.attention(
            read, attention_mask=attention_mask, position_bias=position_bias, output_attentions=output_attentions
        )
        x = x + branch
        if self.stable:
            x = x + self.feed_forward(self.final_layer_norm(x))
        else:
            x = self.layer_norm(x)
            x = self.final_layer_norm(x + self.feed_forward(x))
        return (x, position_bias, weights) if output_attentions else (x, position_bias)


class Wrapper(nn.Module):
    """The published model, its layers replaced by trainable ones of the same weights, and a mean of their outputs."""

    def __init__(self, form, layer):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = plain_model("WavLMModel", config(form))
        state, conf = self.backbone.state_dict(), self.backbone.config
        layers = [layer(conf, has_relative_position_bias=i == 0) for i in range(conf.num_hidden_layers)]
        self.backbone.encoder.layers = nn.ModuleList(layers)
        assert not self.backbone.load_state_dict(state, strict=False).unexpected_keys
        self.backbone.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.endswith(("down", "up", "scale")))
        self.shares = nn.Parameter(torch.linspace(-1, 1, conf.num_hidden_layers))
        self.states = []
        for own in layers:
            own.register_forward_hook(lambda _, given, output: self.states.append(output[0]))

    def forward(self, x, attention_mask=None):
        self.states.clear()
        self.backbone(x, attention_mask=attention_mask)
        return (torch.stack(self.states) * self.shares.softmax(0)[:, None, None, None]).sum(0)


def own_layer(form, kind):
    return OwnFromParts if kind == "from parts" else OwnStable if form == "large" else OwnPostNorm


@both_forms
@pytest.mark.parametrize("kind", ["subclass", "from parts"])
def test_layers_of_the_wrappers_own(form, kind):
    layer = own_layer(form, kind)
    models = three(lambda: Wrapper(form, layer).eval())
    for mask in (None, (~PADDED).long()):
        assert_theirs(models, lambda m, k=mask: m(heard(m), k))
    assert all(isinstance(own, layer) for own in models.ours.backbone.encoder.layers)
    assert all(type(own.attention) is not hf.WavLMAttention for own in models.ours.backbone.encoder.layers)
    assert_their_gradients(models, lambda m, x: m(x), lambda n: n.removeprefix("backbone."))


@both_forms
def test_layers_replaced_after_accelerating(form):
    models = three(lambda: plain_model("WavLMModel", config(form)))
    for model in models:
        torch.manual_seed(1)
        state, conf = model.state_dict(), model.config
        layers = [own_layer(form, "subclass")(conf, has_relative_position_bias=i == 0) for i in range(LAYERS)]
        model.encoder.layers = nn.ModuleList(layers).to(model.dtype)
        model.load_state_dict(state, strict=False)
        model.eval()
    for _ in ("as they are", "accelerated again"):
        assert_theirs(models, lambda m: m(heard(m), output_hidden_states=True))
        wavlm_fast.accelerate(models.ours)
    assert is_one_of(models.ours, "WavLMModel")


HOUSES = {
    "transformers": (
        lambda form: plain_model("WavLMModel", config(form)),
        lambda m: m.encoder,
        lambda m: m(heard(m), output_hidden_states=True),
    ),
    "Microsoft": (
        microsoft_model,
        lambda m: m.encoder,
        lambda m: [m.extract_features(heard(m), PADDED, output_layer=n, ret_layer_results=True) for n in (None, 2)],
    ),
    "torchaudio": (
        torchaudio_model,
        lambda m: m.encoder.transformer,
        lambda m: (m(heard(m)), m.extract_features(heard(m))),
    ),
}


@both_forms
@pytest.mark.parametrize("house", HOUSES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_cut_off(form, house, when):
    build, encoder, call = HOUSES[house]

    def cut(model):
        encoder(model).layers = encoder(model).layers[:2]
        return model

    models = three(lambda: cut(build(form)) if when == "before" else build(form))
    if when == "after":
        for model in models:
            cut(model)
    assert_theirs(models, call)


@both_forms
@pytest.mark.parametrize("house", HOUSES)
def test_layers_in_another_order_and_twice(form, house):
    build, encoder, call = HOUSES[house]

    def reordered(model):
        layers = encoder(model).layers
        encoder(model).layers = nn.ModuleList([layers[0], layers[2], layers[1], layers[2]])
        return model

    assert_theirs(three(lambda: reordered(build(form))), call)
