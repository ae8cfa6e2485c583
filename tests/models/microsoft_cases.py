"""Microsoft's WavLM as others keep it: the original's class with sensitive weights, and copies that were changed."""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from original_cases import original_config, pair
from torch import nn
from wavlm_cases import SAMPLES, assert_close_to_truth, small_config, truth_of, waveforms

from wavlm_fast import accelerate, restore
from wavlm_fast.original import (
    ConvFeatureExtractionModel,
    MultiheadAttention,
    TransformerEncoder,
    TransformerSentenceEncoderLayer,
    WavLM,
)

LAYER = "encoder.layers.1"
PADDED = torch.arange(SAMPLES) >= torch.tensor([[SAMPLES], [300]])  # [B, S]
CALLS = {
    "last": {},
    "padded": {"padding_mask": PADDED},
    "a layer": {"output_layer": 2},
    "every layer": {"output_layer": 3, "ret_layer_results": True, "padding_mask": PADDED},
    "the front end": {"ret_conv": True, "ret_layer_results": True, "padding_mask": PADDED},
}


def original(form="base", dtype=torch.float32, **changes):
    """The original's class in plain torch, in eval mode."""
    if changes.get("activation_fn") != "glu":
        return pair(form, dtype, **changes)[1]
    state = pair(form, dtype)[1].state_dict()
    model = restore(WavLM(original_config(small_config(form), **changes))).eval()
    own = model.state_dict()
    model.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return model.to(dtype)


def fast(plain, **options):
    return accelerate(copy.deepcopy(plain), **options)


class Frames(nn.Module):
    """As users wrap the model, which has no forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, source, padding_mask=None):
        return self.model.extract_features(source, padding_mask)[0]


def drawn(call, seed=0):
    """With numpy's generator, which the encoder draws layer drop from, in one state."""
    np.random.seed(seed)
    return call()


def check(plain, ours, dtype=torch.float32, calls=CALLS):
    """Ours gives what the plain model gives, in every form in which it is asked, by the rule of the house."""
    x, exact = waveforms(dtype=dtype), truth_of(plain)

    def run(model, **kwargs):
        with torch.no_grad():
            return drawn(lambda: model.extract_features(x.to(model.mask_emb.dtype, copy=True), **kwargs))

    for kwargs in calls.values():
        assert_close_to_truth(run(ours, **kwargs), run(plain, **kwargs), run(exact, **kwargs))


def of_class(model, cls, other):
    """The model, with modules of a class being of another class."""
    for module in model.modules():
        if type(module) is cls:
            module.__class__ = other
    return model


# Copies


class Reading(MultiheadAttention):
    """Reads its projections' weights, as Microsoft's does."""

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, position_bias=None
    ):
        frames, batch, _ = query.shape
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(frames, frames).repeat(batch, 1, 1)
        heads = (self.num_heads, self.head_dim)
        bias = self._gates(query.unflatten(-1, heads)) * position_bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            bias = bias.masked_fill(key_padding_mask[:, None, None], -torch.inf)
        q, k, v = (
            F.linear(query, p.weight, p.bias).unflatten(-1, heads).permute(1, 2, 0, 3)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = F.scaled_dot_product_attention(q, k, v, bias, self.dropout_module.p if self.training else 0.0)
        x = x.permute(2, 0, 1, 3).flatten(2)
        return F.linear(x, self.out_proj.weight, self.out_proj.bias), None, position_bias


class SameLayer(TransformerSentenceEncoderLayer):
    """The same in somebody else's module: tried, and made fast."""


class SameFrontEnd(ConvFeatureExtractionModel):
    pass


class SameModel(WavLM):
    pass


class Louder(TransformerSentenceEncoderLayer):
    def forward(self, x, *args, **kwargs):
        out, *rest = super().forward(x, *args, **kwargs)
        return out + 0.5 * x, *rest


class LouderWhileTraining(TransformerSentenceEncoderLayer):
    def forward(self, x, *args, **kwargs):
        return super().forward(1.5 * x if self.training else x, *args, **kwargs)


class FrozenFrontEnd(ConvFeatureExtractionModel):
    """Holds gradients back, and changes no value."""

    @torch.no_grad()
    def forward(self, x, mask=None):
        return super().forward(x, mask)


class SomeLouder(TransformerSentenceEncoderLayer):
    """Each layer as it was told."""

    louder = False

    def forward(self, x, *args, **kwargs):
        out, *rest = super().forward(x, *args, **kwargs)
        return out + x if self.louder else out, *rest


class OwnGate(MultiheadAttention):
    """With a method of a name of ours."""

    def _gate(self):
        return "mine"


class InPlace(TransformerEncoder):
    """Adds in place, as the published one does."""

    def extract_features(self, x, padding_mask=None, streaming_mask=None, tgt_layer=None):
        if padding_mask is not None:
            x[padding_mask] = 0
        x_conv = self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        x += x_conv
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)
        results, pos_bias = [] if tgt_layer is None else [(x, None)], None
        for i, layer in enumerate(self.layers):
            np.random.random()
            x, weights, pos_bias = layer(x, self_attn_padding_mask=padding_mask, need_weights=False, pos_bias=pos_bias)
            if tgt_layer is not None:
                results.append((x, weights))
            if i == tgt_layer:
                break
        return x.transpose(0, 1), results


class Normalising(WavLM):
    """Of a padded batch every row would see its padding."""

    def extract_features(self, source, *args, **kwargs):
        return super().extract_features(F.layer_norm(source, source.shape[1:]), *args, **kwargs)


class OwnRun(WavLM):
    """With a method and an attribute of names of ours."""

    def run(self):
        return "mine"


class Renamed(WavLM):
    """With other arguments: nothing is known of what it calls padding."""

    def extract_features(self, wav, lengths=None, layer=None):
        return super().extract_features(wav, output_layer=layer)


class TwoDimensional(nn.Module):
    """A front end of other convolutions."""

    def __init__(self, dim):
        super().__init__()
        self.conv_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(1, dim, (1, 30), stride=(1, 20)), nn.GELU())])

    def forward(self, x, mask=None):
        return self.conv_layers[0](x[:, None, None])[:, :, 0]
