"""Fast twins of transformers' WavLM modules: subclasses that add no parameters, one file per stage of the signal."""

from __future__ import annotations

from torch import nn

from ._steps import FastModule, Plan
from .attention import FastWavLMAttention
from .encoder import FastWavLMEncoder, FastWavLMEncoderStableLayerNorm
from .encoder_layer import FastWavLMEncoderLayer, FastWavLMEncoderLayerStableLayerNorm, FastWavLMFeedForward
from .feature_encoder import (
    FastWavLMFeatureEncoder,
    FastWavLMGroupNormConvLayer,
    FastWavLMLayerNormConvLayer,
    FastWavLMNoLayerNormConvLayer,
)
from .feature_projection import FastWavLMFeatureProjection
from .positional_conv import FastWavLMPositionalConvEmbedding
from .xvector import FastTDNNLayer, pool_statistics

_FAST: tuple[type[nn.Module], ...] = (
    FastWavLMFeatureEncoder,
    FastWavLMGroupNormConvLayer,
    FastWavLMLayerNormConvLayer,
    FastWavLMNoLayerNormConvLayer,
    FastWavLMFeatureProjection,
    FastWavLMPositionalConvEmbedding,
    FastWavLMAttention,
    FastWavLMFeedForward,
    FastWavLMEncoderLayer,
    FastWavLMEncoderLayerStableLayerNorm,
    FastWavLMEncoder,
    FastWavLMEncoderStableLayerNorm,
    FastTDNNLayer,
)
# transformers' class -> the class that stands in for it.
TWINS: dict[type[nn.Module], type[nn.Module]] = {fast.__bases__[-1]: fast for fast in _FAST}

__all__ = ["TWINS", "FastModule", "Plan", "pool_statistics"]
