"""A WavLM's attention as no house has it: other names, frames `[B, T, C]`, the position bias in all layers."""

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, channels, heads, reach):
        super().__init__()
        self.heads, self.reach = heads, reach
        self.to_q, self.to_k, self.to_v, self.back = (nn.Linear(channels, channels) for _ in range(4))
        self.gate, self.const = nn.Linear(channels // heads, 8), nn.Parameter(torch.randn(heads))
        self.table = nn.Embedding(2 * reach + 1, heads)

    def bias(self, queries, keys):
        distance = torch.arange(keys) - torch.arange(queries)[:, None]
        return self.table(distance.clamp(-self.reach, self.reach) + self.reach).permute(2, 0, 1)

    def forward(self, x):
        batch, frames, channels = x.shape
        shape = (batch, frames, self.heads, channels // self.heads)
        q, k, v = (linear(x).view(shape).transpose(1, 2) for linear in (self.to_q, self.to_k, self.to_v))
        a, b = self.gate(x.view(shape).transpose(1, 2)).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        gate = a * (b * self.const[:, None] - 1) + 2
        scores = q @ k.mT * shape[-1] ** -0.5 + gate[..., None] * self.bias(frames, frames)
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# What `wavlm_fast/families/` would have of this house.
FAMILY = '''
import torch

from wavlm_fast.families._copies import Copy
from wavlm_fast.modules import Attention
from wavlm_fast.modules._originals import or_original

NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "back", "num_heads": "heads",
         "gru_rel_pos_linear": "gate", "gru_rel_pos_const": "const", "rel_attn_embed": "table"}


class FastAttention(Attention, Copy):
    attention_dropout = 0.0
    embed_dim = property(lambda self: self.back.out_features)
    head_dim = property(lambda self: self.back.out_features // self.heads)
    scaling = property(lambda self: self.head_dim**-0.5)
    compute_bias = property(lambda self: self.bias)

    @staticmethod
    def trials(module):
        x = torch.randn(2, 23, module.back.out_features, dtype=torch.float64)
        yield lambda own: own(x)

    @or_original
    def forward(self, x):
        return self.attend(x, None, None)[0]


for stage, house in NAMES.items():
    setattr(FastAttention, stage, property(lambda self, house=house: getattr(self, house)))


def recognised(model):
    for module in model.modules():
        if all(hasattr(module, name) for name in NAMES.values()):
            yield module, FastAttention


def relative(model):
    return "a model of another house" if hasattr(model, "to_q") and not hasattr(model, "gate") else None


def transformer_of(model):
    return None


def has_norm_behind(transformer):
    return False
'''
