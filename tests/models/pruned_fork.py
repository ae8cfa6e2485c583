"""A pruned WavLM as the forks of torchaudio's model have it (DiariZen's, after DPHuBERT).

Written for these tests; what is theirs is the interface: names of modules, attributes and parameters, arguments of
each forward, and what is computed. A layer has heads of its own choice, each with its own row of a bias over all the
heads that were there before; a feed-forward of its own width; or lacks either. Projections are separate, the front end
ends in one factor per channel, and masks that are learned while pruning have become None.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn
from torch.nn import functional as F
from wavlm_cases import plain_model, small_config

# Of every layer: heads that are left, and width of its feed-forward; None where it has been pruned away.
PLAN = (((0, 2, 3), 40), ((1,), None), (None, 96), ((0, 1, 2, 3), 7))
CHANNELS = (14, 11, 24)  # left of each convolution


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


class LayerNorm(nn.LayerNorm):
    def forward(self, input):
        return super().forward(input.mT).mT  # [B, C, T]


class ConvLayerBlock(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride, bias, layer_norm):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.layer_norm = layer_norm
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.hard_concrete = None

    def forward(self, x, length):
        x = self.conv(x)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = F.gelu(x)
        if self.hard_concrete is not None:
            x = x * self.hard_concrete()[:, None]
        if length is not None:
            length = ((length - self.kernel_size) // self.stride + 1).clamp(min=0)
        return x, length


class FeatureExtractor(nn.Module):
    def __init__(self, conv_layers):
        super().__init__()
        self.conv_layers = conv_layers
        self.dummy_weight = nn.Parameter(torch.ones(conv_layers[-1].conv.out_channels), requires_grad=False)

    def forward(self, x, length):
        x = x[:, None]
        for layer in self.conv_layers:
            x, length = layer(x, length)
        return x.mT * self.dummy_weight, length


class FeatureProjection(nn.Module):
    def __init__(self, in_features, out_features, dropout):
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.projection(self.layer_norm(x)))


class ConvolutionalPositionalEmbedding(nn.Module):
    def __init__(self, embed_dim, kernel_size, groups):
        super().__init__()
        self.embed_dim, self.kernel_size = embed_dim, kernel_size
        conv = nn.Conv1d(embed_dim, embed_dim, kernel_size, padding=kernel_size // 2, groups=groups)
        self.conv = nn.utils.parametrizations.weight_norm(conv, name="weight", dim=2)
        self.num_remove = 1 - kernel_size % 2

    def forward(self, x):
        x = self.conv(x.mT)
        return F.gelu(x[..., : x.shape[-1] - self.num_remove]).mT


class WavLMSelfAttention(nn.Module):
    def __init__(self, embed_dim, total_num_heads, remaining_heads, dropout, has_bias, num_buckets, max_distance):
        super().__init__()
        self.embed_dim = embed_dim
        self.total_num_heads = total_num_heads
        self.remaining_heads = list(remaining_heads)
        self.num_heads = len(self.remaining_heads)
        self.head_dim = embed_dim // total_num_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = nn.Dropout(dropout)
        inner = self.num_heads * self.head_dim
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(embed_dim, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, embed_dim)
        self.hard_concrete_for_heads = self.hard_concrete_for_layer = None
        self.has_relative_attention_bias = has_bias
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.rel_attn_embed = nn.Embedding(num_buckets, total_num_heads) if has_bias else None
        self.gru_rel_pos = True
        self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
        self.gru_rel_pos_const = nn.Parameter(torch.ones(1, total_num_heads, 1, 1))
        self.has_position_bias = True

    def _relative_positions_bucket(self, relative_positions, bidirectional=True):
        distance, half = relative_positions.abs(), self.num_buckets // 2
        near = half // 2
        far = torch.log(distance.float() / near) / math.log(self.max_distance / near) * (half - near)
        far = (near + far.clamp(min=0).long()).clamp(max=half - 1)
        return torch.where(distance < near, distance, far) + half * (relative_positions > 0)

    def compute_bias(self, query_length, key_length):
        distance = torch.arange(key_length)[None] - torch.arange(query_length)[:, None]
        bucket = self._relative_positions_bucket(distance).to(self.rel_attn_embed.weight.device)
        return self.rel_attn_embed(bucket).permute(2, 0, 1)  # [H, T, T]

    def forward(self, query, attention_mask=None, position_bias=None, key_padding_mask=None):
        assert key_padding_mask is None
        B, T, _ = query.shape
        H = self.total_num_heads
        if self.rel_attn_embed is not None and position_bias is None:
            position_bias = self.compute_bias(T, T).repeat(B, 1, 1)  # [B * H, T, T]
        bias = attention_mask
        if position_bias is not None:
            split = query.view(B, T, H, -1).transpose(1, 2)  # every head that was, though few are left
            a, b = self.gru_rel_pos_linear(split).view(B, H, T, 2, 4).sum(-1).sigmoid().chunk(2, dim=-1)
            gate = a * (b * self.gru_rel_pos_const - 1.0) + 2.0
            gated = (gate * position_bias.view(B, H, T, T))[:, self.remaining_heads]
            bias = gated if attention_mask is None else gated + attention_mask
        q, k, v = (
            projection(query).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (self.scaling * q) @ k.mT
        if bias is not None:
            scores = scores + bias
        context = self.dropout(scores.softmax(-1)) @ v
        if self.hard_concrete_for_heads is not None:
            context = context * self.hard_concrete_for_heads()[:, None, None]
        output = self.out_proj(context.transpose(1, 2).reshape(B, T, -1))
        if self.hard_concrete_for_layer is not None:
            output = output * self.hard_concrete_for_layer()
        return output, position_bias


class FeedForward(nn.Module):
    def __init__(self, io_features, intermediate_features, intermediate_dropout, output_dropout):
        super().__init__()
        self.intermediate_dense = nn.Linear(io_features, intermediate_features)
        self.intermediate_dropout = nn.Dropout(intermediate_dropout)
        self.output_dense = nn.Linear(intermediate_features, io_features)
        self.output_dropout = nn.Dropout(output_dropout)
        self.hard_concrete_for_intermediate = self.hard_concrete_for_layer = None

    def forward(self, x):
        x = self.intermediate_dropout(F.gelu(self.intermediate_dense(x)))
        if self.hard_concrete_for_intermediate is not None:
            x = x * self.hard_concrete_for_intermediate()
        x = self.output_dropout(self.output_dense(x))
        return x if self.hard_concrete_for_layer is None else x * self.hard_concrete_for_layer()


class EncoderLayer(nn.Module):
    def __init__(self, attention, dropout, layer_norm_first, feed_forward, embed_dim):
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(embed_dim)
        self.embed_dim = embed_dim

    def forward(self, x, attention_mask=None, position_bias=None, key_padding_mask=None):
        if self.attention is not None:
            read = self.layer_norm(x) if self.layer_norm_first else x
            branch, position_bias = self.attention(
                read, attention_mask=attention_mask, position_bias=position_bias, key_padding_mask=key_padding_mask
            )
            x = x + self.dropout(branch)
        if self.layer_norm_first:
            if self.feed_forward is not None:
                x = x + self.feed_forward(self.final_layer_norm(x))
            return x, position_bias
        x = self.layer_norm(x)  # whatever is left of the layer
        if self.feed_forward is not None:
            x = x + self.feed_forward(x)
        return self.final_layer_norm(x), position_bias


class Transformer(nn.Module):
    def __init__(self, pos_conv_embed, dropout, layers, layer_norm_first, layer_drop, total_num_heads):
        super().__init__()
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(pos_conv_embed.embed_dim)
        self.layer_norm_first = layer_norm_first  # of the embedding: the opposite of what it is in a layer
        self.layer_drop = layer_drop
        self.dropout = nn.Dropout(dropout)
        self.layers = layers
        self.total_num_heads = total_num_heads

    def _preprocess(self, x):
        x = x + self.pos_conv_embed(x)
        return self.dropout(self.layer_norm(x) if self.layer_norm_first else x)

    def forward(self, x, attention_mask=None, position_bias=None):
        x = self._preprocess(x)
        for layer in self.layers:
            if not (self.training and torch.rand(1).item() <= self.layer_drop):
                x, position_bias = layer(x, attention_mask, position_bias=position_bias)
        return x if self.layer_norm_first else self.layer_norm(x)

    def get_intermediate_outputs(self, x, attention_mask=None, num_layers=None, position_bias=None):
        states = [self._preprocess(x)]
        for layer in self.layers:
            x, position_bias = layer(states[-1], attention_mask, position_bias=position_bias)
            states.append(x)
            if num_layers is not None and len(states) >= num_layers:
                break
        return states


class Encoder(nn.Module):
    def __init__(self, feature_projection, transformer):
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def _preprocess(self, features, lengths=None):
        x = self.feature_projection(features)
        if lengths is None:
            return x, None
        B, T, _ = x.shape
        padded = torch.arange(T, device=lengths.device) >= lengths[:, None]
        x[padded] = 0.0
        return x, (-10000.0 * padded.to(x.dtype))[:, None, None].expand(B, 1, T, T)

    def forward(self, features, lengths=None):
        x, mask = self._preprocess(features, lengths)
        return self.transformer(x, attention_mask=mask)

    def extract_features(self, features, lengths=None, num_layers=None):
        x, mask = self._preprocess(features, lengths)
        return self.transformer.get_intermediate_outputs(x, attention_mask=mask, num_layers=num_layers)


class Wav2Vec2Model(nn.Module):
    def __init__(self, normalize_waveform, feature_extractor, encoder, aux=None, feature_grad_mult=0.1):
        super().__init__()
        self.normalize_waveform = normalize_waveform
        self.feature_extractor = feature_extractor
        self.encoder = encoder
        self.aux = aux
        self.feature_grad_mult = feature_grad_mult

    def _features(self, waveforms, lengths):
        if self.normalize_waveform:
            ends = [waveforms.shape[-1]] * len(waveforms) if lengths is None else lengths.tolist()
            rows = [F.layer_norm(row[:end], (end,)) for row, end in zip(waveforms, ends)]
            waveforms = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        x, lengths = self.feature_extractor(waveforms, lengths)
        return (x if self.feature_grad_mult == 1.0 else Scaled.apply(x, self.feature_grad_mult)), lengths

    def extract_features(self, waveforms, lengths=None, num_layers=None):
        x, lengths = self._features(waveforms, lengths)
        return self.encoder.extract_features(x, lengths, num_layers), lengths

    def forward(self, waveforms, lengths=None):
        x, lengths = self._features(waveforms, lengths)
        x = self.encoder(x, lengths)
        return (x if self.aux is None else self.aux(x)), lengths


def pruned(form="base", plan=PLAN, channels=CHANNELS):
    """A pruned model in eval mode, of sensitive weights: those of a whole one, without what has been pruned."""
    config = small_config(form, hidden_size=64, num_attention_heads=4, num_hidden_layers=len(plan))
    config.intermediate_size = 96
    model = _structure(config, plan, channels)
    whole = plain_model("WavLMModel", config).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "feature_extractor.dummy_weight":
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
                continue
            theirs = name.replace("encoder.transformer.", "encoder.")
            value = whole[theirs.replace("encoder.feature_projection", "feature_projection")]
            found = re.search(r"layers\.(\d+)\.attention\.([qkv]|out)_proj\.(\w+)", name)
            if found:
                heads = torch.tensor(plan[int(found[1])][0])
                rows = torch.arange(64).view(4, 16)[heads].flatten()
                value = value[rows] if found[2] != "out" else value[:, rows] if found[3] == "weight" else value
            parameter.copy_(value[tuple(slice(size) for size in parameter.shape)])
    return model.eval()


def _structure(config, plan, channels):
    stable, norm = config.do_stable_layer_norm, config.feat_extract_norm
    blocks, before = nn.ModuleList(), 1
    for width, kernel, stride in zip(channels, config.conv_kernel, config.conv_stride):
        normalise = LayerNorm(width) if norm == "layer" else nn.GroupNorm(width, width) if not blocks else None
        blocks.append(ConvLayerBlock(before, width, kernel, stride, False, normalise))
        before = width
    C, H = config.hidden_size, config.num_attention_heads
    groups = config.num_conv_pos_embedding_groups
    layers = nn.ModuleList()
    for i, (heads, width) in enumerate(plan):
        sizes = (0.0, i == 0, config.num_buckets, config.max_bucket_distance)
        attention = None if heads is None else WavLMSelfAttention(C, H, heads, *sizes)
        feed_forward = None if width is None else FeedForward(C, width, 0.0, 0.0)
        layers.append(EncoderLayer(attention, 0.0, stable, feed_forward, C))
    positions = ConvolutionalPositionalEmbedding(C, config.num_conv_pos_embeddings, groups)
    transformer = Transformer(positions, 0.0, layers, not stable, 0.0, H)
    encoder = Encoder(FeatureProjection(before, C, 0.0), transformer)
    return Wav2Vec2Model(norm == "layer", FeatureExtractor(blocks), encoder)
