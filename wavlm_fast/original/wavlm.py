"""The model: front end, positional convolution, transformer."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DEFAULTS, WavLMConfig, conv_layers
from .masking import compute_mask_indices
from .modules import (
    ACTIVATIONS,
    Fp32GroupNorm,
    Fp32LayerNorm,
    GLU_Linear,
    MultiheadAttention,
    SamePad,
    TransposeLast,
    WeightNormConv1d,
)


class WavLM(nn.Module):
    """The model, fast from the start; `wavlm_fast.restore` makes it plain torch.

    Args:
        cfg: the configuration, `WavLMConfig(checkpoint["cfg"])`.

    Raises:
        ValueError: the configuration is not a WavLM's, or one of its values is none that there is.
    """

    mask_prob: float
    mask_length: int
    mask_selection: str
    mask_other: float
    mask_min_space: int
    no_mask_overlap: bool
    mask_channel_prob: float
    mask_channel_length: int
    mask_channel_selection: str
    mask_channel_other: float
    mask_channel_min_space: int
    no_mask_channel_overlap: bool

    def __init__(self, cfg: WavLMConfig) -> None:
        super().__init__()
        asked = {name: getattr(cfg, name, False) for name in ("relative_position_embedding", "gru_rel_pos")}
        if not all(asked.values()):
            said = ", ".join(f"{name}={value}" for name, value in asked.items())
            raise ValueError(f"no gated relative position bias ({said}): this is a HuBERT's config, a WavLM's has both")
        self.cfg = cfg
        layers = conv_layers(cfg.conv_feature_layers)
        self.embed = layers[-1][0]
        self.feature_extractor = ConvFeatureExtractionModel(layers, 0.0, cfg.extractor_mode, cfg.conv_bias)
        dim = cfg.encoder_embed_dim
        self.post_extract_proj = nn.Linear(self.embed, dim) if self.embed != dim else None
        for name in DEFAULTS:
            if name.startswith(("mask_", "no_mask_")):
                setattr(self, name, getattr(cfg, name))
        self.dropout_input = nn.Dropout(cfg.dropout_input)
        self.dropout_features = nn.Dropout(cfg.dropout_features)  # of pre-training, where features are targets too
        self.feature_grad_mult = cfg.feature_grad_mult
        self.mask_emb = nn.Parameter(torch.empty(dim).uniform_())
        self.encoder = TransformerEncoder(cfg)
        self.layer_norm = nn.LayerNorm(self.embed)
        from ..swap import accelerate_new  # which puts fast classes in the place of any house's

        accelerate_new(self)

    def apply_mask(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Frames `[B, T, C]` with spans of frames replaced by `mask_emb` and spans of channels by 0.

        Returns:
            The frames, and where they were replaced, `[B, T]` bool; None where `mask_prob` is 0.
        """
        batch, frames, channels = x.shape
        masked = None
        if self.mask_prob > 0:
            drawn = compute_mask_indices(
                (batch, frames),
                padding_mask,
                self.mask_prob,
                self.mask_length,
                self.mask_selection,
                self.mask_other,
                min_masks=2,
                no_overlap=self.no_mask_overlap,
                min_space=self.mask_min_space,
            )
            masked = torch.from_numpy(drawn).to(x.device)
            x = torch.where(masked[..., None], self.mask_emb.to(x.dtype), x)
        if self.mask_channel_prob > 0:
            drawn = compute_mask_indices(
                (batch, channels),
                None,
                self.mask_channel_prob,
                self.mask_channel_length,
                self.mask_channel_selection,
                self.mask_channel_other,
                no_overlap=self.no_mask_channel_overlap,
                min_space=self.mask_channel_min_space,
            )
            x = x.masked_fill(torch.from_numpy(drawn).to(x.device)[:, None], 0)
        return x, masked

    def forward_padding_mask(self, features: Tensor, padding_mask: Tensor) -> Tensor:
        """A mask `[B, S]` of samples as one of T frames, `[B, T]`: True where a T-th of the samples is all padded."""
        frames = features.size(1)
        samples = padding_mask.size(1) // frames * frames
        return padding_mask[:, :samples].reshape(padding_mask.size(0), frames, -1).all(-1).bool()

    @overload
    def extract_features(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: int | None = None,
        ret_layer_results: Literal[False] = False,
    ) -> tuple[Tensor, Tensor | None]: ...

    @overload
    def extract_features(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: int | None = None,
        *,
        ret_layer_results: Literal[True],
    ) -> tuple[tuple[Tensor, list[tuple[Tensor, None]]], Tensor | None]: ...

    @overload
    def extract_features(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: int | None = None,
        ret_layer_results: bool = False,
    ) -> tuple[Any, Tensor | None]: ...

    def extract_features(
        self,
        source: Tensor,
        padding_mask: Tensor | None = None,
        mask: bool = False,
        ret_conv: bool = False,
        output_layer: int | None = None,
        ret_layer_results: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, list[tuple[Tensor, None]]], Tensor | None]:
        """Frames of waveforms.

        Args:
            source: `[B, S]`, 16 kHz; of mean 0 and variance 1 where `cfg.normalize`.
            padding_mask: `[B, S]`, True where padded.
            mask: whether to mask frames and channels at random, see `apply_mask`.
            ret_conv: whether to return the transformer's input in place of its output.
            output_layer: stop after so many layers, without a final norm; None: all of them, and the norm if
                `cfg.layer_norm_first`.
            ret_layer_results: whether to return a pair, the second a list of the transformer's input and each layer's
                output, as `(x, None)` with x `[T, B, C]`. The list is empty unless output_layer is given.

        Returns:
            `[B, T, C]`, or the pair; and the mask of frames `[B, T]`, True where padded, or None.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.feature_grad_mult > 0):
            features = self.feature_extractor(source)  # [B, C', T]
        if features.requires_grad and self.feature_grad_mult != 1.0:
            features = torch.lerp(features.detach(), features, self.feature_grad_mult)  # same values, scaled gradient
        features = self.layer_norm(features.transpose(1, 2))
        if padding_mask is not None:
            padding_mask = self.forward_padding_mask(features, padding_mask)
        if self.post_extract_proj is not None:
            features = self.post_extract_proj(features)
        features = self.dropout_input(features)
        if mask:
            features, _ = self.apply_mask(features, padding_mask)
        layer = None if output_layer is None else output_layer - 1
        x, layer_results = self.encoder(features, padding_mask=padding_mask, layer=layer)
        feature = features if ret_conv else x
        return (feature, layer_results) if ret_layer_results else feature, padding_mask


class ConvFeatureExtractionModel(nn.Module):
    """The front end: convolutions over the waveform, each followed by a norm or none and a GELU.

    Args:
        conv_layers: channels, kernel and stride of each.
        dropout: after each convolution.
        mode: "default" or "layer_norm", see `WavLMConfig`.
        conv_bias: whether the convolutions have one.
    """

    def __init__(
        self,
        conv_layers: list[tuple[int, int, int]],
        dropout: float = 0.0,
        mode: str = "default",
        conv_bias: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("default", "layer_norm"):
            raise ValueError(f"extractor_mode is default or layer_norm, not {mode!r}")
        self.conv_layers = nn.ModuleList()
        channels = 1
        for i, (dim, kernel, stride) in enumerate(conv_layers):
            conv = nn.Conv1d(channels, dim, kernel, stride=stride, bias=conv_bias)
            nn.init.kaiming_normal_(conv.weight)
            norm: list[nn.Module] = []
            if mode == "layer_norm":
                norm = [nn.Sequential(TransposeLast(), Fp32LayerNorm(dim), TransposeLast())]
            elif i == 0:
                norm = [Fp32GroupNorm(dim, dim)]
            self.conv_layers.append(nn.Sequential(conv, nn.Dropout(dropout), *norm, nn.GELU()))
            channels = dim

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """`[B, S]` samples to `[B, C', T]`."""
        x = x.unsqueeze(1)
        for conv in self.conv_layers:
            x = conv(x)
        return x


class TransformerEncoder(nn.Module):
    """Positional convolution and transformer layers."""

    def __init__(self, args: WavLMConfig) -> None:
        super().__init__()
        self.dropout = args.dropout
        self.embedding_dim = dim = args.encoder_embed_dim
        conv = WeightNormConv1d(dim, dim, args.conv_pos, padding=args.conv_pos // 2, groups=args.conv_pos_groups)
        nn.init.normal_(conv.weight, mean=0, std=math.sqrt(4 / (args.conv_pos * dim)))
        nn.init.zeros_(cast(Tensor, conv.bias))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's newer weight norm has other names: no checkpoint has them
            conv = nn.utils.weight_norm(conv, name="weight", dim=2)
        self.pos_conv = nn.Sequential(conv, SamePad(args.conv_pos), nn.GELU())
        self.relative_position_embedding = args.relative_position_embedding
        self.num_buckets = args.num_buckets
        self.max_distance = args.max_distance
        self.layers = nn.ModuleList(
            TransformerSentenceEncoderLayer(
                embedding_dim=dim,
                ffn_embedding_dim=args.encoder_ffn_embed_dim,
                num_attention_heads=args.encoder_attention_heads,
                dropout=args.dropout,
                attention_dropout=args.attention_dropout,
                activation_dropout=args.activation_dropout,
                activation_fn=args.activation_fn,
                layer_norm_first=args.layer_norm_first,
                has_relative_attention_bias=i == 0,
                num_buckets=args.num_buckets,
                max_distance=args.max_distance,
            )
            for i in range(args.encoder_layers)
        )
        self.layer_norm_first = args.layer_norm_first
        self.layer_norm = nn.LayerNorm(dim)
        self.layerdrop = args.encoder_layerdrop
        self.apply(_initialise)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, streaming_mask: None = None, layer: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, None]]]:
        """`extract_features`, with the final norm of a model that has one unless it stops at a layer."""
        x, layer_results = self.extract_features(x, padding_mask, streaming_mask, layer)
        return self.layer_norm(x) if self.layer_norm_first and layer is None else x, layer_results

    def extract_features(
        self, x: Tensor, padding_mask: Tensor | None = None, streaming_mask: None = None, tgt_layer: int | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, None]]]:
        """`[B, T, C]` through the layers up to number tgt_layer, that one included. Sets x to 0 where padded."""
        if padding_mask is not None:
            x.masked_fill_(padding_mask[..., None], 0)
        x = x + self.pos_conv(x.transpose(1, 2)).transpose(1, 2)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = F.dropout(x, p=self.dropout, training=self.training).transpose(0, 1)  # [T, B, C]
        weights = pos_bias = None
        layer_results = [] if tgt_layer is None else [(x, weights)]
        for i, layer in enumerate(self.layers):
            if self.training or not torch.compiler.is_compiling():
                drawn = np.random.random()  # in eval mode too, so that what others draw does not depend on the mode
            if not self.training or drawn > self.layerdrop:
                x, weights, pos_bias = layer(
                    x,
                    self_attn_padding_mask=padding_mask,
                    need_weights=False,
                    self_attn_mask=streaming_mask,
                    pos_bias=pos_bias,
                )
            if tgt_layer is not None:
                layer_results.append((x, weights))
            if i == tgt_layer:
                break
        return x.transpose(0, 1), layer_results


class TransformerSentenceEncoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input, with norms after the sums or, `layer_norm_first`, before."""

    def __init__(
        self,
        embedding_dim: int = 768,
        ffn_embedding_dim: int = 3072,
        num_attention_heads: int = 8,
        dropout: float = 0.1,
        attention_dropout: float = 0.1,
        activation_dropout: float = 0.1,
        activation_fn: str = "relu",
        layer_norm_first: bool = False,
        has_relative_attention_bias: bool = False,
        num_buckets: int = 0,
        max_distance: int = 0,
    ) -> None:
        super().__init__()
        if activation_fn not in ACTIVATIONS:
            raise ValueError(f"activation_fn is one of {', '.join(ACTIVATIONS)}, not {activation_fn!r}")
        self.embedding_dim = embedding_dim
        self.dropout = dropout
        self.activation_dropout = activation_dropout
        self.activation_name = activation_fn
        self.activation_fn = ACTIVATIONS[activation_fn]
        self.self_attn = MultiheadAttention(
            embedding_dim,
            num_attention_heads,
            attention_dropout,
            has_relative_attention_bias,
            num_buckets,
            max_distance,
        )
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(activation_dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.layer_norm_first = layer_norm_first
        self.self_attn_layer_norm = nn.LayerNorm(embedding_dim)
        expand = GLU_Linear if activation_fn == "glu" else nn.Linear
        self.fc1 = expand(embedding_dim, ffn_embedding_dim)
        self.fc2 = nn.Linear(ffn_embedding_dim, embedding_dim)
        self.final_layer_norm = nn.LayerNorm(embedding_dim)

    def forward(
        self,
        x: Tensor,
        self_attn_mask: None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        pos_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Frames `[T, B, C]`, the attention's weights if wanted, and the position bias for the next layer."""
        before = self.self_attn_layer_norm(x) if self.layer_norm_first else x
        attended, weights, pos_bias = self.self_attn(
            query=before,
            key=before,
            value=before,
            key_padding_mask=self_attn_padding_mask,
            need_weights=need_weights,
            attn_mask=self_attn_mask,
            position_bias=pos_bias,
        )
        x = x + self.dropout1(attended)
        if self.layer_norm_first:
            x = x + self._feed_forward(self.final_layer_norm(x))
        else:
            x = self.self_attn_layer_norm(x)
            x = self.final_layer_norm(x + self._feed_forward(x))
        return x, weights, pos_bias

    def _feed_forward(self, x: Tensor) -> Tensor:
        x = self.dropout2(self.activation_fn(self.fc1(x)))
        return self.dropout3(self.fc2(x))


def _initialise(module: nn.Module) -> None:
    """The published initial weights of the transformer."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
