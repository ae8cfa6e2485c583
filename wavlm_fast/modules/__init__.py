"""Fast twins of transformers' WavLM modules: subclasses that add no parameters, one file per stage of the signal."""

from __future__ import annotations

from ._steps import FastModule, Signal, Step, steps_of, steps_of_children
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

# Each stands in for a class of transformers'.
MODULES = (
    FastWavLMFeatureEncoder,
    FastWavLMGroupNormConvLayer,
    FastWavLMLayerNormConvLayer,
    FastWavLMNoLayerNormConvLayer,
    FastWavLMFeatureProjection,
    FastWavLMPositionalConvEmbedding,
    FastWavLMEncoder,
    FastWavLMEncoderStableLayerNorm,
    FastWavLMEncoderLayer,
    FastWavLMEncoderLayerStableLayerNorm,
    FastWavLMAttention,
    FastWavLMFeedForward,
    FastTDNNLayer,
)

__all__ = [
    "MODULES",
    "FastModule",
    "FastTDNNLayer",
    "FastWavLMAttention",
    "FastWavLMEncoder",
    "FastWavLMEncoderLayer",
    "FastWavLMEncoderLayerStableLayerNorm",
    "FastWavLMEncoderStableLayerNorm",
    "FastWavLMFeatureEncoder",
    "FastWavLMFeatureProjection",
    "FastWavLMFeedForward",
    "FastWavLMGroupNormConvLayer",
    "FastWavLMLayerNormConvLayer",
    "FastWavLMNoLayerNormConvLayer",
    "FastWavLMPositionalConvEmbedding",
    "Signal",
    "Step",
    "pool_statistics",
    "steps_of",
    "steps_of_children",
]
